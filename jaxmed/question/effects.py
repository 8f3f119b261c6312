"""What every effect looks like: arrays by granularity, and their sizes."""

import dataclasses

import numpy as np

from jaxmed.question.sites import MODULE_SITES, TOKEN_SITES

ESTIMANDS = ("nie", "tie")  # of every unit; in this order wherever both stand beside each other


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
class Effects:
    """Effects of one granularity.

    Attributes:
        nie, tie: [pair, layer, ...] float32, as in the results' files.
        te, y_base, y_source: [pair] float32.
    """

    nie: np.ndarray
    tie: np.ndarray
    y_base: np.ndarray
    y_source: np.ndarray

    @property
    def te(self) -> np.ndarray:
        """Total effect, Y(x') - Y(x)."""
        return self.y_source - self.y_base


def stack(effects: list[np.ndarray]) -> np.ndarray:
    """Pairs' effects as one array, float32; NaN beyond a pair's last position."""
    size = max(effect.shape[-1] for effect in effects)
    padded = [
        np.pad(
            effect,
            [(0, 0)] * (effect.ndim - 1) + [(0, size - effect.shape[-1])],
            constant_values=np.nan,
        )
        for effect in effects
    ]
    return np.stack(padded).astype(np.float32)


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

    def shape(self, granularity: str) -> tuple[int, ...]:
        """The shape of one pair's effects; its first axis is the layer."""
        return {
            "layer": (self.layers,),
            "module": (self.layers, len(MODULE_SITES)),
            "head": (self.layers, self.heads),
            "token": (self.layers, len(TOKEN_SITES), self.positions),
            "neuron": (self.layers, self.neurons),
            "direction": (self.layers, len(self.sites), self.directions),
        }[granularity]
