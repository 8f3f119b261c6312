"""A checkpoint converted once, so that it loads fast from then on; and written back."""

import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from jaxmed.runs import settings as settings_lib
from jaxmed.runs import sweep
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.settings import like, setting
from models import cache, checkpoint, gguf_files
from models.checkpoint import CheckpointError, Source
from models.config import DTYPES
from models.errors import InputError

# Of the random prompt: beyond the shortest window, where that is not too long.
FEWEST_TOKENS, MOST_TOKENS = 64, 640
# How far rounding may take two float32 programs apart, of the largest logit. It grows with depth: a
# random Llama of 32 layers was seen at 1.4e-5, each of the two programs being off by about 1e-5.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """Which checkpoint is converted, and what else is done with it."""

    model: str | None = setting(
        help="Folder or Hugging Face hub id of a checkpoint.", default=None, path=True
    )
    gguf: str | None = setting(
        help="In place of --model, a GGUF file: --out becomes an ordinary checkpoint of its model, "
        "with its tokenizer. Needs pip install 'jaxmed[gguf]'.",
        default=None,
        path=True,
    )
    adapter: str = like(MediateSettings, "adapter")
    cache_dir: str | None = setting(
        help="Where converted weights are kept. By default jaxmed in $XDG_CACHE_HOME or in "
        "~/.cache, where every program finds them.",
        default=None,
        path=True,
    )
    out: str | None = setting(
        help="Folder for the model as a Hugging Face checkpoint, which transformers loads.",
        default=None,
        path=True,
    )
    dtype: str | None = setting(
        help="--out: type of the weights there, by default as they are stored, or float32 with "
        "--gguf. (What is kept is always of the stored type; it is converted while it is loaded.)",
        default=None,
        choices=DTYPES,
    )
    ignore_config: tuple[str, ...] = like(MediateSettings, "ignore_config")
    verify: bool = setting(
        help="Compare logits of a random prompt, in float32, with those of transformers' own model "
        "(peft's, with --adapter) of what is converted; of the export, where --out asks for one. "
        "Needs torch. The prompt is longer than a sliding window of up to "
        f"{MOST_TOKENS} tokens.",
        default=False,
    )


def run(settings: ConvertSettings, say: Callable[[str], None] = sweep.tell) -> None:
    """Converts the checkpoint, unless that was done before, and does what else is asked.

    A GGUF file becomes the folder `out`, and nothing is kept of it elsewhere.

    Args:
        settings: what is asked.
        say: told of each step that is done.

    Raises:
        CheckpointError: the logits differ from transformers' by more than rounding (verify).
        InputError: the checkpoint or a folder cannot be used.
    """
    _check(settings)
    adapter = checkpoint.resolve_adapter(settings.adapter)
    cache_dir = pathlib.Path(settings.cache_dir or cache.default_folder())
    out = pathlib.Path(settings.out) if settings.out else None
    with _folder(settings) as folder:
        examine = functools.partial(
            Source.examine, folder, adapter=adapter, ignore_config=settings.ignore_config
        )
        if not settings.gguf:
            _convert(examine(), settings, cache_dir, say)
        if out:
            say(_exported(examine(settings.dtype), cache_dir, out))
        if settings.verify:
            made = Source.examine(out, "float32") if out else examine("float32")
            say(_verified(made, examine(), cache_dir))


def _check(settings: ConvertSettings) -> None:
    """Refuses what could only fail after the work is done."""
    settings_lib.check(settings)
    if (settings.model is None) == (settings.gguf is None):
        raise InputError("give either --model or --gguf")
    if settings.gguf:
        if not settings.out:
            raise InputError("--gguf needs --out, the folder of the checkpoint that it becomes")
        if not pathlib.Path(settings.gguf).is_file():
            raise InputError(f"--gguf: {settings.gguf}: no such file")
        gguf_files.check_installed()
    if settings.dtype and not settings.out:
        raise InputError("--dtype is the type of what --out writes; give --out, or leave it out")
    if settings.out:
        checkpoint.check_free(pathlib.Path(settings.out))
    needed = ["torch==2.13.0", *(["peft"] if settings.adapter else [])]
    if settings.verify and not all(
        importlib.util.find_spec(package.partition("=")[0]) for package in needed
    ):
        raise InputError(
            "--verify compares with transformers' torch models: pip install 'jaxmed[parity]', or "
            f"pip install {' '.join(needed)}"
        )


