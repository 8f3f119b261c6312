"""Imports run one way, and import-linter's contract in setup.cfg holds them to it."""

import configparser
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("importlinter", reason="import-linter comes with the test extra")

ROOT = pathlib.Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
FOR_A_TYPE = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import launch
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for package in ("launch", "jaxmed", "models"):
        shutil.copytree(ROOT / package, folder / package)
    shutil.copy(ROOT / "setup.cfg", folder)
    return folder


def lint(folder):
    """Whether import-linter finds the contracts kept, and what it says."""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", LINT], cwd=folder, capture_output=True, text=True
    )
    return ran.returncode == 0, ran.stdout


def test_the_contracts_are_kept(copy):
    kept, said = lint(copy)
    assert kept, said


@pytest.mark.parametrize(
    "file, backward",
    [
        ("jaxmed/data/pairs.py", "import jaxmed.runs.mediate"),
        ("models/config.py", FOR_A_TYPE),
        ("jaxmed/question/metrics.py", "def f():\n    from jaxmed.engine import scan"),
        ("jaxmed/store/results.py", "from jaxmed.engine import plan"),
        ("jaxmed/analysis/summary.py", "import jaxmed"),
        ("models/decoder.py", "def f():\n    from jaxmed import scan"),
    ],
    ids=["at the top", "for a type", "in a function", "of a sibling", "of the face", "of its name"],
)
def test_a_backward_import_is_refused(copy, file, backward):
    changed = copy / file
    text = changed.read_text()
    changed.write_text(f"{text}\n\n{backward}\n")
    kept, said = lint(copy)
    changed.write_text(text)
    assert not kept
    assert f"{file.removesuffix('.py').replace('/', '.')} -> " in said


def test_all_of_jaxmed_has_its_place():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:downwards"]["layers"]
    named = set(re.findall(r"jaxmed\.(\w+)", layers))
    there = {path.stem for path in (ROOT / "jaxmed").iterdir() if path.name != "__pycache__"}
    assert there == named | {"__init__", "version"}
