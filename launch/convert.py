"""Converts a checkpoint once, so that it loads fast from then on; and writes it back.

python -m launch.convert --model=DIR_OR_HUB_ID
python -m launch.convert --model=DIR_OR_HUB_ID --verify --out=DIR
"""

import importlib.util
import pathlib

import jax
import numpy as np
import transformers
from absl import flags

from launch import program
from models import cache, checkpoint
from models.checkpoint import CheckpointError, Source
from models.config import DTYPES
from models.errors import InputError

# Of the random prompt: beyond the shortest window, where that is not too long.
FEWEST_TOKENS, MOST_TOKENS = 64, 640
# How far rounding may take two float32 programs apart, of the largest logit. It grows with depth: a
# random Llama of 32 layers was seen at 1.4e-5, each of the two programs being off by about 1e-5.
TOLERANCE = 1e-4

_MODEL = flags.DEFINE_string(
    "model", None, "Folder or Hugging Face hub id of a checkpoint.", required=True
)
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    "Where converted weights are kept. By default jaxmed in $XDG_CACHE_HOME or in ~/.cache, where "
    "every program finds them.",
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder for the model as a Hugging Face checkpoint, which transformers loads."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    DTYPES,
    "--out: type of the weights there, by default as they are stored. (What is kept is always of "
    "the stored type; it is converted while it is loaded.)",
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare logits of a random prompt with transformers' own, in float32; needs torch. The prompt "
    f"is longer than a sliding window of up to {MOST_TOKENS} tokens.",
)


def main() -> None:
    """Runs what the flags ask for."""
    _check_flags()
    folder = checkpoint.resolve(_MODEL.value)
    cache_dir = pathlib.Path(_CACHE_DIR.value or cache.default_folder()).expanduser()
    _convert(Source.examine(folder), cache_dir)
    if _OUT.value:
        _export(folder, cache_dir, pathlib.Path(_OUT.value).expanduser())
    if _VERIFY.value:
        _verify(folder, cache_dir)


def _check_flags() -> None:
    """Refuses what could only fail after the work is done."""
    if _DTYPE.value and not _OUT.value:
        raise InputError("--dtype is the type of what --out writes; give --out, or leave it out")
    if _OUT.value:
        checkpoint.check_free(pathlib.Path(_OUT.value).expanduser())
    if _VERIFY.value and importlib.util.find_spec("torch") is None:
        raise InputError(
            "--verify compares with transformers' torch models: pip install 'jaxmed[parity]', or "
            "pip install torch==2.13.0"
        )


def _convert(source: Source, cache_dir: pathlib.Path) -> None:
    """Keeps the weights as they lie in memory, unless that was done before."""
    try:
        entry = source.cached(cache_dir)
    except cache.DamagedEntryError as error:
        print(f"{error}; converted anew")
        entry = None
    if entry is not None:
        print(f"Was converted before: {_described(entry)}")
        return
    try:
        entry = source.write_cache(cache_dir)
    except OSError as error:
        raise InputError(f"{cache_dir}: cannot be written to ({error})") from error
    print(f"Converted: {_described(entry)}")
    if _CACHE_DIR.value:
        print(f"Load it with models.load(..., cache_dir={_CACHE_DIR.value!r}).")
    else:
        print("Programs and models.load use it from now on, given the same --model.")
    print("It may be removed at any time; the checkpoint is then read itself.")


def _described(entry: cache.Entry) -> str:
    return f"{entry.folder} ({entry.size / 1e9:.3g} GB, {entry.about['dtype']})"


def _export(folder: pathlib.Path, cache_dir: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the model in Hugging Face's format."""
    decoder = Source.examine(folder, _DTYPE.value).load(cache_dir=cache_dir)
    generation = folder / checkpoint.GENERATION_CONFIG
    beside = {generation.name: generation.read_text("utf-8")} if generation.is_file() else {}
    checkpoint.save(decoder, out, tokenizer=checkpoint.read_tokenizer(folder), beside=beside)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"Exported: {out} ({size / 1e9:.3g} GB, {decoder.embedding.dtype}). "
        f"Load it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})."
    )


def _verify(folder: pathlib.Path, cache_dir: pathlib.Path) -> None:
    """Compares with transformers.

    Raises:
        CheckpointError: the logits differ by more than rounding.
    """
    source = Source.examine(folder, "float32")
    config = source.config
    beyond = FEWEST_TOKENS + min(filter(None, config.windows), default=0)
    length = min(beyond if beyond <= MOST_TOKENS else FEWEST_TOKENS, config.max_positions)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, length)
    theirs = _transformers_logits(folder, prompt)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(source.load(cache_dir=cache_dir)(prompt)[0])
    largest = np.abs(theirs).max()
    distance = np.abs(ours - theirs).max() / largest
    said = (
        f"logits of a random prompt of {length} tokens differ from transformers' by at most "
        f"{distance:.1e} of the largest ({largest:.3g}), in float32"
    )
    # Written so that NaN fails.
    if not distance <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: {said}; rounding rarely explains more than {TOLERANCE:.0e}. Please report "
            "it: this model seems not to be computed as transformers computes it"
        )
    print(f"Verified: {said}.")


def _transformers_logits(folder: pathlib.Path, prompt: np.ndarray) -> np.ndarray:
    """Logits of transformers' own model, [position, token], float32."""
    import torch  # Here, because nothing else needs it.

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
    )
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(prompt)[None]).logits[0].numpy()


if __name__ == "__main__":
    program.start(main)
