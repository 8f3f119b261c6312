"""Programs, started as a user starts them, or called in this process."""

import contextlib
import importlib
import io
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parents[2]
# Compiled programs are kept where the tests keep them, or not at all.
COMPILED = {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", "")}
ENVIRONMENT = os.environ | COMPILED | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def run(program: str, *flags: str) -> subprocess.CompletedProcess:
    """`python -m launch.PROGRAM` on the CPU and without the Hub; its output is captured."""
    return run_python("-m", f"launch.{program}", *flags)


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """`python ARGUMENTS`, likewise."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def call(program: str, *flags: str) -> subprocess.CompletedProcess:
    """What `run` does, but without a process of its own: many commands then start once.

    That a process starts and ends as it should is tested with `run`, once for each program.
    """
    main = importlib.import_module(f"launch.{program}").main
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *flags]),
        mock.patch.dict(os.environ, COMPILED),
        mock.patch.object(os, "_exit", sys.exit),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        flagsaver.flagsaver(),  # forgets the flags that the program defines
    ):
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
            if isinstance(status, str):  # the interpreter prints it, with status 1
                print(status, file=sys.stderr)
                status = 1
    return subprocess.CompletedProcess(flags, status, out.getvalue(), error.getvalue())
