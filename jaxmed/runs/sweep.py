"""What lasts: units of work that are computed one by one, each committed to the store at once.

A run that is stopped loses the unit that it was at, and goes on with those that the store lacks.
Where several processes do the units of one results folder, each does its own, in order, then those
that the others have left, from the far end. A mark in the folder says that a unit was begun, so
that no two begin it; what was begun and is not done, for its process may be dead, is taken last. So
each process is at one unit when no other is left, and no more than these are done twice.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import jax
import tqdm

from jaxmed.files.places import Place
from jaxmed.runs import compilation
from jaxmed.runs.processes import Process
from jaxmed.store.results import Results
from models.errors import InputError

Unit = TypeVar("Unit")
Found = TypeVar("Found")

_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone{compiling}, {remaining} to go"
_FAILED = "sweep/failed/"  # of a results folder: a file for each unit that failed, named after it
# Units that fail one after the other: not they are at fault, but the machine or the program.
_ENOUGH = 4


class Terminated(BaseException):
    """The system ends the program (SIGTERM), as it does with what it needs the machine for. What
    was finished is kept."""


class UnitsFailedError(Exception):
    """All that can be done is done, but units failed."""


def say(text: str) -> None:
    """Tells people what goes on, above a progress bar if there is one."""
    tqdm.tqdm.write(text, file=sys.stderr)


def tell(text: str) -> None:
    """Prints a line of a result as soon as it is there."""
    print(text, flush=True)


def teller(progress: bool) -> Callable[[str], None]:
    """`say`, or where nobody looks on, a function that keeps silent."""
    return say if progress else lambda text: None


# --- Signals -----------------------------------------------------------------------------------


class _Termination:
    """What becomes of SIGTERM.

    Attributes:
        asked: whether it came while a unit was under way.
        under_way: whether a unit is.
    """

    def __init__(self):
        self.asked = self.under_way = False

    def handle(self, *_) -> None:
        """A first SIGTERM; the next one ends the process as if nobody listened."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self.under_way:
            raise Terminated
        self.asked = True
        # No print: the signal may have come within one.
        os.write(2, b"\nSIGTERM: stops after the unit under way; a second one ends at once\n")


