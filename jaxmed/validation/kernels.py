"""Which kernels a device spends a run's time on, by JAX's profiler.

On an accelerator a kernel is what runs on a stream or core of the device; on a CPU an operation of
a compiled program, on whichever thread.
"""

import collections
import csv
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All calls of one kernel.

    Attributes:
        program: the compiled function that it is of; "" for what is of none, as a copy.
        scope: the named scopes and functions inside the program that it is of, as
            "attend/multiplied"; "" where the program does not tell.
        operation: JAX's name of the operation that it ends with, likewise.
        name: the device's own name of it.
        calls: how often it ran.
        seconds: that it took in all, without those of kernels inside of it.
    """

    program: str
    scope: str
    operation: str
    name: str
    calls: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Share:
    """Time of several kernels, or time in which none ran.

    Attributes:
        what: a program and a scope in it; or the program whose start ended the wait.
        calls: kernels, or waits.
        seconds: in all.
    """

    what: str
    calls: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where a run's time goes on the device that is the busiest.

    Attributes:
        what: the run.
        device: the profiler's name of the device.
        seconds: from the start of the first kernel to the end of the last.
        busy_seconds: of these, while any kernel ran.
        idle: share of the seconds while none did.
        kernels: every kernel, by time.
        scopes: the same by program and scope, by time.
        waits: while none ran, by the program that ran next, by time.
    """

    what: str
    device: str
    seconds: float
    busy_seconds: float
    idle: float
    kernels: tuple[Kernel, ...]
    scopes: tuple[Share, ...]
    waits: tuple[Share, ...]

    @property
    def kernel_seconds(self) -> float:
        """Of all kernels; more than the busy time where several run side by side."""
        return sum(kernel.seconds for kernel in self.kernels)


