"""What a scan costs, as people are told: by --dry_run, before it starts, and once its first pair is
done."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import jax

from jaxmed.engine import rates
from jaxmed.engine.cost import Devices
from jaxmed.runs.compilation import Compilation
from models import placement, products
from models.decoder import Decoder

# Shorter waits are not worth a sentence.
_WORTH_TELLING = 30.0
# Shares of the products' rate that scans came to, where none of their kind has been made yet.
_SHARES = {
    "layer": 0.1,
    "module": 0.1,
    "head": 0.3,
    "token": 0.5,
    "neuron": 0.8,
    "direction": 0.3,
}


def shares(operations: Mapping[str, float], units: Mapping[str, int]) -> str:
    """A sentence on which granularity takes how much, the dearest first.

    Args:
        operations: floating-point operations of each.
        units: how many of each a pair has at most.
    """
    total = sum(operations.values())
    told = [
        f"{name} {operations[name] / total:.1%} ({units[name]:,} units a pair)"
        for name in _dearest_first(operations)
    ]
    return f"Of these operations {', '.join(told)}."


def share(own: Mapping[str, float], operations: Mapping[str, float]) -> float:
    """Which part of all operations some of them are; 0 where there are none, as in layers of which
    no neuron was chosen."""
    total = sum(operations.values())
    return sum(own.values()) / total if total else 0.0


def dearest(operations: Mapping[str, float]) -> str:
    """The granularity that takes most."""
    return _dearest_first(operations)[0]


class Forecast:
    """What a scan is expected to take, by how fast the last one was that asked the same of a model
    of this shape on this machine.

    Long lists come near to the rate of products with the weights. Of short ones most is the plain
    runs, batches that are not full, and what the host does: so each granularity has a rate of its
    own, which is noted in the cache folder when a scan ends. Seconds of compilation are noted
    apart.
    """

    def __init__(self, decoder: Decoder, asked: tuple):
        """Nothing is done yet.

        Args:
            decoder: the model.
            asked: texts and numbers that tell apart what is asked of it, as its positions.
        """
        config = decoder.config
        self._decoder = decoder
        self._about = (config.num_layers, config.hidden_size, config.intermediate_size)
        self._about += (decoder.dtype.name, decoder.products.precision)
        self._about += (placement.named(decoder.mesh), *asked)
        self._done: dict[str, tuple[float, float]] = {}

    def seconds(self, operations: Mapping[str, float]) -> float:
        """That so many floating-point operations of each granularity are expected to take, beside
        compilation."""
        return sum(each / self._rate(name) for name, each in operations.items())

    def told(self, operations: Mapping[str, float]) -> str:
        """A sentence on how long so many floating-point operations of each granularity take."""
        known = all(self._noted(name) is not None for name in operations)
        products = self._products
        by = (
            "the last such scan"
            if known
            else f"the {products:.1e} a second of this machine's matrix products in "
            f"{self._decoder.products.precision}, and how near to that scans of other models come"
        )
        return (
            f"Going by {by}, this takes about {_duration(self.seconds(operations))}, and "
            f"{self._compilation(operations)}"
        )

    def add(self, granularity: str, operations: float, seconds: float) -> None:
        """A part of the scan is done, and took so many seconds beside compilation."""
        before = self._done.get(granularity, (0.0, 0.0))
        self._done[granularity] = before[0] + operations, before[1] + seconds

    def keep(self, compilation: Compilation) -> str:
        """The scan has ended: what it took is noted for the next; a sentence on it.

        Args:
            compilation: of the scan.
        """
        for name, (operations, seconds) in self._done.items():
            if operations and seconds > 0:
                rates.note((*self._about, name), operations / seconds)
        if self._done and (compilation.programs or compilation.cached):
            how = "compiled" if compilation.programs else "cached"
            rates.note((*self._about, *sorted(self._done), how), compilation.seconds)
        taken = sum(seconds for _, seconds in self._done.values())
        return f"It took {_duration(taken)}, and {_duration(compilation.seconds)} of compilation"

    def _rate(self, granularity: str) -> float:
        """Operations a second."""
        if (noted := self._noted(granularity)) is not None:
            return noted
        return _SHARES[granularity] * self._products

    @property
    def _products(self) -> float:
        """Operations a second of products, on all devices."""
        devices = Devices.of(self._decoder.mesh)
        speed = devices.speed(jax.default_backend())
        return speed * rates.operations_per_second(self._decoder)

    def _noted(self, granularity: str) -> float | None:
        return rates.noted((*self._about, granularity))

    def _compilation(self, granularities: Iterable[str]) -> str:
        """What compilation takes, as far as it is known."""
        about = (*self._about, *sorted(granularities))
        compiled, cached = (rates.noted((*about, how)) for how in ("compiled", "cached"))
        if cached is not None:
            return f"{_duration(cached)} for programs that come from the cache"
        if compiled is not None:
            return (
                f"less than the {_duration(compiled)} of the first time for programs, which come "
                "from the cache"
            )
        return "compilation beside: some seconds for each length of prompt, this first time"


def left(seconds: float, done: float, operations: Mapping[str, float]) -> str:
    """A sentence on the time that is left, by that of what is done; "" where it is short.

    Args:
        seconds: that it took.
        done: its floating-point operations.
        operations: those of the rest, by granularity.
    """
    total = seconds * sum(operations.values()) / done if done else 0.0
    if total < _WORTH_TELLING:
        return ""
    each = {name: seconds * operations[name] / done for name in _dearest_first(operations)}
    told = [f"{name} {_duration(one)}" for name, one in each.items() if one >= 0.01 * total]
    return (
        f"The first blocks of pairs took {_duration(seconds)}, compilation included; at that pace "
        f"the others take {_duration(total)}: {', '.join(told)}"
    )


def _dearest_first(operations: Mapping[str, float]) -> list[str]:
    return sorted(operations, key=lambda name: operations[name], reverse=True)


def _duration(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What a chip's datasheet says, and how much of that was seen of it.

    Attributes:
        bfloat16: operations a second of dense bfloat16 products.
        memory: bytes.
        bandwidth: bytes a second from and to its memory.
        reached: by precision, which fraction of `bfloat16` the products and parts that a scan of
            neurons has to make came to (docs/performance.md); empty where none was measured.
    """

    bfloat16: float
    memory: float
    bandwidth: float
    reached: Mapping[str, float] = dataclasses.field(default_factory=dict)


