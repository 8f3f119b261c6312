"""Gradient screens: first-order estimates of every unit's effects, and what they may have missed.

For when only the strongest neurons matter. `scores` ranks all neurons by gradient, `select` says
which effects to compute exactly, the strongest by score and an audit sample of all others, and
`missed` turns the exact effects of the sample into an upper confidence bound on how many strong
neurons were never computed. The bound needs no trust in the scores: bad ones make it large. (Kramar
et al., arXiv 2403.00745, bound false negatives by random subsets too, under other assumptions.)

Shapes: L layers, U units of a layer, H of them heads, G groups of adjacent neurons; T padded
positions of a run.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, cost, shard
from jaxmed.engine import runs as engine_runs
from jaxmed.engine.cost import Devices
from jaxmed.engine.propagate import read
from jaxmed.engine.runs import Captured
from jaxmed.question import positions, sites
from jaxmed.question.joined import Joined, Readings
from jaxmed.question.metrics import Metric
from jaxmed.question.positions import Edited
from jaxmed.question.question import Question, check, shapes
from models.decoder import Decoder, Trace
from models.shapes import AnyArray
from models.sites import Site

# Candidates for the `top` strongest effects: so many times `top` of the strongest scores.
MARGIN = 2

AUDIT = 1000  # units of the audit sample, where nothing else is asked

# At most this share of an audit sample goes to the units that come next after the candidates.
CENSUS_SHARE = 1 / 4


def scores(
    decoder: Decoder,
    pair: Pair,
    question: Question,
    *,
    granularity: str = "neuron",
    steps: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """First-order estimates of every unit's NIE and TIE, by gradients.

    With a and a' a unit's values in the base and the source run, summed over the edited positions
    and what the unit is made of (a group's neurons, a head's or a module's numbers),

        NIE ~ (a' - a) dY/da at the base run        TIE ~ (a' - a) dY/da at the source run

    (attribution patching: Nanda 2023; Syed et al., arXiv 2310.10348; Kramar et al., arXiv
    2403.00745). The two are the derivatives of NIE and TIE in how far the patch is made. One
    forward and one backward pass for each term and estimand serve all neurons.

    With `steps` > 1 the gradient is the mean over `steps` midpoints of the straight path between
    the two runs' embeddings (integrated gradients as in EAP-IG: Hanna et al., arXiv 2403.17806).
    NIE's path has the base run's positions, TIE's the source run's; positions without partner keep
    their own embedding. If the prompts are equally long and all of their positions are paired, both
    paths are the same, and so are both estimates: they share out what happens when everything
    changes together, which need not be closer to the effect of one neuron's patch.

    Args:
        decoder: the model.
        pair: the pair.
        question: the metric, the edited positions, the alignment and the size of groups.
        granularity: layer, module, head or neuron.
        steps: points of the path; 1 is the gradient at the plain run.

    Returns:
        Estimated NIE and TIE, each [L], [L, 2], [L, H] or [L, G], in the unit of the metric.

    Raises:
        DataError: the pair does not fit the model or the question.
        ValueError: the granularity is another, or `steps` is not positive.
    """
    (found,) = scores_of_pairs(decoder, [pair], question, granularity=granularity, steps=steps)
    return found


def scores_of_pairs(
    decoder: Decoder,
    pairs: Sequence[Pair],
    question: Question,
    *,
    granularity: str = "neuron",
    steps: int = 1,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`scores` of several pairs, which are spread over the decoder's devices.

    Arguments and errors as of `scores`.
    """
    if granularity in ("token", "direction") or granularity not in sites.SITES:
        raise ValueError(f"there are no gradients of granularity '{granularity}'")
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")
    for pair in pairs:
        check(decoder.config, pair, question, [granularity])
    runs: dict[tuple, list[_Run]] = {}
    for index, pair in enumerate(pairs):
        for term in cost.runs(decoder.config, pair, question):
            for swapped in (False, True):
                runs.setdefault(term.alike(), []).append(_Run(index, term, swapped))
    found = [
        np.zeros((2, *shapes(decoder.config, p, question, [granularity])[granularity]))
        for p in pairs
    ]
    with jax.default_matmul_precision("float32"):
        captured = engine_runs.captured(decoder, pairs, question)
        for alike in runs.values():
            filled = alike + alike[-1:] * (Devices.of(decoder.mesh).filled(len(alike)) - len(alike))
            slopes = unit_slopes(
                decoder,
                captured.traces,
                *_given(captured, filled, question),
                steps,
                granularity=granularity,
                metric=question.metric,
                group_size=question.group_size,
            )
            for run, of_run in zip(alike, np.asarray(slopes), strict=False):
                # TIE = Y(x') - Y(x', Z<-Z(x)): the patch is made in the source run, counted down.
                side, sign = (1, -1) if run.swapped else (0, 1)
                found[run.pair][side] += sign * of_run.reshape(found[run.pair][side].shape)
    return [(nie, tie) for nie, tie in found]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run whose gradient is taken.

    Attributes:
        pair: which of the pairs.
        term: what is read of it.
        swapped: whether it is the source run.
    """

    pair: int
    term: Joined
    swapped: bool


def _given(captured: Captured, runs: Sequence[_Run], question: Question) -> tuple:
    """What `unit_slopes` is given of these runs, from `base` to `last_prompts`."""
    length = captured.traces.positions.shape[-1]

    def rows(edited: Edited, swapped: bool) -> tuple[np.ndarray, ...]:
        return capture.edited_rows(edited.swapped() if swapped else edited, 0, length)

    patched, paired = [], []
    for run in runs:
        pair, response = captured.pairs[run.pair], len(run.term.response)
        edited = positions.edited(pair, question.positions, question.align, response)
        patched.append(rows(edited, run.swapped))
        every = positions.edited(pair, positions.Positions.PROMPT, question.align)
        paired.append(rows(every, run.swapped))
    base, source = (
        np.array([captured.place(run.pair, run.swapped ^ other, run.term) for run in runs])
        for other in (False, True)
    )
    return (
        base,
        source,
        tuple(map(np.stack, zip(*patched, strict=True))),
        tuple(map(np.stack, zip(*paired, strict=True))),
        engine_runs.stacked([run.term.reading for run in runs]),
        np.array([captured.last_prompt(run.pair, run.swapped) for run in runs]),
    )


# The positions of a run, those of the other run that they take their values from, and which of them
# are edited.
_Rows = tuple[Int[AnyArray, "R T"], Int[AnyArray, "R T"], Bool[AnyArray, "R T"]]


@functools.partial(jax.jit, static_argnames=("granularity", "metric", "group_size"))
def unit_slopes(
    decoder: Decoder,
    traces: Trace,
    base: Int[AnyArray, "R"],
    source: Int[AnyArray, "R"],
    edited: _Rows,
    paired: _Rows,
    readings: Readings,
    last_prompts: Int[AnyArray, "R"],
    steps: Int[Array, ""] | int,
    granularity: str,
    metric: Metric,
    group_size: int,
) -> Float[Array, "R L U"]:
    """d/ds of Y with s * change added to one unit alone, at s = 0, in each of several runs.

    Units follow in the order of `Site`. The mean over runs whose embeddings lie at the midpoints of
    so many steps along the path to those of the other run, or with a single step, at its start. How
    many is known at run time only, so that one compilation serves all. The derivative is taken in s
    and not in the activations: no gradient [L, T, I] is stored.

    Args:
        decoder: the model.
        traces: captured runs.
        base, source: which of them each run is, and which the one whose values are put in.
        edited: where.
        paired: the positions whose embeddings have a path.
        readings, last_prompts: what is read of each run.
        steps: points of the path.
        granularity: of the units.
        metric, group_size: of the question.
    """

    def step(decoder, traces, steps, *given):
        def of_run(given):
            base, source, edited, paired, reading, last_prompt = given
            before, after = (
                jax.tree.map(lambda stacked, run=run: stacked[run], traces)
                for run in (base, source)
            )
            changes = {
                site: capture.site_difference(before, after, site, *edited)
                for site in sites.SITES[granularity]
            }
            path = capture.site_difference(before, after, Site.EMBEDDING, *paired)[0]
            return _slopes(
                *(decoder, before, changes, path, steps, reading, last_prompt),
                *(metric, group_size),
            )

        return jax.lax.map(of_run, given)

    own = shard.rows(0)
    return shard.over(
        step,
        decoder,
        *(traces, steps, base, source, edited, paired, readings, last_prompts),
        given=(shard.WHOLE, shard.WHOLE, *(own,) * 6),
        gives=own,
    )


def _slopes(
    decoder: Decoder,
    trace: Trace,
    changes: dict[Site, Float[Array, "L T ..."]],
    path: Float[Array, "T d"],
    steps: Int[Array, ""] | int,
    reading: Readings,
    last_prompt: Int[Array, ""],
    metric: Metric,
    group_size: int,
) -> Float[Array, "L U"]:
    """Of one run.

    Args:
        decoder: the model.
        trace: the run.
        changes: of the sites' values, 0 where not edited.
        path: from the run's embeddings to the other run's.
        steps, reading, last_prompt, metric, group_size: as of `unit_slopes`.
    """
    at = decoder.span(trace.positions, trace.valid, trace.branches)
    units = {
        Site.NEURON: sites.group_count(decoder.config, group_size),
        Site.HEAD: decoder.config.num_heads,
    }

    def moved(of_layer, site, value):
        extent, change = of_layer
        if site not in change:
            return value
        return value + _spread(extent[site], site, group_size, value) * change[site]

    def y(extents, embedding):
        layers = (extents, changes)
        residual, _ = decoder.run_blocks(embedding, at, moved, layers=layers, recomputed=True)
        return read(decoder, metric, residual, reading, last_prompt)

    nothing = {
        site: jnp.zeros((change.shape[0], units.get(site, 1)), change.dtype)
        for site, change in changes.items()
    }

    embedding = capture.kept(trace, "embedding")

    def add(step, total):
        fraction = jnp.where(steps > 1, (step + 0.5) / steps, 0).astype(path.dtype)
        slopes = jax.grad(y)(nothing, embedding + fraction * path)
        return jax.tree.map(jnp.add, total, slopes)

    total = jax.lax.fori_loop(0, steps, add, nothing)
    return jnp.concatenate([total[site] for site in Site if site in total], axis=1) / steps


def _spread(extent: Float[Array, "U"], site: Site, group_size: int, value: Float[Array, "T ..."]):
    """How far each number of a site's value is changed, from how far each unit is."""
    if site == Site.NEURON:
        return jnp.repeat(extent, group_size)[: value.shape[-1]]
    return extent[:, None] if site == Site.HEAD else extent


@dataclasses.dataclass(frozen=True)
class Selection:
    """Whose effects are computed exactly.

    Attributes:
        candidates: the units of the strongest scores.
        sampled: the audit sample, drawn from all other units.
        stratum: -1 for candidates, else the number of the unit's stratum, from 0; within a stratum
            every unit has the same chance to be sampled.
    """

    candidates: Bool[np.ndarray, "L G"]
    sampled: Bool[np.ndarray, "L G"]
    stratum: Int[np.ndarray, "L G"]

    @property
    def computed(self) -> Bool[np.ndarray, "L G"]:
        """The units whose effects are to be computed."""
        return self.candidates | self.sampled


def select(
    scores: Float[np.ndarray, "L G"], top: int, audit: int, seed: int, strata: int = 3
) -> Selection:
    """The candidates for the strongest effects, and an audit sample of all other units.

    The candidates are the `MARGIN * top` units of largest absolute score, so that near ties at the
    `top`-th place are found. The other units, by falling absolute score, make up the strata: first
    as many as there are candidates, but at most `CENSUS_SHARE` of the audit, which are all sampled
    (a census); the remaining strata end at ranks that grow geometrically, and are sampled without
    replacement, all at the same rate. With one stratum there is no census.

    Args:
        scores: estimated effects, of one estimand or of the larger of both.
        top: how many of the strongest effects are wanted.
        audit: size of the sample; all other units if there are no more than that.
        seed: of the sample.
        strata: number of strata, at most; there are fewer where there are too few units.

    Raises:
        ValueError: `top` or `strata` is not positive, or `audit` is negative.
    """
    if top < 1 or audit < 0 or strata < 1:
        raise ValueError(f"top={top} and strata={strata} must be positive, audit={audit} not less")
    flat = np.abs(np.asarray(scores, np.float64)).reshape(-1)
    # A score that is not a number says nothing: its unit is computed.
    order = np.argsort(-np.where(np.isnan(flat), np.inf, flat), kind="stable")
    count = min(MARGIN * top, len(order))
    rest = len(order) - count
    audit = min(audit, rest)
    sizes = _stratum_sizes(rest, count, audit, strata)
    census = strata > 1
    samples = sizes[:census] + _shares(audit - sum(sizes[:census]), sizes[census:])

    generator = np.random.default_rng(seed)
    stratum = np.full(len(order), -1)
    sampled = np.zeros(len(order), bool)
    start = count
    for number, (size, sample) in enumerate(zip(sizes, samples, strict=True)):
        members = order[start : start + size]
        stratum[members] = number
        sampled[generator.choice(members, sample, replace=False)] = True
        start += size
    candidates = np.zeros(len(order), bool)
    candidates[order[:count]] = True
    shape = np.shape(scores)
    return Selection(
        candidates=candidates.reshape(shape),
        sampled=sampled.reshape(shape),
        stratum=stratum.reshape(shape),
    )


def _stratum_sizes(rest: int, candidates: int, audit: int, strata: int) -> list[int]:
    """Sizes of the strata; they sum to `rest`."""
    if strata == 1:
        return [rest]
    census = min(candidates, rest, rest if audit == rest else int(CENSUS_SHARE * audit))
    first = candidates + census
    growth = ((candidates + rest) / first) ** (1 / (strata - 1))
    ends = [round(first * growth**power) for power in range(strata - 1)] + [candidates + rest]
    return [census, *np.diff(ends).tolist()]


def _shares(total: int, sizes: list[int]) -> list[int]:
    """The total, shared out in proportion to the sizes (largest remainders)."""
    exact = total * np.array(sizes) / max(1, sum(sizes))
    shares = np.floor(exact).astype(int)
    remainders = np.argsort(shares - exact, kind="stable")
    shares[remainders[: total - shares.sum()]] += 1
    return shares.tolist()
