"""What a scan costs, as people are told: before it starts, and once its first pair is done."""

from collections.abc import Mapping

from jaxmed.engine import rates
from models.decoder import Decoder

# Shorter waits are not worth a sentence.
_WORTH_TELLING = 30.0


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


def least_time(operations: float, decoder: Decoder) -> str:
    """A sentence on how long so many floating-point operations take on this machine."""
    rate = rates.operations_per_second(decoder)
    return (
        f"This machine's matrix products make {rate:.1e} a second in "
        f"{decoder.products.precision}, so it takes at least "
        f"{_duration(operations / rate)}, and compilation beside (some seconds for each length of "
        "prompt, most of the time for a small model); the bar tells the real time."
    )


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
