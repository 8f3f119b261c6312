"""What all tests share."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_forgotten():
    """Each holds several memory maps, of which Linux gives a process 65,530: XLA crashes then."""
    yield
    jax.clear_caches()
    gc.collect()
