"""Effects a few layers at a time: those of all layers of a large run do not fit the memory."""

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmed.analysis import statistics
from jaxmed.question.effects import ESTIMANDS, Effects, Status
from jaxmed.store.results import Indices, Results

# Effects of one estimand that are held at once: 256 MiB, and some copies of them.
_EFFECTS_AT_ONCE = 2**26


def slabs(
    found: Mapping[str, Effects], granularity: str, layers: Collection[int] | None = None
) -> Iterator[Effects]:
    """All effects of a granularity, those of some layers after those of others, of the pairs that
    its units are tested on (`Results.tested`).

    Of a results folder no more is read at a time than is given; layers that are stored together
    are read together where they fit.

    Args:
        found: the effects by granularity, of a scan in memory or of a results folder.
        granularity: which.
        layers: those that are wanted; slabs that have none of them are passed over.
    """
    if isinstance(found, Results):
        shape = len(found.pair_ids), *found.sizes.shape(granularity)
        pairs = found.tested(granularity)
        for part in _parts(shape, found.layers_together(granularity)):
            if layers is None or any(part.start <= layer < part.stop for layer in layers):
                yield found.of_layers(granularity, part, pairs)
    else:
        yield found[granularity].tested()


def mean_effects(
    results: Results, granularity: str, pairs: Indices | None = None
) -> tuple[Float[np.ndarray, "layer *unit"], Float[np.ndarray, "layer *unit"]]:
    """Mean NIE and TIE of each unit over pairs, of exact effects alone; NaN where there is none.

    Args:
        results: the run.
        granularity: of the units.
        pairs: whose mean it is; by default those that the units are tested on.
    """
    pairs = results.tested(granularity) if pairs is None else pairs
    means = {name: [] for name in ESTIMANDS}
    shape = len(np.arange(len(results.pair_ids))[pairs]), *results.sizes.shape(granularity)
    for part in _parts(shape, results.layers_together(granularity)):
        effects = results.effects(granularity, exact=True, layers=part, pairs=pairs)
        for name, values in zip(ESTIMANDS, effects, strict=True):
            means[name].append(statistics.pair_mean(values))
    nie, tie = (np.concatenate(each) for each in means.values())
    return nie, tie


def mean_estimates(
    results: Results,
) -> tuple[Float[np.ndarray, "layer neuron"], Float[np.ndarray, "layer neuron"]]:
    """Mean estimated NIE and TIE of each neuron over pairs; NaN where there is none."""
    shape = results.sizes.shape("neuron")
    totals, counts = np.zeros((2, *shape)), np.zeros((2, *shape), np.int32)
    for pair in range(len(results.pair_ids)):
        for total, count, values in zip(totals, counts, results.estimates(pair), strict=True):
            missing = np.isnan(values)
            total += np.where(missing, 0, values)
            count += ~missing
    with np.errstate(invalid="ignore"):
        nie, tie = totals / counts
    return nie, tie


def statuses(
    results: Results, granularity: str
) -> tuple[Int[np.ndarray, "status"], Bool[np.ndarray, "pair"]]:
    """How many effects have each `Status`, and which pairs have an effect that was run."""
    counts, begun = np.zeros(len(Status), np.int64), np.zeros(len(results.pair_ids), bool)
    shape = len(begun), *results.sizes.shape(granularity)
    for part in _parts(shape, results.layers_together(granularity)):
        done = results.done(granularity, layers=part)
        counts += [np.count_nonzero(done == status) for status in Status]
        begun |= (done != Status.NOT_RUN).any(axis=tuple(range(1, done.ndim)))
    return counts, begun


def _parts(shape: tuple[int, ...], together: int) -> Iterator[slice]:
    """Ranges of layers whose effects are held at once.

    Args:
        shape: of all effects of an estimand, [pair, layer, ...].
        together: layers that are stored in one piece.
    """
    pairs, layers, *units = shape
    fit = max(1, _EFFECTS_AT_ONCE // max(1, pairs * math.prod(units)))
    step = together * max(1, fit // together)
    while step > fit:  # one piece alone does not fit: halves of it, and of these
        step = (step + 1) // 2
    for start in range(0, layers, step):
        yield slice(start, min(start + step, layers))
