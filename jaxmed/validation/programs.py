"""All programs that are compiled for a model and a pair, found from shapes: no weight is made.

The steps of a scan, of screening, joint sets, generation and judging are traced one after another
with shapes for arrays. Each compiled function that a step calls is a program; what it gives are
the shapes that the next step takes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jaxpr_lib
from jax.sharding import Mesh, PartitionSpec

from jaxmed.analysis import screening
from jaxmed.behaviour import batches, generation, likelihood
from jaxmed.behaviour.judges import model as judging
from jaxmed.behaviour.sampling import Choice, Sampling
from jaxmed.data.pairs import Pair
from jaxmed.engine import blocks, capture, cost, plan, propagate, runs
from jaxmed.engine.cost import Batching, Devices
from jaxmed.engine.plan import Work
from jaxmed.question import directions as directions_lib
from jaxmed.question.directions import Directions, SiteDirections
from jaxmed.question.joined import Joined
from jaxmed.question.question import Question
from jaxmed.question.sites import SITES
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Hold
from models.sites import Site

_PRECISION = "float32"  # of products that are not with a difference
_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a program that carries differences is given.

    Attributes:
        batches, rows: of a chunk, and of a batch, those of all runs; on each device.
        positions: of the span.
        prefix: positions before it, padding included.
    """

    batches: int
    rows: int
    positions: int
    prefix: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A function that is compiled as one.

    Attributes:
        name: of the function.
        what: what it is compiled for, where there are several: a site, a span.
        function: it, of the arrays that it takes.
        arguments: their shapes and types.
        donated: places of the arguments whose memory it takes for what it gives.
        text: what it computes: programs of equal text are the same one.
        carried: of `carry`, what it is given.
        places: how its arguments are spread over a mesh; nothing where there is none.
    """

    name: str
    what: str
    text: str
    function: Callable
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    donated: tuple[int, ...]
    carried: Carried | None = None
    places: tuple[PartitionSpec, ...] = ()


class Recorder:
    """Follows steps by their shapes, and keeps the programs that they call, each once.

    Attributes:
        programs: they, in the order in which they are called first.
    """

    def __init__(self):
        self._found: dict[tuple[str, str], Program] = {}

    @property
    def programs(self) -> list[Program]:
        """Those that were called."""
        return list(self._found.values())

    def __call__(
        self, what: str, step: Callable, *arguments, carried: Carried | None = None
    ) -> Any:
        """The shapes of what a step gives.

        Args:
            what: what its programs are compiled for, where they are for several.
            step: what is done with arrays like `arguments`.
            arguments: trees of arrays or of their shapes.
            carried: as in `Program`.
        """
        with jax.default_matmul_precision(_PRECISION):
            traced, shapes = jax.make_jaxpr(step, return_shape=True)(*arguments)
        for equation in traced.jaxpr.eqns:
            if equation.primitive.name != "jit":
                continue
            inner, name = equation.params["jaxpr"], equation.params["name"].lstrip("_")
            donated = equation.params["donated_invars"]
            places = _places(inner.jaxpr)
            program = Program(
                name=name,
                what=what,
                text=str(inner),
                function=jaxpr_lib.jaxpr_as_fun(inner),
                arguments=tuple(_shape(value) for value in inner.in_avals),
                donated=tuple(place for place, given in enumerate(donated) if given),
                carried=carried,
                places=tuple(places.get(given, PartitionSpec()) for given in inner.jaxpr.invars),
            )
            self._found.setdefault((name, program.text), program)
        return shapes


def _shape(value) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _places(jaxpr: jaxpr_lib.Jaxpr) -> dict[jaxpr_lib.Var, PartitionSpec]:
    """Of what a function is given, how that which it spreads over a mesh is spread."""
    found: dict[jaxpr_lib.Var, PartitionSpec] = {}
    for equation in reversed(jaxpr.eqns):
        given: list[PartitionSpec | None] = [None] * len(equation.invars)
        if equation.primitive.name == "shard_map":
            given = list(equation.params["in_specs"])
        elif equation.primitive.name == "jit":
            inner = equation.params["jaxpr"].jaxpr
            given = list(map(_places(inner).get, inner.invars))
        elif equation.primitive.name == "squeeze" and equation.outvars[0] in found:
            given = [PartitionSpec(None, *found[equation.outvars[0]])]  # of its first axis
        for variable, spec in zip(equation.invars, given, strict=True):
            if spec is not None and isinstance(variable, jaxpr_lib.Var):
                found[variable] = spec
    return found


def shapes_of(config: DecoderConfig, mesh: Mesh | None = None) -> Decoder:
    """A decoder that has shapes for weights, on a mesh or on one device."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    decoder.mesh = mesh
    return decoder