def _convert(
    source: Source, settings: ConvertSettings, cache_dir: pathlib.Path, say: Callable[[str], None]
) -> None:
    """Keeps the weights as they lie in memory, unless that was done before."""
    try:
        entry = source.cached(cache_dir)
    except cache.DamagedEntryError as error:
        say(f"{error}; converted anew")
        entry = None
    if entry is not None:
        say(f"Was converted before: {_described(entry)}")
        return
    try:
        entry = source.write_cache(cache_dir)
    except OSError as error:
        raise InputError(f"{cache_dir}: cannot be written to ({error})") from error
    say(f"Converted: {_described(entry)}")
    if settings.cache_dir:
        say(f"Load it with models.load(..., cache_dir={settings.cache_dir!r}).")
    else:
        same = "--model and --adapter" if settings.adapter else "--model"
        say(f"Programs and models.load use it from now on, given the same {same}.")
    say("It may be removed at any time; the checkpoint is then read itself.")


def _described(entry: cache.Entry) -> str:
    return f"{entry.folder} ({entry.size / 1e9:.3g} GB, {entry.about['dtype']})"


@contextlib.contextmanager
def _folder(settings: ConvertSettings) -> Iterator[pathlib.Path]:
    """The folder of what is converted; of a GGUF file one that is there only meanwhile."""
    if not settings.gguf:
        yield checkpoint.resolve(str(settings.model))
        return
    out = pathlib.Path(str(settings.out))
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the export, where there is room for weights. What transformers writes is exported as
    # any other checkpoint is: only then is it known that it can be used.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.gguf-", dir=out.parent) as made:
        gguf_files.unpack(pathlib.Path(settings.gguf), pathlib.Path(made))
        yield pathlib.Path(made)


def _exported(source: Source, cache_dir: pathlib.Path, out: pathlib.Path) -> str:
    """Writes the model in Hugging Face's format, in the source's type, and says so."""
    decoder = source.load(cache_dir=cache_dir)
    tokenizer = checkpoint.read_tokenizer(source.folder, source.adapter)
    generation = source.folder / checkpoint.GENERATION_CONFIG
    beside = {generation.name: generation.read_text("utf-8")} if generation.is_file() else {}
    checkpoint.save(decoder, out, tokenizer=tokenizer, beside=beside)
    size = sum(file.stat().st_size for file in out.iterdir())
    return (
        f"Exported: {out} ({size / 1e9:.3g} GB, {decoder.dtype}). "
        f"Load it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})."
    )


def _verified(made: Source, given: Source, cache_dir: pathlib.Path) -> str:
    """Compares what was made, in float32, with transformers' model of what was given, and says how
    near they are.

    Args:
        made: the export, or where there is none what was given, as it is loaded here.
        given: what it was made of.
        cache_dir: where converted weights are kept.

    Raises:
        CheckpointError: the logits differ by more than rounding.
    """
    config = made.config
    beyond = FEWEST_TOKENS + min(filter(None, config.windows), default=0)
    length = min(beyond if beyond <= MOST_TOKENS else FEWEST_TOKENS, config.max_positions)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, length)
    theirs = _transformers_logits(given, config.dtype, prompt)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(made.load(cache_dir=cache_dir)(jnp.asarray(prompt))[0])
    largest = np.abs(theirs).max()
    distance = np.abs(ours - theirs).max() / largest
    said = (
        f"logits of a random prompt of {length} tokens differ from transformers' by at most "
        f"{distance:.1e} of the largest ({largest:.3g}), in float32"
    )
    # Written so that NaN fails.
    if not distance <= TOLERANCE:
        raise CheckpointError(
            f"{made.folder}: {said}; rounding rarely explains more than {TOLERANCE:.0e}. Please "
            "report it: this model seems not to be computed as transformers computes it"
        )
    return f"Verified: {said}."


def _transformers_logits(source: Source, dtype: str, prompt: np.ndarray) -> np.ndarray:
    """Logits of transformers' own model, with peft's merge of an adapter, [position, token], in
    float32; of weights that are rounded to a type, as they are kept."""
    import torch  # Here, because nothing else needs it.  # pyright: ignore[reportMissingImports]

    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
    )
    if source.adapter is not None:
        import peft  # pyright: ignore[reportMissingImports]

        model = peft.PeftModel.from_pretrained(model, source.adapter).merge_and_unload()
    with torch.inference_mode():
        for weight in model.parameters():
            weight.copy_(weight.to(getattr(torch, dtype)))
        return model.eval()(torch.from_numpy(prompt)[None]).logits[0].numpy()
