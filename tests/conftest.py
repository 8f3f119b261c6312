"""What all tests share."""

import gc

import jax
import jaxtyping
import pytest

from tests import typecheck

# Packages whose annotations are checked, shapes included, whenever a test calls something in them.
CHECKED = ("models",)
jaxtyping.install_import_hook(CHECKED, f"{typecheck.__name__}.checked")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_forgotten():
    """Each holds several memory maps, of which Linux gives a process 65,530: XLA crashes then."""
    yield
    jax.clear_caches()
    gc.collect()
