"""Programs compiled for TPUs that are not there, and where the compiler expects the cycles to go.

libtpu, a wheel (the extra `tpu`), has the compiler; `jax.experimental.topologies` names the chips.
Nothing is run on a TPU, none is looked for, and no weight is made.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxmed.engine import blocks, cost, memory, propagate
from jaxmed.engine.cost import Batching, Devices
from jaxmed.engine.plan import Work
from jaxmed.question.joined import Joined
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.question import Question
from jaxmed.validation import presets, programs
from jaxmed.validation.compiled import Exchange, Text
from jaxmed.validation.programs import Carried, Program, Recorder
from models import placement
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import InputError

_GIB = 2**30
# Memory of one device of a kind, in GiB, by the makers' data sheets.
_MEMORY_GIB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
# libtpu asks the first of the machine, and a metadata server, unless they are said; and without the
# last one process alone may load it.
_NOT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# What carries differences through a block, as `propagate.carry` names it, and for people.
_HALVES = {"attend": "attention", "feed": "MLP", "both": "block"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip that programs are compiled for.

    Attributes:
        topology: of what it is one, as v5e:2x2.
        kind: JAX's name of it.
        memory: bytes that it has; None where that is not known.
        there: it, as where arrays are.
        mesh: chips over which rows are spread, of which it is one; None for it alone.
    """

    topology: str
    kind: str
    memory: int | None
    there: SingleDeviceSharding = dataclasses.field(repr=False, compare=False)
    mesh: Mesh | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def devices(self) -> Devices:
        """Over which rows are spread."""
        return Devices.of(self.mesh)

    def place(self, program: Program) -> list[jax.ShapeDtypeStruct]:
        """What a program is given, where it lies."""
        shardings = [self.there] * len(program.arguments)
        if self.mesh is not None:
            shardings = [NamedSharding(self.mesh, spec) for spec in program.places]
        return [
            jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=sharding)
            for given, sharding in zip(program.arguments, shardings, strict=True)
        ]