ACCELERATORS = {
    # 8B shapes for bfloat16, 1B shapes for the others: useful rate x parts x fraction / datasheet.
    "h100": Accelerator(
        *(989e12, 80e9, 3.35e12), {"bfloat16": 0.49, "split2": 0.43, "split3": 0.49}
    ),
    "h200": Accelerator(989e12, 141e9, 4.8e12),
    "a100": Accelerator(312e12, 80e9, 2.04e12),
    "v5e": Accelerator(197e12, 16e9, 0.82e12),
    "v5p": Accelerator(459e12, 95e9, 2.77e12),
    "v6e": Accelerator(918e12, 32e9, 1.64e12),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run has before it, known from shapes alone.

    Attributes:
        weights: bytes of the parameters in memory.
        dtype: their type.
        precision: in which differences are multiplied by them, of `products.PRECISIONS`.
        pairs: how many.
        units: of a pair, by granularity, at most.
        blocks: units of work, by granularity; empty where a single unit does not fit the memory.
        operations: floating-point operations of all products, by granularity.
        joint: those of a joint set, at most; 0 without one.
        screened: whether gradients rank the neurons first.
    """

    weights: int
    dtype: str
    precision: str
    pairs: int
    units: Mapping[str, int]
    blocks: Mapping[str, int]
    operations: Mapping[str, float]
    joint: float = 0.0
    screened: bool = False

    def stored(self, granularity: str) -> int:
        """Bytes of a granularity's effects: NIE and TIE, and a status of both, of each unit; the
        estimates of a screen beside."""
        of_a_unit = 4 + 4 + 1 + (8 if self.screened and granularity == "neuron" else 0)
        return self.pairs * self.units[granularity] * of_a_unit


def told(plan: Plan, forecast: Forecast, accelerator: str = "") -> Iterator[str]:
    """Lines on what a run will take, for people.

    Args:
        plan: of the run.
        forecast: of its scan, on this machine.
        accelerator: one of `ACCELERATORS`, of which the time is told as well; "" for none.
    """
    yield "Nothing was computed, and nothing is written: a run of these settings has"
    yield _row("granularity", "units a pair", "pairs", "units of work", "operations", "stored")
    for name in _dearest_first(plan.operations):
        yield _row(
            *(name, f"{plan.units[name]:,}", f"{plan.pairs:,}"),
            f"{plan.blocks[name]:,}" if plan.blocks else "?",
            *(f"{plan.operations[name]:.2e}", _size(plan.stored(name))),
        )
    stored = sum(map(plan.stored, plan.units))
    yield (
        f"Stored: {_size(stored)} of effects before compression, and the summary's "
        f"{4 * sum(plan.units.values()):,} rows"
    )
    yield (
        f"Read: weights of {_size(plan.weights)} (the first time once more, for their hash), and "
        "the effects once for the summary"
    )
    total = sum(plan.operations.values())
    beside = f", and at most {plan.joint:.2e} for the joint set" if plan.joint else ""
    screen = "; the gradients of the screen come on top" if plan.screened else ""
    yield f"Operations: {total:.2e} for the scan{beside}{screen}"
    count = len(jax.local_devices())
    yield f"Here ({count} x {jax.devices()[0].device_kind}): {forecast.told(plan.operations)}"
    if accelerator:
        yield from _told_of(accelerator, plan)


def _told_of(name: str, plan: Plan) -> Iterator[str]:
    """Lines on a named accelerator."""
    chip, precision = ACCELERATORS[name], plan.precision
    if precision == "float32":
        precision = "split3"  # which is as exact, and what a matrix unit makes float32 products of
    passes = products.PARTS[precision] or 1
    if plan.dtype != "bfloat16":  # Weights are cut as well.
        passes = passes * (passes + 1) // 2
    yield (
        f"One {name} (datasheet: {chip.bfloat16 / 1e12:,.0f} TFLOP/s in bfloat16, "
        f"{chip.memory / 1e9:,.0f} GB, {chip.bandwidth / 1e9:,.0f} GB/s): weights take "
        f"{plan.weights / chip.memory:.0%} of its memory; a product in {precision} takes "
        f"{passes} in bfloat16"
    )
    seconds = passes * sum(plan.operations.values()) / chip.bfloat16
    least = f"at the datasheet's rate, which nothing reaches, it is {_duration(seconds)}"
    if reached := chip.reached.get(precision):
        # Other lists come less near to the products' rate than neurons do.
        slowed = sum(
            passes * each * _SHARES["neuron"] / (_SHARES[of] * reached * chip.bfloat16)
            for of, each in plan.operations.items()
        )
        yield (
            f"There the scan takes about {_duration(slowed)}: of a scan of neurons in {precision} "
            f"{reached:.0%} of that rate was measured, and other lists come less near; {least}"
        )
    else:
        yield f"There no scan was measured in {precision}; {least}"


def _row(*cells: str) -> str:
    first, *others = cells
    return f"  {first:<12}" + "".join(f"{cell:>15}" for cell in others)


def _size(count: float) -> str:
    """A number of bytes, for people."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= of:
            return f"{count / of:.1f} {unit}"
    return f"{count:.0f} bytes"
