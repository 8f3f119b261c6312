"""What programs can import before they need JAX."""

import subprocess
import sys

LIGHT = ("models", "models.config", "models.errors", "models.families", "models.sites")


def test_names_and_shapes_are_there_without_jax():
    program = f"import sys, {', '.join(LIGHT)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert set(LIGHT) <= set(loaded)
    assert not {"jax", "flax", "transformers", "numpy"} & set(loaded)


def test_torch_is_not_missed():
    """Neither in Python nor in programs: transformers reads configs and tokenizers without it."""
    program = """
import logging, launch.convert
logger = logging.getLogger("transformers")
logger.warning("PyTorch was not found. And so on")
logger.warning("something else")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "PyTorch was not found" not in ran.stderr and "something else" in ran.stderr