def chip(topology: str, mesh: tuple[int, int] = (1, 1)) -> Chip:
    """One chip of a topology, or of several that share the work.

    JAX is told to run on the CPU, so that libtpu, now that it is there, is not asked for a TPU; and
    to keep no compiled program: it could not read one for a chip that is not there.

    Args:
        topology: kind and shape, as v5e:2x2, v6e:2x4, v5p:2x2x1.
        mesh: chips along `sweep` and `model`; the first of the topology.

    Raises:
        InputError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("to compile for a TPU takes libtpu: pip install 'jaxmed[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks once whether it is used
    for name, value in _NOT_A_TPU.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"compile_for={topology}: not a topology that libtpu knows, as v5e:2x2, v6e:2x4 or "
            f"v5p:2x2x1 are ({reason})"
        ) from error
    device = found.devices[0]
    gib = _MEMORY_GIB.get(device.device_kind)
    count = math.prod(mesh)
    if count > len(found.devices):
        raise InputError(
            f"compile_for={topology}: has {len(found.devices)} chips, and a mesh of "
            f"{'x'.join(map(str, mesh))} takes {count}"
        )
    return Chip(
        topology,
        device.device_kind,
        gib and gib * _GIB,
        SingleDeviceSharding(device),
        None if count == 1 else placement.of(found.devices[:count], mesh[1]),
    )


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program that was compiled, or was not.

    Attributes:
        name, what: as of `Program`.
        seconds: that it took to compile.
        cycles: that the compiler expects it to take, where each loop whose number of turns is known
            only at run time takes one.
        argument_bytes, temporary_bytes, output_bytes: memory on the chip, for what it is given,
            beside, and for what it gives; what it gives in memory that it was given counts as
            given.
        exchanges: collectives, by which the chips of a mesh exchange numbers; the compiler expects
            no cycles of them.
        error: why it does not compile; "" if it does.
    """

    name: str
    what: str
    seconds: float
    cycles: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    output_bytes: int = 0
    exchanges: tuple[Exchange, ...] = ()
    error: str = ""

    @property
    def bytes(self) -> int:
        """All that it takes on the chip."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes


def compile_program(program: Program, chip: Chip) -> tuple[CompiledProgram, Text | None]:
    """A program for a chip, and what its text says; no text where it does not compile."""
    began = time.perf_counter()
    try:
        compiled = _compiled(program, chip)
    # The compiler's own errors (out of memory, what it cannot do) are all of one kind.
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        seconds = time.perf_counter() - began
        reason = str(error).strip().splitlines()[0]
        return CompiledProgram(program.name, program.what, seconds, error=reason), None
    seconds, text = time.perf_counter() - began, Text(compiled.as_text() or "")
    sizes = compiled.memory_analysis()
    assert sizes is not None  # the compiler for TPUs tells them
    return (
        CompiledProgram(
            name=program.name,
            what=program.what,
            seconds=seconds,
            cycles=text.program.turn_cycles,
            argument_bytes=sizes.argument_size_in_bytes,
            temporary_bytes=sizes.temp_size_in_bytes,
            output_bytes=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            exchanges=text.exchanges,
        ),
        text,
    )


def _compiled(program: Program, chip: Chip) -> jax.stages.Compiled:
    placed = chip.place(program)

    def called(*arrays):
        return program.function(*arrays)

    called.__name__ = program.name
    with jax.default_matmul_precision("float32"):
        traced = jax.jit(called, donate_argnums=program.donated).trace(*placed)
        return traced.lower(lowering_platforms=("tpu",)).compile()


@dataclasses.dataclass(frozen=True)
class Half:
    """Half of a block (or all of one whose modules are parallel), as differences go through it.

    Attributes:
        name: attention, MLP or block.
        cycles: of a batch in a layer.
        product_cycles: of its products with weights alone.
    """

    name: str
    cycles: int
    product_cycles: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiler expects of a scan of all neurons on one chip; cycles are its estimates.

    Attributes:
        topology, kind: of the chip.
        mesh: of how many it is one, as 8x1.
        model, layers: what is scanned.
        precision: of products with differences.
        tokens, batches, rows: of a prompt, of a chunk, and of a batch on the chip.
        halves: of a block.
        layer_cycles: once for a layer and chunk.
        chunk_cycles: once for a chunk.
        enter_cycles: of the units of a chunk that enter.
        read_cycles: of a batch whose metric is read.
        fraction: of the cycles of a batch in a layer, those of its products with weights alone.
        cycles_per_neuron: of each chip of the mesh, from entering to the metric, for a neuron with
            as many later blocks as a neuron has on average.
        passes: how often attention's half reads or writes its largest array, the scores' difference
            [heads, keys, rows].
        memory_bytes: the most that one of the programs takes on the chip.
        programs: all that were compiled.
    """

    topology: str
    kind: str
    mesh: str
    model: str
    layers: int
    precision: str
    tokens: int
    batches: int
    rows: int
    halves: tuple[Half, ...]
    layer_cycles: int
    chunk_cycles: int
    enter_cycles: int
    read_cycles: int
    fraction: float
    cycles_per_neuron: float
    passes: int
    memory_bytes: int
    programs: tuple[CompiledProgram, ...]


