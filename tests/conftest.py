"""What all tests share."""

import gc
import os

import jax
import jaxtyping
import pytest

from tests import typecheck

# Packages whose annotations are checked, shapes included, whenever a test calls something in them.
CHECKED = (
    "models",
    "jaxmed.files",
    "jaxmed.data",
    "jaxmed.question",
    "jaxmed.engine",
    "jaxmed.reference",
    "jaxmed.store",
    "jaxmed.analysis",
    "jaxmed.behaviour",
    "jaxmed.intervention",
    "jaxmed.validation",
    "jaxmed.report",
    "jaxmed.runs",
)
jaxtyping.install_import_hook(CHECKED, f"{typecheck.__name__}.checked")

# Only now, so that they are checked too.
from jaxmed.files import places  # noqa: E402
from models import cache  # noqa: E402
from tests.buckets import Buckets  # noqa: E402

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


@pytest.fixture(scope="session")
def buckets():
    """A server of buckets, which TensorStore takes for Google's."""
    server = Buckets()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        retries = {"max_retries": 8, "initial_delay": "1ms", "max_delay": "4ms"}
        patch.setattr(places, "RETRIES", retries)
        yield server
    server.close()


@pytest.fixture
def bucket(buckets):
    """An empty bucket, gs://NAME."""
    return buckets.make()


# Where most of the time goes, longest first: workers that begin with these end together.
_LONGEST = (
    "tests/jaxmed/behaviour/test_generation.py",
    "tests/jaxmed/runs/test_certify.py",
    "tests/models/test_decoder.py",
    "tests/jaxmed/engine/test_scan_families.py",
    "tests/jaxmed/runs/test_clamp.py",
    "tests/jaxmed/engine/test_scan.py",
    "tests/models/test_organisms.py",
    "tests/jaxmed/analysis/test_screening.py",
    "tests/jaxmed/runs/test_mediate.py",
    "tests/jaxmed/analysis/test_controls.py",
    "tests/launch/test_clamp.py",
    "tests/launch/test_mediate.py",
    "tests/models/test_placement.py",
    "tests/jaxmed/validation/test_numerical_error.py",
    "tests/jaxmed/validation/test_benchmark.py",
    "tests/test_tutorial.py",
)


def pytest_collection_modifyitems(items):
    place = {file: index for index, file in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.location[0], len(place)))