_termination = _Termination()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`: at once or, while a unit of a sweep is under way, when
    it is committed. A second SIGTERM ends the process at once."""
    _termination.asked = False
    before = signal.signal(signal.SIGTERM, _termination.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """SIGTERM waits until what is within is done."""
    _termination.under_way = True
    try:
        yield
    finally:
        _termination.under_way = False
    if _termination.asked:
        raise Terminated


# --- Processes ---------------------------------------------------------------------------------


class Shared(Generic[Unit]):
    """How the units of a results folder are shared out among processes, and what becomes of those
    that fail.

    Attributes:
        process: which this is.
        name, about, smaller: as `__init__` has them.
        retries: whether any units failed before and are taken up again.
    """

    def __init__(
        self,
        results: Results,
        process: Process,
        *,
        name: Callable[[Unit], str],
        lacking: Callable[[Sequence[Unit]], Sequence[Unit]],
        fail: Callable[[Unit], None],
        smaller: Callable[[Unit], Unit | None] = lambda unit: None,
        about: Callable[[Unit], str] = str,
        retry_failed: bool = False,
    ):
        """Nothing is begun yet.

        Args:
            results: the folder.
            process: which this is.
            name: of a unit; no other of the folder is called so.
            lacking: those of some units that the store lacks, by a listing.
            fail: commits a unit that failed.
            smaller: the unit in smaller batches; None where they are as small as can be.
            about: what people are told of a unit.
            retry_failed: whether those that have failed by now are taken up again.
        """
        self.process = process
        self.name, self.about, self.smaller = name, about, smaller
        self._results, self._lacking, self._fail = results, lacking, fail
        there = failed(results.place)
        self._again = there if retry_failed else {}
        self._may_be_failed = set(there)
        self.retries = bool(self._again)

    def own(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Those that this process begins with."""
        return units[self.process.index :: self.process.count]

    def left(self, units: Sequence[Unit]) -> list[Unit]:
        """Those of some units that are to be done now, in order."""
        lacking = set(self._lacking(units))
        if self._again:
            now = failed(self._results.place)
            # Another process may have taken one up by now: then it is gone, or newly failed.
            lacking |= {
                unit
                for unit in units
                if (name := self.name(unit)) in self._again and now.get(name) == self._again[name]
            }
        return [unit for unit in units if unit in lacking]

    def turns(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """The units that this process does: each is yielded when it is its turn, and done when the
        next is asked for.

        Own units come first, then those of others from the far end; those that others have begun,
        last of all, and only if they are not done by then. What this process itself was at when it
        was stopped, it begins again.
        """
        process, waiting = self.process, []
        own = self.own(units)
        others = [unit for number, unit in enumerate(units) if not process.owns(number)]
        left, begun = set(self.left(units)), self._results.begun()
        for unit in (*own, *reversed(others)):
            if unit not in left:
                continue
            name = self.name(unit)
            if name in begun:
                may_begin = begun[name] == process.index
            else:
                may_begin = self._results.begin(name, process.index)
            if may_begin:
                yield unit
            else:
                waiting.append(unit)
        while waiting := self.left(waiting):
            unit = waiting.pop(0)
            self._may_be_failed.add(self.name(unit))  # another process is at it, or was
            yield unit

    def may_commit(self, unit: Unit) -> bool:
        """Whether a unit is still to be committed: what another process has done meanwhile is the
        same, and may have been read by now. What another has given up is."""
        if self.process.is_alone or self.left([unit]):
            return True
        name = self.name(unit)
        if self._results.place.exists(f"{_FAILED}{name}"):
            self._may_be_failed.add(name)
            return True
        return False

    def done(self, unit: Unit) -> None:
        """A unit was committed: it is no longer one that failed."""
        if (name := self.name(unit)) in self._may_be_failed:
            self._results.place.delete(f"{_FAILED}{name}")

    def give_up(self, unit: Unit, error: Exception) -> bool:
        """Commits a unit that failed, unless another process has done it; and says whether."""
        if unit not in self.left([unit]):
            return False
        told = {"process": self.process.index, "time": time.time(), "error": _first_line(error)}
        self._results.place.write(f"{_FAILED}{self.name(unit)}", json.dumps(told).encode())
        self._fail(unit)
        return True


def failed(place: Place) -> dict[str, bytes]:
    """What is kept of the units of a results folder that failed, by their names."""
    return {name.removeprefix(_FAILED): content for name, content, _ in place.read_all(_FAILED)}


def check_failed(results: Results) -> None:
    """Raises `UnitsFailedError` where units of a results folder failed."""
    if names := sorted(failed(results.place)):
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise UnitsFailedError(
            f"Units of work that failed, and have no effects: {shown}; --retry_failed takes them "
            "up again"
        )


# --- The loop ----------------------------------------------------------------------------------


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
    shared: Shared[Unit] | None = None,
    progress: bool = True,
) -> None:
    """Computes and commits units, with a progress bar.

    Args:
        units: what is to be done, in this order.
        compute: is given a unit, and what it may tell of its own progress, in parts of its cost.
        commit: is given a unit and what was computed of it, and writes that to the store.
        name: of what is done to a unit, for the bar.
        unit: what a unit is called.
        costs: of each unit, so that the time left is honest where they differ; `compute` tells
            how far it is. Without them the bar counts units.
        on_done: told of each unit, and of the seconds that it took beside compilation.
        shared: with which processes; of `units` only what is left to be done is done. A unit for
            which the memory does not suffice is done in smaller batches, and one that fails twice
            is committed as failed. Without it this process does all, and what fails is raised.
        progress: show the bar, and say which process did what.

    Raises:
        Terminated: after the unit under way, if SIGTERM came and `terminable` listens.
    """
    own = list(units) if shared is None else shared.left(shared.own(units))
    style: dict[str, Any] = {"unit": unit} if costs is None else {"bar_format": _BAR}
    inform = teller(progress)

    def cost(of: Sequence[Unit]) -> float:
        return len(of) if costs is None else sum(costs[each] for each in of)

    expected, in_a_row = set(own), 0
    with _Bar(total=cost(own), desc=name, disable=not (units and progress), **style) as bar:

        def advance(amount: float) -> None:
            bar.update(amount)

        turns = iter(units) if shared is None else shared.turns(units)
        for number, each in enumerate(turns, start=1):
            if each not in expected:
                bar.total += cost([each])
            if costs is not None:
                bar.set_description(f"{unit} {number}/{max(number, len(own))}")
            with _whole():
                began, compiled = time.monotonic(), compilation.so_far()
                try:
                    if shared is None:
                        found = compute(each, advance)
                    else:
                        found = _attempted(shared, each, compute, advance, inform)
                except _FailedError as failure:
                    assert shared is not None
                    if shared.give_up(each, failure.error):
                        inform(f"{shared.name(each)} failed again ({failure}): it has no effects")
                    in_a_row += 1
                    if in_a_row == _ENOUGH:
                        _stop(failure)
                else:
                    in_a_row = 0
                    compiling = compilation.so_far().since(compiled).seconds
                    seconds = time.monotonic() - began - compiling
                    on_done(each, seconds)
                    if shared is None:
                        commit(each, found)
                    elif shared.may_commit(each):
                        commit(each, found)
                        shared.done(each)
                    if shared is not None and not shared.process.is_alone:
                        inform(_told(shared, each, seconds, compiling))
            if costs is None:
                bar.update(1)


class _FailedError(Exception):
    """A unit failed for good."""

    def __init__(self, error: Exception):
        super().__init__(_first_line(error))
        self.error = error


def _attempted(
    shared: Shared[Unit],
    unit: Unit,
    compute: Callable[[Unit, Callable[[float], None]], Found],
    advance: Callable[[float], None],
    inform: Callable[[str], None],
) -> Found:
    """What `compute` gives, at once or the second time, or in smaller batches.

    Raises:
        InputError: `compute` raises it.
        _FailedError: it failed, and failed again.
    """
    tried, failed_before = unit, False
    while True:
        told = []

        def advanced(amount: float, told: list[float] = told) -> None:
            told.append(amount)
            advance(amount)

        try:
            return compute(tried, advanced)
        except InputError:
            raise
        except Exception as error:
            smaller = shared.smaller(tried) if _is_out_of_memory(error) else None
            if smaller is not None:
                inform(
                    f"{shared.name(unit)}: out of memory; tried again in batches of half the size, "
                    "by which its effects may differ in rounding"
                )
                tried = smaller
            elif failed_before:
                raise _FailedError(error) from error
            else:
                inform(f"{shared.name(unit)} failed ({_first_line(error)}): tried once more")
                failed_before = True
        gc.collect()  # what the attempt held, and what refers to itself
        advance(-sum(told))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError)


def _stop(failure: _FailedError) -> NoReturn:
    raise RuntimeError(
        f"{_ENOUGH} units of work failed one after the other, the last with {failure}. All that "
        "was done is kept; once the cause is removed, the same command with --retry_failed goes on"
    ) from failure.error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _told(shared: Shared[Unit], unit: Unit, seconds: float, compiling: float) -> str:
    """Who did what."""
    beside = f" and {compiling:.1f} s of compilation" if compiling >= 0.05 else ""
    return (
        f"Process {shared.process.index}: {shared.name(unit)} ({shared.about(unit)}) done in "
        f"{seconds:.2f} s{beside}"
    )