def profiled(what: str, run: Callable[[], object], folder: pathlib.Path) -> Profile:
    """Where a call's time goes; it should have been called before, so that nothing is compiled.

    Args:
        what: the call, for people.
        run: what is called.
        folder: gets the trace, which TensorBoard and xprof read, and kernels.csv.

    Raises:
        InputError: the trace has no kernels.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it slows the host down
    with jax.profiler.trace(str(folder), profiler_options=options):
        run()
    path = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = read(what, jax.profiler.ProfileData.from_file(str(path)), _operation_names())
    with open(folder / "kernels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(field.name for field in dataclasses.fields(Kernel))
        table.writerows(dataclasses.astuple(kernel) for kernel in found.kernels)
    return found


def read(what: str, trace: Any, operations: Mapping[tuple[str, str], str]) -> Profile:
    """The kernels of a trace.

    Args:
        what: what was traced, for people.
        trace: the trace, a `jax.profiler.ProfileData`.
        operations: by module and instruction, JAX's name of it, as "jit(carry)/attend/exp".

    Raises:
        InputError: it has none.
    """
    by_device = {plane.name: found for plane in trace.planes if (found := list(_events(plane)))}
    if not by_device:
        lines = sorted(
            {f"{plane.name}: {line.name}" for plane in trace.planes for line in plane.lines}
        )
        raise InputError(
            "profile: the profiler's trace has no kernels of a GPU, a TPU or a CPU; it has "
            + (", ".join(lines) or "nothing")
        )
    # The host computes as well beside an accelerator.
    device = max(by_device, key=lambda name: (name != _HOST, _own(by_device[name])))
    events = sorted(by_device[device], key=lambda event: event.start)
    waits, busy = _waits(events)
    totals: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
    for event in events:
        totals[_identity(event, operations)].append(event.own)
    kernels = [
        Kernel(*identity, calls=len(own), seconds=1e-9 * sum(own))
        for identity, own in totals.items()
    ]
    seconds = 1e-9 * (max(event.end for event in events) - events[0].start)
    return Profile(
        what=what,
        device=device,
        seconds=seconds,
        busy_seconds=busy,
        idle=1 - busy / seconds if seconds else 0.0,
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)),
        scopes=_summed(
            (f"{kernel.program} {kernel.scope}".strip(), kernel.calls, kernel.seconds)
            for kernel in kernels
        ),
        waits=_summed(waits),
    )


@dataclasses.dataclass
class _Event:
    """One run of a kernel; times in ns.

    Attributes:
        name, module, instruction: the device's name, and the compiler's; "" where there is none.
        start, end: when it ran.
        own: how long, without what ran inside of it.
    """

    name: str
    module: str
    instruction: str
    start: float
    end: float
    own: float


_HOST = "/host:CPU"  # the profiler's name of it
# Loops and calls of a CPU, whose time is that of what is inside, on this thread or on another.
_WAITING = re.compile(r"(while|conditional|call)(\.\d+)?")


def _events(plane: Any) -> Iterator[_Event]:
    """The kernels of a device's plane, or of the host's where it is the CPU that computes."""
    on_host = plane.name == _HOST
    if not (on_host or plane.name.startswith("/device:")):
        return
    lines = [(line.name, line) for line in plane.lines]
    if any(name.startswith("Stream") for name, _ in lines):  # a GPU's; others are made of these
        lines = [(name, line) for name, line in lines if name.startswith("Stream")]
    elif not on_host:  # a TPU's; others are sums of these
        lines = [(name, line) for name, line in lines if name == "XLA Ops"]
    for _, line in lines:
        under_way: list[_Event] = []
        for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
            about = {name: value for name, value in event.stats if name in _STATS}
            # A TPU's event is called by the whole instruction, %name = ...
            name = event.name.partition(" = ")[0].lstrip("%")
            instruction = str(about.get("hlo_op", "")).partition(" = ")[0].lstrip("%")
            if on_host and (not instruction or _WAITING.fullmatch(instruction)):
                continue
            one = _Event(
                name,
                str(about.get("hlo_module", "")),
                instruction or name,
                event.start_ns,
                event.start_ns + event.duration_ns,
                event.duration_ns,
            )
            while under_way and under_way[-1].end <= one.start:
                under_way.pop()
            # One that is still at it when the next begins holds it only if it ends after it: a GPU
            # begins a kernel while the one before comes to its end.
            if under_way and one.end <= under_way[-1].end:
                under_way[-1].own -= one.own
            under_way.append(one)
            yield one


_STATS = ("hlo_op", "hlo_module")


def _own(events: Iterable[_Event]) -> float:
    return sum(event.own for event in events)


def _waits(events: Iterable[_Event]) -> tuple[list[tuple[str, int, float]], float]:
    """Seconds between kernels, each with the program that ran next; and those with any kernel.

    Args:
        events: in the order of their starts.
    """
    waits, busy, end = [], 0.0, None
    for event in events:
        if end is not None and event.start > end:
            waits.append((_program(event.module) or event.name, 1, 1e-9 * (event.start - end)))
        begin = event.start if end is None else max(end, event.start)
        end = event.end if end is None else max(end, event.end)
        busy += 1e-9 * (end - begin)
    return waits, busy


def _summed(parts: Iterable[tuple[str, int, float]]) -> tuple[Share, ...]:
    """Parts of the same name together, by time."""
    calls: dict[str, int] = collections.defaultdict(int)
    seconds: dict[str, float] = collections.defaultdict(float)
    for what, number, taken in parts:
        calls[what] += number
        seconds[what] += taken
    shares = [Share(what, calls[what], taken) for what, taken in seconds.items()]
    return tuple(sorted(shares, key=lambda share: -share.seconds))


def _identity(event: _Event, operations: Mapping[tuple[str, str], str]) -> tuple[str, ...]:
    """Program, scope, operation and name of an event's kernel."""
    # A kernel in a CUDA graph is called as its instruction, and what launched the graph is not.
    called = (operations.get((event.module, _plain(n))) for n in (event.name, event.instruction))
    *scopes, operation = next(filter(None, called), "").split("/")
    inside = [part for part in map(_unwrapped, scopes[1:]) if not _STRUCTURE.fullmatch(part)]
    return _program(event.module), "/".join(inside), operation, event.name


def _program(module: str) -> str:
    """The function that a module was compiled of."""
    return module.removeprefix("jit_").partition("(")[0]


def _plain(instruction: str) -> str:
    """An instruction's name with the letters that a GPU's kernel may have."""
    return re.sub(r"[^A-Za-z0-9]", "_", instruction)


def _unwrapped(part: str) -> str:
    """carry of jit(carry), and "" of vmap()."""
    while wrapped := re.fullmatch(r"\w+\((.*)\)", part):
        part = wrapped[1]
    return part


# Parts of an operation's name that JAX's own loops, branches and calls make.
_STRUCTURE = re.compile(
    r"|main|while|body|cond|scan|closed_call|branch_\d+_fun|pjit|remat|checkpoint"
)

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def _operation_names() -> dict[tuple[str, str], str]:
    """By module and instruction, JAX's name of it, of all programs that are loaded."""
    names = {}
    for executable in jax.local_devices()[0].client.live_executables():
        try:
            modules = executable.hlo_modules()
        except JaxRuntimeError:  # a backend that keeps none
            continue
        for module in modules:
            for instruction, name in _INSTRUCTION.findall(module.to_string()):
                names.setdefault((module.name, _plain(instruction)), name)
    return names
