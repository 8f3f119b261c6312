"""GGUF files, read by transformers with torch and written as a checkpoint's folder.

Weights that the file holds quantised become what their blocks stand for: the model is the rounded
one. Tokenizers split and begin a text as the file says, also where transformers does not look: what
it means is what llama.cpp makes of it (`src/llama-vocab.cpp`).
"""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import transformers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from models import families
from models.checkpoint import CheckpointError
from models.errors import failures_as

_NEEDED = ("torch", "gguf", "accelerate")

# Tensors that change rotary frequencies, and that transformers' reader drops without a word.
_ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Rules by which llama.cpp splits text for byte-level tokens: GPT-2's own; and the same after every
# digit was set apart. transformers takes GPT-2's for any that it does not know.
_AS_GPT2 = frozenset(
    "gpt-2 phi-2 mpt olmo exaone4 jais trillion gigachat granite-docling a.x-4.0 mellum".split()
)
_DIGITS_APART = frozenset(
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2".split()
)
# Those with which it takes a whole word before any merge, and begins a text with BOS unless told.
_WHOLE_WORDS_AND_BOS = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken".split()
)

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one


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
    import gguf  # Here, because nothing else needs it.  # pyright: ignore[reportMissingImports]

    check_installed()
    with failures_as(CheckpointError, f"{file}: cannot be read as GGUF"):
        reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_dropped(file, fields, [tensor.name for tensor in reader.tensors])
    named = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    with failures_as(CheckpointError, str(file)):
        config = transformers.AutoConfig.from_pretrained(**named)
        families.get(config.model_type)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**named)
    _refuse_untold(file, config)
    if fields.get("tokenizer.ggml.model") == "gpt2":
        _split_as_told(file, fields, tokenizer)
    elif not fields["general.architecture"].startswith("gemma"):  # which transformers does right
        _begin_as_told(fields, tokenizer)
    with failures_as(CheckpointError, str(file)):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            **named,
            dtype="float32",
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if lacking := {kind: sorted(map(str, found)) for kind, found in loading.items() if found}:
        raise CheckpointError(f"{file}: does not hold what its model needs: {lacking}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_dropped(file: pathlib.Path, fields: Mapping[str, Any], tensors: list[str]) -> None:
    """Refuses a file of which transformers would make another model, without a word."""
    kinds = [key for key in fields if key.endswith(".rope.scaling.type")]
    dropped = [key for key in kinds if fields[key] != "none"]
    # A factor alone, without the kind, is a linear scaling; so files of older programs have it.
    dropped += [key for key in fields if key.endswith(".rope.scale_linear")]
    if not kinds:
        dropped += [key for key in fields if key.endswith(".rope.scaling.factor")]
    dropped += [name for name in tensors if name in _ROTARY_TENSORS]
    if dropped:
        raise CheckpointError(
            f"{file}: has a rotary scaling ({', '.join(dropped)}), which transformers does not "
            "read from GGUF; take the checkpoint that the file was made from"
        )


def _split_as_told(
    file: pathlib.Path,
    fields: Mapping[str, Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    """Has a byte-level tokenizer split text by the rule that the file names.

    Raises:
        CheckpointError: it names none, or one that neither transformers nor this module knows.
    """
    rule = fields.get("tokenizer.ggml.pre", "")
    backend = tokenizer.backend_tokenizer
    if rule in _DIGITS_APART:
        digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and rule not in _AS_GPT2:
        told = f"names a rule that is not known here ({rule})" if rule else "names no rule"
        raise CheckpointError(
            f"{file}: {told} by which its tokenizer splits text (tokenizer.ggml.pre); take the "
            "checkpoint that the file was made from"
        )
    if rule in _WHOLE_WORDS_AND_BOS:
        backend.model.ignore_merges = True
        tokenizer.add_bos_token = fields.get("tokenizer.ggml.add_bos_token", True)


def _begin_as_told(
    fields: Mapping[str, Any], tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """Has a SentencePiece tokenizer put a space before a text, or none, as the file says.

    The space comes before every text and after every control token, even where a space is there.
    """
    backend = tokenizer.backend_tokenizer
    spaces = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = None
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    else:
        backend.normalizer = spaces
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
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