def directions(config: DecoderConfig) -> Directions:
    """One direction of every site in every layer."""
    sites = [site for site in Site if site != Site.EMBEDDING]
    layers = np.arange(config.num_layers, dtype=np.int32)

    def of_site(site: Site) -> SiteDirections:
        size = directions_lib.site_size(config, site)
        vectors = np.zeros((len(layers), size), np.float32)
        vectors[:, 0] = 1
        return SiteDirections(layers, np.zeros_like(layers), vectors)

    given = np.ones((config.num_layers, len(sites), 1), bool)
    return Directions(tuple(sites), tuple(map(of_site, sites)), given, hash="")


def of_scan(
    record: Recorder,
    decoder: Decoder,
    pair: Pair,
    question: Question,
    granularities: Iterable[str],
    *,
    batching: Callable[[Work, Joined, int], Batching],
) -> None:
    """The programs of a scan of a pair, in the order in which `engine.scan` calls them.

    Args:
        record: keeps them.
        decoder: as `shapes_of` gives it.
        pair, question, granularities: as in `engine.scan.scan_pair`. Prompts of
            one length: both estimands then go through together.
        batching: the sizes of batches for a piece of work that is done in so many runs.
    """
    terms = cost.runs(decoder.config, pair, question)
    traces = _captured(record, decoder, pair, terms)
    for alike in _alike(terms):
        which = np.zeros(2 * len(alike), np.int32)
        record(
            question.metric.name,
            lambda decoder, traces, which, readings, last: runs.plain_values(
                decoder, traces, which, readings, last, question.metric
            ),
            *(decoder, traces, which, runs.stacked([t.reading for t in alike * 2]), which),
        )
    seen = set()
    for granularity in granularities:
        for group in blocks.groups(decoder.config, [pair], question, granularity, [{}]):
            sizes = batching(group[0].works[0], group[0].term, len(group))
            for works in zip(*(run.works for run in group[: sizes.runs]), strict=True):
                kind = (works[0].site, works[0].start, works[0].size, sizes)
                kind += (None if works[0].vectors is None else len(works[0].vectors),)
                kind += group[0].term.alike()
                if kind not in seen:
                    seen.add(kind)
                    _of_works(record, decoder, traces, group[0].term, question, works, sizes)


def _captured(record: Recorder, decoder: Decoder, pair: Pair, terms: Sequence[Joined]) -> Any:
    """The runs of both prompts with what is read after them."""
    kept, devices = 2 * len(terms), Devices.of(decoder.mesh)
    count = devices.filled(kept)
    length = len(pair.prompt_ids) + max(len(t.response) for t in terms)
    length = capture.run_length(length)
    own = count // devices.number
    at_once = min(own, cost.captured_at_once(length, decoder.products.platform))
    tokens = np.zeros((count, length), np.int32)
    branches = tokens if any(term.branches for term in terms) else None
    traces = record(
        f"{count} of {length} tokens",
        lambda decoder, tokens, valid, branches: runs.capture(
            decoder, tokens, valid, branches, at_once
        ),
        *(decoder, tokens, tokens == 0, branches),
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((kept, *x.shape[1:]), x.dtype), traces)


def _alike(terms: Iterable[Joined]) -> list[list[Joined]]:
    """The runs of a metric, with those together that are read by one program."""
    found: dict[tuple, list[Joined]] = {}
    for term in terms:
        found.setdefault(term.alike(), []).append(term)
    return list(found.values())


