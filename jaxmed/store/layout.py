"""`effects.zarr`: which arrays a run has, how they are cut into chunks, and what describes them.

It is a Zarr v3 group that any reader of Zarr opens. zarr-python makes its metadata and coordinates,
in memory; TensorStore writes and reads the arrays of effects.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from jaxmed.question.effects import TOTALS, Sizes, Status, attributes

EFFECTS_FILE = "effects.zarr"
ROOT = "zarr.json"  # of the whole group; it is written last
ESTIMATES = ("screen/nie", "screen/tie")
RECORDED_ON_ARRAYS = ("positions", "metric", "precision")


def array_names(run: dict) -> list[str]:
    """The arrays of what a run measures, without coordinates."""
    leaves = ("nie", "tie", "done")
    return [
        *TOTALS,
        *(f"{granularity}/{leaf}" for granularity in run["granularities"] for leaf in leaves),
        *(ESTIMATES if run.get("screen") else ()),
    ]


def layers_together(run: dict, group: str) -> int:
    """How many layers of a pair are in a chunk; those of the screen's estimates are cut as the
    neurons' effects are."""
    return run["layers_together"]["neuron" if group == "screen" else group]


def described(run: dict) -> dict[str, bytes]:
    """The files that describe a run's arrays, and hold their coordinates, by their names in
    `effects.zarr`, the root last.

    Args:
        run: the content of its `run.json`.
    """
    files: dict[str, Any] = {}
    store = MemoryStore(files)
    group = zarr.create_group(store, zarr_format=3)
    pairs = {"pair": np.array(run["pair_ids"], object)}
    axes = {"": pairs} | {name: pairs | _units(run, name) for name in _groups(run)}
    for granularity, along in axes.items():
        for name, values in along.items():
            _write_coordinate(group, f"{granularity}/{name}".lstrip("/"), values)
    for name in array_names(run):
        granularity, _, leaf = name.rpartition("/")
        names, shape = zip(*((axis, len(v)) for axis, v in axes[granularity].items()), strict=True)
        # Directions may be of any sites, which another program should find beside them.
        own = {"sites": run["sizes"]["sites"]} if granularity == "direction" else {}
        asked = attributes(run, granularity)
        group.create_array(
            name,
            shape=shape,
            chunks=(1, layers_together(run, granularity), *shape[2:]) if granularity else (1,),
            dtype="uint8" if leaf == "done" else "float32",
            fill_value=int(Status.NOT_RUN) if leaf == "done" else float("nan"),
            attributes={key: asked[key] for key in RECORDED_ON_ARRAYS} | own,
            dimension_names=names,
        )
    _consolidate(store, axes)
    return {
        name: files[name].to_bytes()
        for name in sorted(files, key=lambda name: (name == ROOT, name))
    }


def _groups(run: dict) -> tuple[str, ...]:
    """The groups of arrays with effects: granularities, and what their units are screened by."""
    return (*run["granularities"], *(("screen",) if run.get("screen") else ()))


def _units(run: dict, group: str) -> dict[str, np.ndarray]:
    granularity = "neuron" if group == "screen" else group
    return Sizes.of(run).coordinates(granularity, run.get("group_size", 1))


def _write_coordinate(group: zarr.Group, path: str, values: np.ndarray) -> None:
    is_text = values.dtype == object
    array = group.create_array(
        path,
        shape=values.shape,
        chunks=values.shape,
        dtype=str if is_text else values.dtype,
        fill_value="" if is_text else 0,
        dimension_names=[path.rpartition("/")[2]],
    )
    array[:] = values


def _consolidate(store: MemoryStore, groups: Iterable[str]) -> None:
    """Gathers what readers of the whole, or of one group, need to know of the arrays in it."""
    with warnings.catch_warnings():
        # Zarr 3 has no word on them yet; a reader that does not know them reads each array's own.
        warnings.filterwarnings("ignore", "Consolidated metadata", ZarrUserWarning)
        for name in sorted(groups, reverse=True):  # the whole last
            zarr.consolidate_metadata(store, path=name or None)
