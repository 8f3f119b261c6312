"""What every effect looks like: arrays by granularity, with names for their axes."""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8

from jaxmed.question.sites import MODULE_SITES, TOKEN_SITES

if TYPE_CHECKING:
    import pandas
    import xarray

ESTIMANDS = ("nie", "tie")  # of every unit; in this order wherever both stand beside each other
TOTALS = ("te", "y_base", "y_source")  # of every pair
_OF_UNITS = (*ESTIMANDS, "done")
_ASKED = ("metric", "metric_unit", "positions", "precision")


class Status(enum.IntEnum):
    """What is known of a unit's effect in one pair; the numbers that `done` arrays hold."""

    NOT_RUN = 0  # not yet, or the pair has no such unit
    EXACT = 1
    ESTIMATED = 2  # by the gradients of a screen
    FAILED = 3  # the effect is not finite
    LEFT_OUT = 4  # by plan: others were chosen


@dataclasses.dataclass(frozen=True)
class PairEffects:
    """Effects of one pair.

    Attributes:
        y_base, y_source: the metric of the two plain runs.
        nie, tie: by granularity, [layer], [layer, 2], [layer, head], [layer, 3, position],
            [layer, group] or [layer, site, direction].
    """

    y_base: float
    y_source: float
    nie: dict[str, np.ndarray]
    tie: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many units a model and its pairs have.

    Attributes:
        layers: blocks of the decoder.
        heads: query heads per layer.
        neurons: groups of adjacent neurons per layer, ceil(intermediate size / group size).
        positions: how far the aligned prompt positions of any pair reach, counted backwards from
            the last prompt token.
        sites: those that the user's directions belong to.
        directions: the most directions that any of these sites has in a layer.
    """

    layers: int
    heads: int
    neurons: int
    positions: int
    sites: tuple[str, ...] = ()
    directions: int = 0

    @classmethod
    def of(cls, run: dict) -> "Sizes":
        """Those that `run.json` holds."""
        return cls(**{**run["sizes"], "sites": tuple(run["sizes"]["sites"])})

    def coordinates(self, granularity: str, group_size: int = 1) -> dict[str, np.ndarray]:
        """The axes of one pair's effects, in their order, and where the units along them are.

        Args:
            granularity: which.
            group_size: adjacent neurons that are one unit, which is named by its first.

        Returns:
            By the axis's name: layers, heads, neurons and directions by their numbers, sites by
            their names, positions counted backwards from the last prompt token, 0.
        """
        heads, positions = np.arange(self.heads), np.arange(self.positions)
        of_a_layer = {
            "layer": {},
            "module": {"site": _names(MODULE_SITES)},
            "head": {"head": heads},
            "token": {"site": _names(TOKEN_SITES), "position": positions},
            "neuron": {"neuron": group_size * np.arange(self.neurons)},
            "direction": {"site": _names(self.sites), "direction": np.arange(self.directions)},
        }
        return {"layer": np.arange(self.layers)} | of_a_layer[granularity]

    def shape(self, granularity: str) -> tuple[int, ...]:
        """The shape of one pair's effects; its first axis is the layer."""
        return tuple(map(len, self.coordinates(granularity).values()))


def _names(sites: tuple[str, ...]) -> np.ndarray:
    return np.array([str(site) for site in sites], object)


@dataclasses.dataclass(frozen=True, eq=False)
class Totals:
    """What was measured of whole pairs.

    Attributes:
        pair_ids: the pairs, in the order of every array's first axis.
        bases: the base prompt of each; several pairs may share one.
        te: total effect, Y(x') - Y(x); NaN where it was not measured, as in all of these.
        y_base, y_source: the metric of the plain runs, Y(x) and Y(x').
    """

    pair_ids: tuple[str, ...]
    bases: tuple[str, ...]
    te: Float32[np.ndarray, "pair"]
    y_base: Float32[np.ndarray, "pair"]
    y_source: Float32[np.ndarray, "pair"]

    def of(self, pairs: slice | np.ndarray) -> "Totals":
        """Those of some pairs, by their indices."""
        ids, bases = (tuple(np.array(each, object)[pairs]) for each in (self.pair_ids, self.bases))
        return Totals(ids, bases, *(getattr(self, name)[pairs] for name in TOTALS))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """The effects of one granularity, in units of the metric.

    Attributes:
        granularity: which.
        nie, tie: of every unit in every pair; NaN where there is none, exact or estimated.
        done: what is known of it, a number of `Status`.
        totals: which pairs they are, and what was measured of these.
        coordinates: names of the axes, "pair" first, and what lies along each; see
            `Sizes.coordinates`.
        attributes: what was asked: "metric", "metric_unit", "positions" and "precision".
        scouts: indices of the pairs by which the units of the others were chosen.
    """

    granularity: str
    nie: Float32[np.ndarray, "pair layer *unit"]
    tie: Float32[np.ndarray, "pair layer *unit"]
    done: UInt8[np.ndarray, "pair layer *unit"]
    totals: Totals
    coordinates: dict[str, np.ndarray]
    attributes: dict[str, str]
    scouts: tuple[int, ...] = ()

    @property
    def te(self) -> Float32[np.ndarray, "pair"]:
        """Total effect, Y(x') - Y(x)."""
        return self.totals.te

    @property
    def y_base(self) -> Float32[np.ndarray, "pair"]:
        """Y(x), of the plain run of the base prompt."""
        return self.totals.y_base

    @property
    def y_source(self) -> Float32[np.ndarray, "pair"]:
        """Y(x'), of the plain run of the source prompt."""
        return self.totals.y_source

    def tested(self) -> "Effects":
        """Those of the pairs that had no part in choosing units: means and tests are of them."""
        if not self.scouts:
            return self
        pairs = np.setdiff1d(np.arange(len(self.done)), self.scouts)
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[pairs] for name in _OF_UNITS},
            totals=self.totals.of(pairs),
            coordinates=self.coordinates | {"pair": self.coordinates["pair"][pairs]},
            scouts=(),
        )

    def places(self) -> dict[str, np.ndarray]:
        """Where each unit is; see the function of this name."""
        return places(self.granularity, self.coordinates)

    def to_xarray(self) -> "xarray.Dataset":
        """The effects with names and coordinates for their axes; TE and Y beside them.

        Its variables are nie, tie and done, [pair, layer, ...], and te, y_base and y_source,
        [pair].
        """
        import xarray

        variables = {name: (tuple(self.coordinates), getattr(self, name)) for name in _OF_UNITS}
        variables |= {name: (("pair",), getattr(self, name)) for name in TOTALS}
        return xarray.Dataset(variables, self.coordinates, self.attributes)

    def to_frame(self) -> "pandas.DataFrame":
        """A row for each unit and pair: where it is, nie, tie and done; te, y_base, y_source."""
        return self.to_xarray().to_dataframe().reset_index()

    def __repr__(self) -> str:
        return f"Effects({self.granularity!r}: {self.described()})"

    def described(self) -> str:
        """Axes with their lengths, and how many effects are not exact."""
        counts = [int((self.done == status).sum()) for status in Status]
        return described(self.coordinates, counts)