def _of_works(
    record: Recorder,
    decoder: Decoder,
    traces: Any,
    term: Joined,
    question: Question,
    works: Sequence[Work],
    sizes: Batching,
) -> None:
    """The programs of a site's units in runs that go through together."""
    work, n, rows = works[0], sizes.batches, sizes.rows
    site, start, size = work.site, work.start, work.size
    span = f"{sizes.runs} runs, {size} of {start + size} positions"
    which = np.zeros(sizes.runs, np.int32)
    prefix_size = capture.prefix_length(start)
    frames = record(
        span,
        lambda decoder, traces, which: runs.frames(
            decoder, traces, which, which, size, prefix_size
        ),
        *(decoder, traces, which),
    )
    at = np.zeros((sizes.runs, size), np.int32)
    changes = record(
        f"{site}, {span}",
        lambda traces, which, at: runs.changes(traces, which, which, site, at, at, at == 0),
        *(traces, which, at),
    )
    written = None
    if propagate.goes_through_norm(decoder.config, site):
        written = record(
            f"{site}, {span}",
            lambda decoder, traces, which: runs.writes(decoder, traces, which, which, site, size),
            *(decoder, traces, which),
        )
    units, _ = blocks.merged([*works, *[works[-1]] * (sizes.runs - len(works))])
    part = next(units.chunks(n, rows, decoder.config.num_layers))
    chunk = f"{n} x {rows} rows, {span}"
    if work.vectors is None:
        entering = record(
            f"{site}, {chunk}",
            lambda decoder, changes, written, *units: runs.enter(
                decoder, changes, written, *units, site, question.group_size
            ),
            *(decoder, changes, written, part.layers, part.units, part.positions),
        )
    else:
        vectors = work.vectors
        along, added = record(
            f"{site}, {span}",
            lambda decoder, change: propagate.direction_writes(
                decoder, change, site, units, vectors
            ),
            *(decoder, jax.ShapeDtypeStruct(changes.shape[1:], changes.dtype)),
        )
        along = jax.ShapeDtypeStruct((sizes.runs, *along.shape), along.dtype)
        entering = record(
            f"{site}, {chunk}",
            lambda decoder, along, added, written, *units: runs.enter_directions(
                decoder, along, added, written, *units, site
            ),
            *(decoder, along, added, written, part.layers, part.units, part.positions),
        )
    stages = plan.stage(decoder.config, site, part.layers)
    to_carry = propagate.blocks_to_carry(decoder.config, size, term.reading)
    carried = record(
        chunk,
        runs.carry,
        *(decoder, frames, stages, entering, to_carry),
        carried=Carried(n, sizes.runs * rows // Devices.of(decoder.mesh).number, size, prefix_size),
    )
    record(
        f"{question.metric.name}, {chunk}",
        lambda decoder, frames, stages, carried, readings, last: runs.read_changes(
            *(decoder, frames, stages, carried, readings, last),
            *(question.metric, term.whole_vocabulary),
        ),
        *(decoder, frames, stages, carried, runs.stacked([term.reading] * sizes.runs), which),
    )


def of_gradients(record: Recorder, decoder: Decoder, pair: Pair, question: Question) -> None:
    """The programs of screening, for every granularity that has gradients."""
    term = cost.runs(decoder.config, pair, question)[0]
    traces = _captured(record, decoder, pair, [term])
    count = Devices.of(decoder.mesh).filled(2)
    which, at = np.zeros(count, np.int32), np.zeros((count, traces.positions.shape[1]), np.int32)
    rows = at, at, at == 0
    for granularity in SITES:
        if granularity in ("token", "direction"):
            continue
        record(
            granularity,
            lambda *given, granularity=granularity: screening.unit_slopes(
                *given,
                granularity=granularity,
                metric=question.metric,
                group_size=question.group_size,
            ),
            *(decoder, traces, which, which, rows, rows),
            *(runs.stacked([term.reading] * count), which, 1),
        )


def of_joint_sets(record: Recorder, decoder: Decoder, pair: Pair, question: Question) -> None:
    """The programs of joint sets, two at once or one on each device, that a scan does not have."""
    config, term = decoder.config, cost.runs(decoder.config, pair, question)[0]
    (work,) = plan.plan(config, pair, term, question, ["neuron"], False)
    tokens, size = pair.prompt_ids + term.response, work.size
    branches = term.branches_after(pair.prompt_ids)
    trace = record("", lambda decoder: capture.capture(decoder, tokens, branches), decoder)
    frame = record(
        "",
        lambda decoder, trace: capture.frame(
            decoder, trace, work.start, size, capture.prefix_length(work.start)
        ),
        *(decoder, trace),
    )
    dtype = decoder.compute_dtype
    change = jax.ShapeDtypeStruct((config.num_layers, size, config.intermediate_size), dtype)
    count = Devices.of(decoder.mesh).filled(2)
    members = np.zeros((1, count, config.num_layers, config.intermediate_size), bool)
    forced = change, np.zeros(size, bool), members
    stages = plan.reader(config, np.zeros((1, count), np.int32))
    what = f"{count} sets of neurons"
    carried = record(
        what,
        lambda decoder, frame, stages, entering, blocks, *forced: propagate.carry(
            decoder, frame, stages, entering, blocks, propagate.Forced(*forced)
        ),
        *(decoder, frame, stages, np.zeros((1, size, count, config.hidden_size), dtype)),
        *(propagate.blocks_to_carry(config, size, term.reading), *forced),
    )
    record(
        what,
        lambda decoder, frame, stages, carried, reading, last, *forced: propagate.read_changes(
            *(decoder, frame, stages, carried, reading, last),
            *(question.metric, term.whole_vocabulary, propagate.Forced(*forced)),
        ),
        *(decoder, frame, stages, carried, term.reading),
        *(len(pair.prompt_ids) - 1 - work.start, *forced),
    )


def of_answers(
    record: Recorder, decoder: Decoder, pair: Pair, rows: Callable[[int, int], int]
) -> None:
    """The programs of generation, of what a response's probabilities are, and of a judge's answer;
    plain, and under a hold on every neuron.

    Args:
        record, decoder: as in `of_scan`.
        pair: its prompt is answered.
        rows: of a batch, from the padded length of its prompts and the room for new tokens.
    """
    config, prompt = decoder.config, pair.prompt_ids
    length, room = batches.padded_length(prompt), batches.room_for(_NEW_TOKENS)
    count = rows(length, room)
    tokens, lengths = np.zeros((count, length), np.int32), np.full(count, len(prompt), np.int32)
    targets = np.zeros((count, room), np.int32)
    devices = Devices.of(decoder.mesh).number
    layers, own = decoder.blocks, count // devices
    together = cost.prompts_together(length, own, decoder.products.platform)
    groups = -(-own // together)
    prompts = {"tokens": tokens, "lengths": lengths, "count": np.full(devices, own, np.int32)}
    prompts |= {"fresh": np.tile(np.arange(groups * together, dtype=np.int32), (devices, 1))}
    answers = {"lengths": lengths, "seeds": np.zeros(count, np.uint32)}
    answers |= {"choice": Choice.of(Sampling()), "is_stop": np.zeros(config.vocab_size, bool)}
    answers |= dict.fromkeys(("max_tokens", "most_steps", "most_ended"), np.int32(room))

    def begin(decoder, layers, holds, given):
        empty = generation.empty(
            decoder,
            layers,
            rows=count,
            length=length,
            room=room,
            kept_as=jnp.dtype(decoder.compute_dtype),
        )
        return generation.fill(decoder, layers, holds, empty, together=together, **given)

    def go_on(decoder, layers, holds, rows, given):
        return generation.advance(decoder, layers, holds, rows, **given)

    of_neurons = np.ones((config.num_layers, config.intermediate_size), np.float32)
    held = [Hold.affine("neuron", of_neurons, of_neurons)]
    for name, holds in (("plain", []), ("with a hold", held)):
        what = f"{name}, {count} rows of {length} tokens"
        rows_begun = record(what, begin, decoder, layers, holds, prompts)
        record(f"{what}, {room} new", go_on, decoder, layers, holds, rows_begun, answers)
        for read in (likelihood.response_logprobs, likelihood.response_divergences):
            record(what, read, decoder, holds, tokens, lengths, lengths, targets)
    if decoder.mesh is not None:
        return  # A judge has one device.
    record(
        f"{count} rows of {length} tokens",
        judging.answer_log_probabilities,
        *(decoder, tokens, tokens == 0, lengths[:, None] - 1, np.arange(2)),
    )
