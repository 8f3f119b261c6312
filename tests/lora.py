"""Small LoRA adapters as peft writes them."""

import json

import numpy as np
import safetensors.numpy

from models import adapters, checkpoint

RANK, ALPHA = 2, 6
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "someone/base",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q_proj", "up_proj"],
    "bias": "none",
    "lora_dropout": 0.1,
    # As peft writes them where they are not used.
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "loftq_config": {},
    "layer_replication": None,
    "megatron_core": "megatron.core",
}


def stored(folder):
    """The tensors of a checkpoint."""
    return safetensors.numpy.load_file(folder / checkpoint.SINGLE_FILE)


def random_lora(folder, modules, ranks=None, dtype="float32"):
    """A and B of modules of a checkpoint, of this rank or of their own."""
    rng, found = np.random.default_rng(1), {}
    for module in modules:
        outputs, inputs = stored(folder)[f"{module}.weight"].shape
        rank = (ranks or {}).get(module, RANK)
        for name, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            values = rng.normal(0, 0.3, shape).astype(dtype)
            found[f"base_model.model.{module}.{name}.weight"] = values
    return found


def write(folder, tensors, **options):
    """An adapter's folder."""
    folder.mkdir(exist_ok=True)
    (folder / adapters.CONFIG).write_text(json.dumps(CONFIG | options))
    safetensors.numpy.save_file(tensors, folder / adapters.WEIGHTS)
    return folder