class Compiler:
    """Compiles programs for one chip, each once.

    Attributes:
        chip: the chip.
    """

    def __init__(self, chip: Chip, say: Callable[[str], None] = lambda line: None):
        self.chip = chip
        self._say = say
        self._known: dict[tuple[str, str], tuple[CompiledProgram, Text | None]] = {}

    def __call__(self, program: Program) -> tuple[CompiledProgram, Text | None]:
        """A program compiled, and what its text says; no text where it does not compile."""
        key = program.name, program.text
        if key not in self._known:
            self._known[key] = compile_program(program, self.chip)
            found, _ = self._known[key]
            told = found.error or f"{found.seconds:.1f} s"
            self._say(f"{self.chip.topology}: {found.name} {found.what}: {told}")
        return self._known[key]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is compiled.

    Attributes:
        model: what it is called.
        config: its shape.
        tokens: length of both prompts.
        granularities: whose programs are compiled, beside those of neurons.
        rows: of all batches; 0 for as many as a run takes.
        memory_gb: memory of the chip that may be taken, in GiB; most of it by default.
        whole: whether screening, joint sets, generation and judging are compiled as well.
    """

    model: str
    config: DecoderConfig
    tokens: int
    granularities: tuple[str, ...] = ()
    rows: int = 0
    memory_gb: float | None = None
    whole: bool = False


def measure(
    asked: Asked,
    compiler: Compiler,
    precision: str,
) -> Figures:
    """Compiles for a chip, and reads what the compiler expects.

    Args:
        asked: what.
        compiler: for which chip.
        precision: of products with differences.

    Raises:
        InputError: the memory does not suffice, or a scan of neurons does not compile.
    """
    config, chip = asked.config, compiler.chip
    compiled: list[CompiledProgram] = []
    neurons: dict[str, tuple[Program, CompiledProgram, Text | None]] = {}
    for program in recorded(asked, chip, precision).programs:
        found, text = compiler(program)
        compiled.append(found)
        # A scan of neurons comes first: its programs are the first of their names.
        neurons.setdefault(program.name, (program, found, text))
    enter, carry, read = (
        _readable(*neurons[name], chip) for name in ("enter", "carry", "read_changes")
    )
    carried = neurons["carry"][0].carried
    assert carried is not None
    (layers,), (reading,) = carry.program.loops, read.program.loops
    (batch,) = layers.loops
    products = _product_cycles(asked, compiler, carried, precision)
    halves = tuple(
        Half(_HALVES[name], carry.cycles_in(batch, name), cycles)
        for name, cycles in products.items()
    )
    later = (config.num_layers - 1) / 2  # blocks
    each_layer = layers.own_cycles + carried.batches * batch.turn_cycles
    whole_chunk = enter.program.turn_cycles + carry.program.own_cycles + later * each_layer
    whole_chunk += read.program.own_cycles + carried.batches * reading.turn_cycles
    return Figures(
        topology=chip.topology,
        kind=chip.kind,
        mesh=placement.named(chip.mesh),
        model=asked.model,
        layers=config.num_layers,
        precision=precision,
        tokens=asked.tokens,
        batches=carried.batches,
        rows=carried.rows,
        halves=halves,
        layer_cycles=layers.own_cycles,
        chunk_cycles=carry.program.own_cycles,
        enter_cycles=enter.program.turn_cycles,
        read_cycles=reading.turn_cycles,
        fraction=sum(half.product_cycles for half in halves) / batch.turn_cycles,
        cycles_per_neuron=whole_chunk / (carried.batches * carried.rows * chip.devices.number),
        passes=_passes(asked, compiler, precision),
        memory_bytes=max(program.bytes for program in compiled),
        programs=tuple(compiled),
    )


def _readable(program: Program, compiled: CompiledProgram, text: Text | None, chip: Chip) -> Text:
    """The text of a program that has to compile.

    Raises:
        InputError: it does not.
    """
    if text is None:
        raise InputError(
            f"compile_for={chip.topology}: {program.name} {program.what} does not compile: "
            f"{compiled.error}"
        )
    return text


def recorded(asked: Asked, chip: Chip, precision: str) -> Recorder:
    """The programs that are asked for, those of a scan of neurons first.

    Raises:
        InputError: the memory does not suffice.
    """
    config = asked.config
    record, decoder = Recorder(), _decoder(config, precision, chip.mesh)
    left = _memory_left(asked, decoder, chip)

    pair = presets.random_pair(config, asked.tokens)
    question = Question(LogitDifference(), directions=programs.directions(config))
    names = {"neuron", *asked.granularities}
    together = blocks.layers_together(config, [pair], question, names, "tpu", computed={})

    def batching(work: Work, term: Joined, runs: int) -> Batching:
        part = work.of(0, together[work.granularity])  # as a run cuts it
        found = cost.batching(
            *(config, config.dtype, part, term, left, "tpu"), runs=runs, devices=chip.devices
        )
        rows = chip.devices.filled(asked.rows // found.runs)
        return found._replace(rows=rows or found.rows)

    for granularities in (("neuron",), asked.granularities):
        programs.of_scan(
            record,
            decoder,
            pair,
            question,
            granularities,
            batching=batching,
        )
    if asked.whole:
        rows = functools.partial(_rows, asked, left, chip.devices)
        programs.of_gradients(record, decoder, pair, question)
        programs.of_joint_sets(record, decoder, pair, question)
        programs.of_answers(record, decoder, pair, rows)
    return record


def _rows(asked: Asked, left: int, devices: Devices, length: int, room: int) -> int:
    """Rows of a batch of text, both runs of a divergence in it."""
    if asked.rows:
        return devices.filled(asked.rows)
    shared = {"length": length, "memory": left, "platform": "tpu"}
    read = cost.rows_at_once(asked.config, "float32", runs=2, **shared)
    answered = cost.answers_at_once(asked.config, "float32", "float32", room=room, **shared)
    return devices.number * min(read, answered)


def _memory_left(asked: Asked, decoder: Decoder, chip: Chip) -> int:
    """Bytes beside the weights."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder))
    weights //= chip.devices.storing
    if asked.memory_gb is not None:
        left = int(asked.memory_gb * _GIB) - weights
    elif chip.memory is None:
        raise InputError(
            f"compile_for={chip.topology}: how much memory a {chip.kind} has is not known; give "
            "memory_gb, all that a run may take there, weights included, in GiB"
        )
    else:
        left = int(memory.DEFAULT_SHARE * (chip.memory - weights))
    if left <= 0:
        raise InputError(
            f"compile_for={chip.topology}: the weights of {asked.model} take "
            f"{weights / _GIB:.2f} GiB, which leaves nothing on one chip ({chip.kind})"
        )
    return left


