"""What is timed takes its turn by one clock, on one device."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping

import jax

clock = time.perf_counter


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = clock()
    run()
    return clock() - start


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each run in each round.

    Args:
        runs: what is called once in every round, by name.
        rounds: how many.
        say: told of every round.
    """
    taken = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
        told = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in taken.items())
        say(f"round {number + 1} of {rounds}: {told}")
    return taken


def first_and_median(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds of the first run, which compiles, and the median of so many after it."""
    first = seconds(run)
    return first, statistics.median(seconds(run) for _ in range(rounds))


def device() -> str:
    """How many devices of what kind JAX sees."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def peak_memory() -> int:
    """Bytes: of the device where it counts them, of the process otherwise."""
    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
