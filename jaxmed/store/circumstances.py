"""When, where and by which versions a run is made."""

import sys
import time
from importlib import metadata

import jax

from jaxmed.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "numpy", "scipy", "tensorstore", "zarr")


def circumstances() -> dict:
    """When, where and by which versions a run is made, for `run.json`."""
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "versions": {name: metadata.version(name) for name in _PACKAGES}
        | {"jaxmed": __version__, "python": sys.version.split()[0]},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