def _decoder(config: DecoderConfig, precision: str, mesh: Mesh | None = None) -> Decoder:
    """A decoder that has shapes for weights, multiplied as on a TPU."""
    return programs.shapes_of(config, mesh).at_precision(precision, platform="tpu")


def products(decoder: Decoder) -> dict[str, Callable]:
    """By half of a block, its products with weights alone, of rows of differences.

    Each takes a block, and differences of the residual stream, of the heads' outputs and of the
    neurons.
    """

    def change(linear: Callable, differences: jax.Array) -> jax.Array:
        value = jnp.zeros(differences.shape[1:], differences.dtype)
        return jax.vmap(propagate.change_of(decoder, linear, value))(differences)

    def of_attention(block, stream, heads, neurons):
        attention = block.attention
        inputs = (attention.query, attention.key, attention.value)
        return [change(linear, stream) for linear in inputs] + [change(attention.output, heads)]

    def of_mlp(block, stream, heads, neurons):
        inputs = [linear for linear in (block.mlp.gate, block.mlp.up) if linear is not None]
        return [change(linear, stream) for linear in inputs] + [change(block.mlp.down, neurons)]

    def of_both(*arguments):
        return of_attention(*arguments) + of_mlp(*arguments)

    return {"attend": of_attention, "feed": of_mlp, "both": of_both}


def of_products(asked: Asked, carried: Carried, precision: str) -> dict[str, Program]:
    """By half of a block, the program of its products with weights alone, of a batch in a layer."""
    config = asked.config
    decoder = _decoder(config, precision)
    block = jax.eval_shape(lambda decoder: decoder.ready(decoder.block(0)), decoder)
    sizes = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    differences = [
        jax.ShapeDtypeStruct((carried.rows, carried.positions, size), jnp.float32) for size in sizes
    ]
    found = {}
    for half in ("both",) if config.parallel else ("attend", "feed"):
        record = Recorder()
        record(half, jax.jit(products(decoder)[half]), block, *differences)
        (found[half],) = record.programs
    return found


def _product_cycles(
    asked: Asked, compiler: Compiler, carried: Carried, precision: str
) -> dict[str, int]:
    found = {}
    for half, program in of_products(asked, carried, precision).items():
        found[half] = _readable(program, *compiler(program), compiler.chip).product_cycles
    return found


def _passes(asked: Asked, compiler: Compiler, precision: str) -> int:
    """How often attention's half reads or writes the scores' difference.

    Arrays are told apart by their sizes. Where those of another are the same, a longer prompt is
    taken: the passes are as many.
    """
    config = asked.config
    others = [config.hidden_size]
    others += [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)]
    others += [config.intermediate_size] if config.parallel else []
    taken = {size // part for size in others for part in (1, 2)}
    tokens = asked.tokens
    while True:
        asked = dataclasses.replace(asked, tokens=tokens, granularities=(), whole=False)
        record = recorded(asked, compiler.chip, precision)
        (carry,) = (program for program in record.programs if program.name == "carry")
        assert carry.carried is not None
        span, prefix = carry.carried.positions, carry.carried.prefix
        keys = {length * config.num_heads for length in (prefix, prefix + span)}
        if prefix and not keys & taken:
            break
        tokens = 2 * tokens
    text = _readable(carry, *compiler(carry), compiler.chip)
    sizes = {carry.carried.rows * span * each for each in keys}
    (layers,) = text.program.loops
    return sum(text.touched(batch, sizes) for batch in layers.loops)
