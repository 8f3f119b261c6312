"""What lasts: units of work that are computed one by one, each committed to the store at once.

A run that is stopped loses the unit that it was at, and goes on with those that the store lacks.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tqdm

from jaxmed.runs import compilation

Unit = TypeVar("Unit")
Found = TypeVar("Found")

_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone{compiling}, {remaining} to go"


def say(text: str) -> None:
    """Tells people what goes on, above a progress bar if there is one."""
    tqdm.tqdm.write(text, file=sys.stderr)


def tell(text: str) -> None:
    """Prints a line of a result as soon as it is there."""
    print(text, flush=True)


def teller(progress: bool) -> Callable[[str], None]:
    """`say`, or where nobody looks on, a function that keeps silent."""
    return say if progress else lambda text: None


class _Bar(tqdm.tqdm):
    """A bar whose time to go is by the pace of the work alone: what is compiled for the first unit
    serves most of the others."""

    def __init__(self, *args, **kwargs):
        self._before = compilation.so_far()
        super().__init__(*args, **kwargs)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm tells."""
        found = super().format_dict
        compiling = compilation.so_far().since(self._before).seconds
        working = found["elapsed"] - compiling
        told = f", {self.format_interval(compiling)} of it compiling" if compiling >= 1 else ""
        rate = self.n / working if working > 0 else None
        return {**found, "compiling": told, "rate": rate}


def run(
    units: Sequence[Unit],
    compute: Callable[[Unit, Callable[[float], None]], Found],
    commit: Callable[[Unit, Found], None],
    *,
    name: str,
    unit: str = "pair",
    costs: Mapping[Unit, float] | None = None,
    on_done: Callable[[Unit, float], None] = lambda unit, seconds: None,
    progress: bool = True,
) -> None:
    """Computes and commits what the store lacks, with a progress bar.

    Args:
        units: what is to be done, in this order.
        compute: is given a unit, and what it may tell of its own progress, in parts of its cost.
        commit: is given a unit and what was computed of it, and writes that to the store.
        name: of what is done to a unit, for the bar.
        unit: what a unit is called.
        costs: of each unit, so that the time left is honest where they differ; `compute` tells
            how far it is. Without them the bar counts units.
        on_done: told of each unit, and of the seconds that it took beside compilation.
        progress: show the bar.
    """
    total = len(units) if costs is None else sum(costs[each] for each in units)
    style: dict[str, Any] = {"unit": unit} if costs is None else {"bar_format": _BAR}
    with _Bar(total=total, desc=name, disable=not (units and progress), **style) as bar:

        def advance(amount: float) -> None:
            bar.update(amount)

        for number, each in enumerate(units, start=1):
            if costs is not None:
                bar.set_description(f"{unit} {number}/{len(units)}")
            began, compiled = time.monotonic(), compilation.so_far()
            found = compute(each, advance)
            compiling = compilation.so_far().since(compiled).seconds
            on_done(each, time.monotonic() - began - compiling)
            commit(each, found)
            if costs is None:
                bar.update(1)
