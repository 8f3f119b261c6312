"""What all tests share."""

import gc
import os

import jax
import jaxtyping
import pytest

from tests import typecheck

# Packages whose annotations are checked, shapes included, whenever a test calls something in them.
CHECKED = ("models", "jaxmed.behaviour", "jaxmed.intervention")
jaxtyping.install_import_hook(CHECKED, f"{typecheck.__name__}.checked")

from models import cache  # noqa: E402 (only now, so that it is checked too)

# Most of the time goes into compiling, so compiled programs are kept, where programs keep theirs:
# for other modules, for the programs that tests start, and for the next time.
_KEPT = {
    "JAX_COMPILATION_CACHE_DIR": str(cache.default_folder() / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
for _name, _default in _KEPT.items():
    os.environ.setdefault(_name, _default)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_forgotten():
    """Each holds several memory maps, of which Linux gives a process 65,530: XLA crashes then."""
    yield
    jax.clear_caches()
    gc.collect()
