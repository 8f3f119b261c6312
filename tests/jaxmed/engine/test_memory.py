"""The budget: what is asked, less what is taken."""

import types

import jax
import psutil
import pytest

from jaxmed.engine import memory
from models.errors import InputError

GIB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU with 10 GiB free, of which this process has taken 2."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10 * GIB))
    taken = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(rss=2 * GIB))
    monkeypatch.setattr(psutil, "Process", lambda: taken)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_most_of_what_is_free_by_default(machine):
    assert memory.free() == 8 * GIB


def test_a_budget_counts_what_is_taken_already(machine):
    assert memory.free(3.25) == 1 * GIB
    assert memory.free(100.0) == 10 * GIB
    with pytest.raises(InputError, match="memory_gb=1.5: model and program take 2.25 GiB"):
        memory.free(1.5)


def test_a_container_may_have_less_than_the_machine(machine):
    (machine / "memory.max").write_text("6442450944\n")
    (machine / "memory.current").write_text("2147483648\n")
    assert memory.free() == int(0.8 * 4 * GIB)
    (machine / "memory.max").write_text("max\n")
    assert memory.free() == 8 * GIB


def test_an_accelerator_tells_its_own(machine, monkeypatch):
    stats = {"bytes_in_use": 5 * GIB, "bytes_limit": 15 * GIB}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert memory.free() == 8 * GIB
    assert memory.free(6.0) == 1 * GIB
