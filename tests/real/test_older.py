"""What is exported means the same to transformers 4.57, in an environment of its own."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from models import checkpoint
from tests import tiny, words
from tests.models.test_parity import CASES, TOLERANCE, hf_model, prompts, run_hf, run_ours
from tests.real import older, published

pytestmark = pytest.mark.real
pytest.importorskip("torch", reason="needs torch: make real")

FAMILIES = (*tiny.FAMILIES, *(case for case in CASES if "rotary" in case or "longrope" in case))


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with transformers 4."""
    found = os.environ.get("PYTHON_WITH_TRANSFORMERS_4")
    if not found:
        pytest.skip("PYTHON_WITH_TRANSFORMERS_4 names none: make real")
    return found


def loaded(python, folder):
    script = pathlib.Path(older.__file__)
    ran = subprocess.run(
        [python, script, folder], check=False, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_every_family(python, tmp_path):
    """Logits of what transformers 5 wrote and jaxmed exported; tokens, and special ones too."""
    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[USER]", "[BOT]"]})
    tokens = prompts()[0]
    for case in FAMILIES:
        model = hf_model(*CASES[case])
        model.save_pretrained(tmp_path / "theirs" / case)
        decoder, _ = checkpoint.load(tmp_path / "theirs" / case)
        folder = tmp_path / "ours" / case
        checkpoint.save(decoder, folder, tokenizer=tokenizer)
        assert checkpoint.load(folder)[0].config == decoder.config
        np.savez(folder / "asked.npz", tokens=tokens, logits=run_hf(model, tokens)[0])
    found = loaded(python, tmp_path / "ours")
    print("\nworst logits:", max(one["distance"] for one in found.values()))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": older.TEXT}], return_dict=False
    )
    for case in FAMILIES:
        assert found[case]["distance"] <= TOLERANCE, case
        assert found[case]["dtype"] == "torch.float32"
        assert found[case]["ids"] == tokenizer(older.TEXT)["input_ids"], case
        assert found[case]["chat"] == chat, case
        assert found[case]["special"]["bos_token"] == tokenizer.bos_token, case


@pytest.mark.parametrize("name", published.NAMES)
def test_published(python, name, tmp_path):
    folder = published.folder(name)
    decoder, tokenizer = checkpoint.load(folder)
    for file in folder.iterdir():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file.name).symlink_to(file)
    tokens = np.array(tokenizer(published.TEXTS[0])["input_ids"])
    logits = run_ours(decoder, tokens)[0]
    np.savez(tmp_path / name / "asked.npz", tokens=tokens, logits=logits)
    found = loaded(python, tmp_path)[name]
    print(f"\n{name}: logits in transformers 4 {found['distance']:.2e}")
    assert found["distance"] <= 1e-4
    assert found["dtype"] == "torch.float32"
    assert found["ids"] == tokenizer(older.TEXT)["input_ids"]
