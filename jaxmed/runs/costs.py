"""What a scan costs, as people are told: before it starts, and once its first pair is done."""

from collections.abc import Iterable, Mapping

from jaxmed.engine import rates
from jaxmed.runs.compilation import Compilation
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
        self._about += (decoder.dtype.name, decoder.products.precision, *asked)
        self._done: dict[str, tuple[float, float]] = {}

    def seconds(self, operations: Mapping[str, float]) -> float:
        """That so many floating-point operations of each granularity are expected to take, beside
        compilation."""
        return sum(each / self._rate(name) for name, each in operations.items())

    def told(self, operations: Mapping[str, float]) -> str:
        """A sentence on how long so many floating-point operations of each granularity take."""
        known = all(self._noted(name) is not None for name in operations)
        products = rates.operations_per_second(self._decoder)
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
        return _SHARES[granularity] * rates.operations_per_second(self._decoder)

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
