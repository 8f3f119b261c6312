"""Fixtures of the judges' tests."""

import pytest

from jaxmed.behaviour.judges import protocol
from tests import tiny
from tests.jaxmed.behaviour.judges.judging import TEXTS


@pytest.fixture(scope="module")
def decoder():
    return tiny.decoder(num_layers=2, hidden_size=16, max_positions=64)


@pytest.fixture
def any_mass(monkeypatch):
    """Random models give their answers as little probability as any other words: what is compared
    is the verdict that they would give."""
    monkeypatch.setattr(protocol, "LEAST_MASS", 0.0)


@pytest.fixture
def text_of(tmp_path):
    """A function that writes a judge's text, by default its own of TEXTS, and returns the file."""

    def write(name, text=None):
        (tmp_path / "text.txt").write_bytes((TEXTS[name] if text is None else text).encode())
        return tmp_path / "text.txt"

    return write
