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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.data.pairs import Pair
from jaxmed.engine import capture, shard
from jaxmed.engine.propagate import read
from jaxmed.engine.scan import Run, pair_effects
from jaxmed.question import positions, sites
from jaxmed.question.joined import Joined, Readings
from jaxmed.question.metrics import Metric
from jaxmed.question.positions import Edited
from jaxmed.question.question import Question, shapes
from models.decoder import Decoder, Trace
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
    if granularity in ("token", "direction") or granularity not in sites.SITES:
        raise ValueError(f"there are no gradients of granularity '{granularity}'")
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")

    def evaluate(base: Run, source: Run, term: Joined, swapped: bool):
        edited = positions.edited(pair, question.positions, question.align, len(term.response))
        found = unit_slopes(
            decoder,
            base.trace,
            {
                site: _change(base.trace, source.trace, site, edited, swapped)
                for site in sites.SITES[granularity]
            },
            _path(pair, base.trace, source.trace, question, swapped),
            steps,
            term.reading,
            base.prompt_length - 1,
            metric=question.metric,
            group_size=question.group_size,
        )
        yield granularity, ..., np.asarray(found).reshape(result_shapes[granularity])

    result_shapes = shapes(decoder.config, pair, question, [granularity])
    with jax.default_matmul_precision("float32"):
        found = pair_effects(decoder, pair, question, result_shapes, evaluate)
    return found.nie[granularity], found.tie[granularity]


def _change(
    base: Trace, source: Trace, site: Site, edited: Edited, swapped: bool
) -> Float[Array, "L T ..."]:
    """Source value minus base value of a site at all of the run's positions; 0 unless edited."""
    edited = edited.swapped() if swapped else edited
    return capture.edited_difference(base, source, site, edited, 0, len(base.positions))


def _path(
    pair: Pair, base: Trace, source: Trace, question: Question, swapped: bool
) -> Float[Array, "T d"]:
    """From the base run's embeddings to the source run's, at the positions that are paired."""
    paired = positions.edited(pair, positions.Positions.PROMPT, question.align)
    return _change(base, source, Site.EMBEDDING, paired, swapped)[0]


@functools.partial(jax.jit, static_argnames=("metric", "group_size"))
def unit_slopes(
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
    """d/ds of Y with s * change added to one unit alone, at s = 0.

    The changes are those of one granularity's sites; units follow in the order of `Site`. The mean
    over runs whose embeddings lie at the midpoints of so many steps along the path from those of
    `trace`, or with a single step, at its start. How many is known at run time only, so that one
    compilation serves all. The derivative is taken in s and not in the activations: no gradient
    [L, T, I] is stored.
    """

    def step(decoder, trace, changes, path, steps, reading, last_prompt):
        return _slopes(
            *(decoder, trace, changes, path, steps, reading, last_prompt),
            *(metric, group_size),
        )

    return shard.over(
        step,
        decoder,
        *(trace, changes, path, steps, reading, last_prompt),
        given=(shard.WHOLE,) * 6,
        gives=shard.WHOLE,
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
    """`unit_slopes` on one device."""
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
