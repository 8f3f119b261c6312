"""`launch.certify` as a program; what it does is tested in `tests/jaxmed/runs/test_certify.py`."""

import re

from models import organisms
from tests.launch import process


def test_help_shows_the_flags_of_a_sweep_that_organisms_have_a_use_for():
    helped = process.run("certify", "--help").stdout
    assert re.search(r"--positions: [^-]*\(default: 'prompt'\)", helped)
    assert "--granularity" not in helped and "--metric" not in helped


def test_bad_flags(tmp_path):
    unknown = process.call("certify", "--organism=late-mlp,early-mlp", f"--out={tmp_path}")
    response = process.call("certify", "--positions=response", f"--out={tmp_path}")
    names = ", ".join(organisms.RECIPES)
    assert unknown.returncode == 1
    assert unknown.stderr.endswith(f"Error: --organism=early-mlp: not one of {names}\n")
    assert response.returncode == 1
    assert "Error: --positions=response: what is planted decides the first token" in response.stderr
    assert not list(tmp_path.iterdir())
