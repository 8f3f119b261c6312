"""Which of the processes this is that share a results folder, and nothing else.

None of them waits for another or need be there: each does units of its own, then those that the
others have left. So no connection is made, and `jax.distributed.initialize` is not called.
"""

import dataclasses
import os
from collections.abc import Mapping

from models.errors import InputError

COUNT = "JAXMED_PROCESSES"  # how many there are, where a launcher says but the index
# What launchers call the index and the count: Slurm, Kubernetes (an indexed job), Cloud TPU.
_LAUNCHERS = {
    "SLURM_PROCID": "SLURM_NTASKS",
    "JOB_COMPLETION_INDEX": COUNT,
    "TPU_WORKER_ID": "TPU_WORKER_HOSTNAMES",
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `count` processes; their indices count from 0."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it does what is done once: joint set, summary and report."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def owns(self, number: int) -> bool:
        """Whether the unit of this number is one of its own."""
        return number % self.count == self.index

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def this(
    process: int | None, processes: int | None, environment: Mapping[str, str] = os.environ
) -> Process:
    """Which one this is: as the settings of these names say, else as the launcher does, else the
    only one.

    Raises:
        InputError: only one of the two numbers is known, or they do not fit each other.
    """
    if processes == 1 and process is None:
        return Process()
    index, count = _launched(environment, processes)
    index = index if process is None else process
    if index is None and count is None:
        return Process()
    if count is None:
        raise InputError(f"--process={index} needs --processes=N: of how many is it one?")
    if index is None:
        raise InputError(
            f"--processes={count} needs --process=K, from 0 to {count - 1}: which of them is this?"
        )
    if index >= count:
        raise InputError(
            f"process {index} of {count}: they count from 0 to {count - 1}; what --process and "
            "--processes do not say, the environment does (Slurm, Kubernetes or Cloud TPU)"
        )
    return Process(index, count)


def _launched(
    environment: Mapping[str, str], processes: int | None
) -> tuple[int | None, int | None]:
    """Index and count by the launcher, where it says the one and somebody the other.

    Args:
        environment: the environment's variables.
        processes: the count, if it is given.
    """
    for index, count in _LAUNCHERS.items():
        if index in environment and (processes or count in environment):
            return _number(index, environment), processes or _number(count, environment)
    return None, processes


def _number(name: str, environment: Mapping[str, str]) -> int:
    """What a variable says; of hosts' names, how many they are."""
    text = environment[name]
    if name == "TPU_WORKER_HOSTNAMES":
        return len(text.split(","))
    if not text.isdecimal():
        raise InputError(f"{name}={text} in the environment: must be a number")
    return int(text)