def described(coordinates: dict[str, np.ndarray], counts: Sequence[int]) -> str:
    """Axes with their lengths, and how many effects are not exact, for people.

    Args:
        coordinates: as `Effects` has them.
        counts: how many effects have each `Status`.
    """
    axes = ", ".join(f"{name} {len(along)}" for name, along in coordinates.items())
    others = [
        f"{count:,} {status.name.lower().replace('_', ' ')}"
        for status, count in zip(Status, counts, strict=True)
        if count and status != Status.EXACT
    ]
    return f"nie, tie [{axes}]" + (f"; {', '.join(others)}" if others else "")


def places(
    granularity: str, coordinates: dict[str, np.ndarray], units: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Where units are: "layer", "site", "unit" and "position", each [unit].

    A unit is a head, (the first of its group) a neuron, or a direction's number; what has no such
    place has -1, and what has no site of its own is named by its granularity.

    Args:
        granularity: of the units.
        coordinates: as `Effects` has them.
        units: indices of the units, counted over all axes; all of them by default.
    """
    axes = {name: along for name, along in coordinates.items() if name != "pair"}
    shape = [len(along) for along in axes.values()]
    units = np.arange(math.prod(shape)) if units is None else units
    at = np.unravel_index(units, shape)
    found = {name: along[index] for (name, along), index in zip(axes.items(), at, strict=True)}
    nowhere = np.full(len(units), -1)
    return {
        "layer": found["layer"],
        "site": found.get("site", np.full(len(units), granularity, object)),
        "unit": next(
            (found[name] for name in ("head", "neuron", "direction") if name in found), nowhere
        ),
        "position": found.get("position", nowhere),
    }


def attributes(run: dict, granularity: str) -> dict[str, str]:
    """What effects say of how they were asked for, out of `run.json`; see `Effects`."""
    asked = {key: str(run.get(key, "")) for key in _ASKED}
    # The token granularity edits every aligned prompt position alone, whatever is asked.
    return asked | ({"positions": "prompt"} if granularity == "token" else {})


def fitted(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A pair's effects in the shape of all pairs': NaN beyond its last position."""
    extra = [(0, full - own) for full, own in zip(shape, values.shape, strict=True)]
    return np.pad(values, extra, constant_values=np.nan)


def statuses(
    granularity: str, nie: np.ndarray, tie: np.ndarray, wanted
) -> UInt8[np.ndarray, "..."]:
    """What is known of one pair's effects, [layer, ...], a number of `Status` each.

    A unit without a finite effect becomes FAILED, unless NOT_RUN or LEFT_OUT is wanted; token
    positions that are NaN in every layer and site lie beyond the pair's length: NOT_RUN, unless
    FAILED or LEFT_OUT is wanted.

    Args:
        granularity: of the effects.
        nie, tie: the effects.
        wanted: what is known of those that are finite, one status for all units or an array.
    """
    none_expected = np.isin(wanted, (Status.NOT_RUN, Status.LEFT_OUT))
    known = (np.isfinite(nie) & np.isfinite(tie)) | none_expected
    done = np.where(known, wanted, Status.FAILED).astype(np.uint8)
    if granularity == "token":
        absent = np.isnan(nie) & np.isnan(tie)
        absent &= ~np.isin(wanted, (Status.FAILED, Status.LEFT_OUT))
        done[..., absent.all(axis=(0, 1))] = Status.NOT_RUN
    return done
