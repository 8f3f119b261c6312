"""GGUF files, read by transformers with torch and written as a checkpoint's folder.

Weights that the file holds quantised become what their blocks stand for: the model is the rounded
one.
"""

import importlib.util
import pathlib

import transformers

from models import families
from models.checkpoint import CheckpointError
from models.errors import failures_as

_NEEDED = ("torch", "gguf", "accelerate")

# Tensors that change rotary frequencies, and that transformers' reader drops without a word.
_ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def check_installed() -> None:
    """Raises CheckpointError where something is missing that reads GGUF files."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not hasattr(transformers, "GgufConfig"):
        missing.append("a newer transformers")
    if missing:
        raise CheckpointError(
            "GGUF files are read by transformers with torch and gguf; to install what is missing "
            f"({', '.join(missing)}): pip install 'jaxmed[gguf]'"
        )


def unpack(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the model of a GGUF file as transformers reads it, in float32.

    Args:
        file: a GGUF file that holds a whole model.
        folder: where to: config.json, safetensors, generation_config.json, and the tokenizer with
            its chat template.

    Raises:
        CheckpointError: something is missing to read it with, the file cannot be read, or it says
            more of the model than transformers takes over.
    """
    check_installed()
    _refuse_dropped(file)
    named = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    with failures_as(CheckpointError, str(file)):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            **named,
            dtype="float32",
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        families.get(model.config.model_type)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**named)
    if lacking := {kind: sorted(map(str, found)) for kind, found in loading.items() if found}:
        raise CheckpointError(f"{file}: does not hold what its model needs: {lacking}")
    _refuse_untold(file, model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_dropped(file: pathlib.Path) -> None:
    """Refuses a file of which transformers would make another model, without a word."""
    import gguf  # Here, because nothing else needs it.  # pyright: ignore[reportMissingImports]

    with failures_as(CheckpointError, f"{file}: cannot be read as GGUF"):
        reader = gguf.GGUFReader(file)
    kinds = [key for key in reader.fields if key.endswith(".rope.scaling.type")]
    dropped = [key for key in kinds if reader.fields[key].contents() != "none"]
    # A factor alone, without the kind, is a linear scaling; so files of older programs have it.
    dropped += [key for key in reader.fields if key.endswith(".rope.scale_linear")]
    if not kinds:
        dropped += [key for key in reader.fields if key.endswith(".rope.scaling.factor")]
    dropped += [tensor.name for tensor in reader.tensors if tensor.name in _ROTARY_TENSORS]
    if dropped:
        raise CheckpointError(
            f"{file}: has a rotary scaling ({', '.join(dropped)}), which transformers does not "
            "read from GGUF; take the checkpoint that the file was made from"
        )


def _refuse_untold(file: pathlib.Path, config: transformers.PreTrainedConfig) -> None:
    """Refuses Gemma models whose scores are not scaled by the head size: no GGUF says by what."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim:
        raise CheckpointError(
            f"{file}: does not say how attention scores are scaled, and heads of {config.head_dim} "
            f"have another scale than transformers' default (query_pre_attn_scalar = {scalar}); "
            "take the checkpoint that the file was made from"
        )
