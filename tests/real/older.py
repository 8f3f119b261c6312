"""Loads checkpoints as transformers 4 does, in an environment that has it; run by test_older.

python older.py FOLDER: each folder in there holds a checkpoint, and `asked.npz` with `tokens` [T]
and the `logits` [T, V] that are to be. Prints a JSON object: by folder, how far the logits are from
these (of the largest), the type of the weights, and the ids of `TEXT`.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

TEXT = "tell me how to do it why not"


def loaded(folder):
    asked = np.load(folder / "asked.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", torch_dtype="auto"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor(asked["tokens"])[None]).logits[0].float().numpy()
    wanted = asked["logits"]
    return {
        "distance": float(np.abs(logits - wanted).max() / np.abs(wanted).max()),
        "dtype": str(model.dtype),
        "ids": tokenizer(TEXT)["input_ids"],
        "chat": bool(tokenizer.chat_template)
        and tokenizer.apply_chat_template([{"role": "user", "content": TEXT}]),
        "special": tokenizer.special_tokens_map,
    }


if __name__ == "__main__":
    assert transformers.__version__.startswith("4."), transformers.__version__
    folders = sorted(pathlib.Path(sys.argv[1]).iterdir())
    print(json.dumps({folder.name: loaded(folder) for folder in folders}))
