"""Programs, started as a user starts them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(program: str, *flags: str) -> subprocess.CompletedProcess:
    """`python -m launch.PROGRAM` on the CPU and without the Hub; its output is captured."""
    return subprocess.run(
        [sys.executable, "-m", f"launch.{program}", *flags],
        check=False,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
