"""Which units are held still while a model generates, and at what values.

Shapes: L layers, U units of a layer (heads or neurons), d hidden size; a site's value in all layers
is [L, I] for neurons, [L, H, h] for heads and [L, d] for modules.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from jaxmed.analysis import ranking
from jaxmed.question.sites import MODULE_SITES, SITES
from jaxmed.store.results import Results
from models.config import DecoderConfig
from models.errors import InputError
from models.sites import Site

GRANULARITIES = ("neuron", "head", "module")  # of the units that can be held
BY = ("max", "nie", "tie", "joint")


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """A head, a neuron or a module.

    Attributes:
        site: head, neuron, attention or mlp.
        layer: its layer.
        index: of the head or neuron; None for a module.
    """

    site: Site
    layer: int
    index: int | None = None

    def __str__(self) -> str:
        """As `named` reads it."""
        place = self.layer if self.index is None else f"{self.layer}.{self.index}"
        return f"{self.site}:{place}"


def named(names: Sequence[str], config: DecoderConfig) -> list[Unit]:
    """Units by their names: neuron:LAYER.INDEX, head:LAYER.INDEX, attention:LAYER or mlp:LAYER.

    Raises:
        InputError: a name is none, or of a unit that the model does not have.
    """
    inside = {Site.NEURON: config.intermediate_size, Site.HEAD: config.num_heads}
    found = []
    for name in names:
        site, _, place = name.partition(":")
        numbers = place.split(".")
        whole = site in MODULE_SITES
        if not (whole or site in inside) or not all(map(str.isdecimal, numbers)):
            raise InputError(
                f"unit '{name}': name units neuron:LAYER.INDEX, head:LAYER.INDEX, attention:LAYER "
                "or mlp:LAYER"
            )
        sizes = [config.num_layers] + ([] if whole else [inside[Site(site)]])
        if len(numbers) != len(sizes):
            raise InputError(f"unit '{name}': needs {'a layer' if whole else 'LAYER.INDEX'}")
        if any(int(number) >= size for number, size in zip(numbers, sizes, strict=True)):
            raise InputError(
                f"unit '{name}': the model has {config.num_layers} layers"
                + ("" if whole else f" of {sizes[1]} {site}s")
                + ", numbered from 0"
            )
        layer, *index = map(int, numbers)
        found.append(Unit(Site(site), layer, *index))
    if len(set(found)) < len(found):
        raise InputError("units: one is named twice")
    return found


def strongest(results: Results, granularity: str, by: str, top: int) -> list[Unit]:
    """The units that a run ranks highest, the strongest first; of a joint set all that it has.

    Args:
        results: the run.
        granularity: one of `GRANULARITIES`.
        by: "nie" or "tie", the size of the mean effect; "max", the larger of both; or "joint".
        top: how many; 0 for all of a joint set.

    Raises:
        InputError: the run lacks what is asked for.
    """
    if granularity not in results.granularities or results.run.get("group_size", 1) > 1:
        raise InputError(
            f"{results.folder} has no effects of single {granularity}s: a run needs "
            f"granularity '{granularity}' for that"
        )
    joint = [tuple(unit) for unit in results.run.get("joint", {}).get("picked", [])]
    if by == "joint":
        if granularity != "neuron" or not joint:
            raise InputError(
                f"{results.folder} has no joint set of {granularity}s: give a run with "
                "joint_size=K, or choose by='max'"
            )
        top = top or len(joint)
        if top > len(joint):
            raise InputError(f"top={top}: the joint set of {results.folder} has {len(joint)}")
        places = joint[:top]
    else:
        scores = ranking.rankings(results, granularity)[by]
        known = int(np.isfinite(scores).sum())
        if not 1 <= top <= known:
            raise InputError(f"top={top}: {results.folder} ranks {known} {granularity}s")
        order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None, kind="stable")
        places = zip(*np.unravel_index(order[:top], scores.shape), strict=True)
    sites = SITES[granularity]
    if granularity == "module":
        return [Unit(sites[int(index)], int(layer)) for layer, index in places]
    return [Unit(sites[0], int(layer), int(index)) for layer, index in places]


def modules_of(units: Sequence[Unit]) -> list[Unit]:
    """The modules that heads or neurons belong to."""
    module = {Site.NEURON: Site.MLP, Site.HEAD: Site.ATTENTION}
    return sorted({Unit(module.get(unit.site, unit.site), unit.layer) for unit in units})


def masks(units: Sequence[Unit], config: DecoderConfig) -> dict[Site, Bool[np.ndarray, "L ..."]]:
    """Which units of each site these are, with the site's number of axes."""
    shapes = {
        Site.NEURON: (config.num_layers, config.intermediate_size),
        Site.HEAD: (config.num_layers, config.num_heads, 1),
    }
    found = {}
    for unit in units:
        shape = shapes.get(unit.site, (config.num_layers, 1))
        mask = found.setdefault(unit.site, np.zeros(shape, bool))
        mask[(unit.layer,) if unit.index is None else (unit.layer, unit.index)] = True
    return found
