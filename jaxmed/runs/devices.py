"""Which devices a program uses, as people are told when it starts, and which it leaves unused."""

import glob
import os
import pathlib
from collections.abc import Iterator

import jax

# Files of an NVIDIA GPU's driver; PCI devices, the number of Google among their makers, and those
# of its TPUs (v3 to v7, as JAX knows them): machines in its cloud have network cards of it too.
_NVIDIA = "/dev/nvidia[0-9]*"
_PCI = "/sys/bus/pci/devices/*"
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
# Whoever sets one of these has chosen.
_CHOSEN_BY = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")

_UNUSED = (
    "Warning: this machine has {kind} that is not used: the installed jax runs on CPUs alone. "
    "pip install 'jaxmed[{extra}]' makes it work; JAX_PLATFORMS=cpu asks for the CPU, without this "
    "warning"
)


def told(mesh: str = "") -> Iterator[str]:
    """Lines on the devices that this process uses, and on an accelerator that it does not.

    Args:
        mesh: how rows and weights are spread over them, as 8x1; "" where that is not yet known.
    """
    devices = jax.local_devices()
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    of_cpu = devices[0].platform == "cpu"
    kind = f"CPU ({os.cpu_count()} cores)" if of_cpu else devices[0].device_kind
    yield f"Runs on {count}{kind}" + (f", mesh {mesh}" if mesh else "")
    if of_cpu and not any(os.environ.get(name) is not None for name in _CHOSEN_BY):
        yield from (_UNUSED.format(kind=kind, extra=extra) for kind, extra in _accelerators())


def _accelerators() -> Iterator[tuple[str, str]]:
    """Kinds of accelerators whose files this machine has, and the extra of setup.cfg for each."""
    if glob.glob(_NVIDIA):
        yield "an NVIDIA GPU", "cuda"
    if any(_is_tpu(pathlib.Path(device)) for device in glob.glob(_PCI)):
        yield "a TPU", "tpu"


def _is_tpu(device: pathlib.Path) -> bool:
    maker, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
    return maker == _GOOGLE and kind in _TPUS
