"""What the text of a compiled program says: its loops, the cycles that the compiler expects of each
operation, the passes of its matrix products, how often an array is read or written, and what
devices exchange.

It reads XLA's own text (`jax.stages.Compiled.as_text`) as the TPU compiler writes it: an operation
of a computation has `estimated_cycles`, those inside a fusion are counted in it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_PRECISION = re.compile(r"operand_precision=\{(\w+),(\w+)\}")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")

# Into how many bfloat16 parts a float32 operand is cut, and how many products of parts are made, by
# the precision of the product: with a bfloat16 operand, and with a float32 one.
_PASSES = {"default": (1, 1), "high": (2, 3), "highest": (3, 6)}


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and dimensions of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """That it takes, padding aside; a truth value takes one."""
        bits = _BITS.search(self.dtype)
        return self.size * (int(bits[0]) // 8 if bits else 1)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a computation.

    Attributes:
        name, kind: its own, and what it does: "fusion", "while", ...
        arrays: what it gives.
        operands: names of what it takes.
        text: the line that says all of it.
    """

    name: str
    kind: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def cycles(self) -> int:
        """That the compiler expects it to take; 0 where it says nothing."""
        found = _CYCLES.search(self.text)
        return int(found[1]) if found else 0

    @property
    def scope(self) -> str:
        """Where in the program that was traced it comes from."""
        found = _SCOPE.search(self.text)
        return found[1] if found else ""

    @property
    def collective(self) -> str:
        """Its kind if devices exchange numbers by it; of one that is begun and later ended, where
        it ends. "" for all others."""
        kind = self.kind.removesuffix("-done")
        return kind if kind in _COLLECTIVES else ""

    def called(self) -> tuple[str, ...]:
        """Computations of a fusion or a call."""
        return tuple(_CALLS.findall(self.text))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop, or the whole program, which is one of a single turn.

    Attributes:
        scope: where in the program that was traced it comes from.
        turns: how many it takes; None where that is known only at run time.
        own_cycles: of one turn, without those of the loops inside.
        loops: those inside.
        computation: the name of what is done in a turn.
    """

    scope: str
    turns: int | None
    own_cycles: int
    loops: tuple["Loop", ...]
    computation: str

    @property
    def turn_cycles(self) -> int:
        """Of one turn; a loop inside whose number of turns is not known counts once."""
        return self.own_cycles + sum((loop.turns or 1) * loop.turn_cycles for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of a kind in a program.

    Attributes:
        kind: "all-gather", "all-reduce", ...
        loops: how many loops they are inside of; each is done in every turn of the innermost.
        number: how many there are.
        bytes: that they give each device, once each.
    """

    kind: str
    loops: int
    number: int
    bytes: int


class Text:
    """A compiled program.

    Attributes:
        computations: by name, the operations of each.
        fused: names of the computations that are a fusion's inside: no array in them is in memory.
        program: what is done once, and the loops in it.
    """

    def __init__(self, text: str):
        self.computations, self._entry = _computations(text)
        self.fused = frozenset(self._reached({"fusion", "reduce", "sort", "scatter", "map"}))
        self.program = self._loop("", 1, self._entry)

    def _reached(self, kinds: Collection[str]) -> Iterator[str]:
        """Computations that operations of these kinds call, and those that these call."""
        waiting = [
            name
            for operations in self.computations.values()
            for operation in operations
            if operation.kind in kinds
            for name in operation.called()
        ]
        seen = set()
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                yield name
                waiting += [n for of in self.computations.get(name, ()) for n in of.called()]

    def _loop(self, scope: str, turns: int | None, computation: str) -> Loop:
        own, loops = 0, []
        for operation in self.computations[computation]:
            own += operation.cycles
            if operation.kind == "while":
                (body,), known = _BODY.findall(operation.text), _TURNS.search(operation.text)
                loops.append(self._loop(operation.scope, known and int(known[1]), body))
            elif operation.kind in ("call", "async-start", "conditional"):
                # Of a conditional's branches the dearest is counted.
                inner = [self._loop("", 1, name) for name in self._called(operation)]
                if inner:
                    dearest = max(inner, key=lambda loop: loop.turn_cycles)
                    own += dearest.own_cycles
                    loops += dearest.loops
        return Loop(scope, turns, own, tuple(loops), computation)

    def _called(self, operation: Operation) -> list[str]:
        if operation.kind != "conditional":
            return [name for name in operation.called() if name in self.computations]
        found = [name for names in _BRANCHES.findall(operation.text) for name in names if name]
        return re.findall(r"[\w.\-]+", ",".join(found))

    def cycles_in(self, loop: Loop, scope: str) -> int:
        """Cycles of the operations of one turn of a loop whose scope has a part of that name."""
        operations = self.computations[loop.computation]
        return sum(of.cycles for of in operations if scope in of.scope.split("/"))

    def touched(self, loop: Loop, sizes: Collection[int]) -> int:
        """How often, in one turn of a loop, an array of one of these sizes is read or written.

        An operation that takes the same array twice reads it once; what only renames an array (a
        bitcast, a tuple) does neither. What is inside a fusion is not in memory.

        Args:
            loop: the loop; what loops inside of it do is not counted.
            sizes: numbers in an array.
        """
        operations = self.computations[loop.computation]
        given = {operation.name: operation for operation in operations}
        total = 0
        for operation in operations:
            if operation.kind in _RENAMES:
                continue
            total += sum(array.size in sizes for array in operation.arrays)
            for name in set(operation.operands):
                of = given.get(name)
                total += of is not None and any(array.size in sizes for array in of.arrays[:1])
        return total

    @functools.cached_property
    def collectives(self) -> tuple[Operation, ...]:
        """The operations by which devices exchange numbers; of one that is begun and later ended,
        its end."""
        return tuple(
            operation
            for operations in self.computations.values()
            for operation in operations
            if operation.collective
        )

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The collectives, those that are done once first."""
        found: dict[tuple[int, str], list[int]] = {}
        for loops, operation in self._exchanged(self._entry, 0):
            given = sum(array.bytes for array in operation.arrays)
            found.setdefault((loops, operation.collective), []).append(given)
        return tuple(
            Exchange(kind, loops, len(given), sum(given))
            for (loops, kind), given in sorted(found.items())
        )

    def _exchanged(self, computation: str, loops: int) -> Iterator[tuple[int, Operation]]:
        """The collectives of a computation and of those that it calls, and how many loops they are
        inside of."""
        for operation in self.computations.get(computation, ()):
            if operation.collective:
                yield loops, operation
            elif operation.kind == "while":
                (body,) = _BODY.findall(operation.text)
                yield from self._exchanged(body, loops + 1)
            elif operation.kind not in ("async-update", "async-done"):  # what was begun
                for name in {*operation.called(), *self._called(operation)}:
                    yield from self._exchanged(name, loops)

    def in_memory(self) -> Iterator[Array]:
        """The arrays that operations outside of fusions give."""
        for name, operations in self.computations.items():
            if name not in self.fused:
                for operation in operations:
                    yield from operation.arrays

    @property
    def product_cycles(self) -> int:
        """Of the operations that are matrix products or have one inside."""
        return sum(
            operation.cycles
            for name, operations in self.computations.items()
            if name not in self.fused
            for operation in operations
            if operation.kind in _PRODUCTS or any(map(self._multiplies, operation.called()))
        )

    def _multiplies(self, computation: str) -> bool:
        """Whether a computation, or one that it calls, has a matrix product."""
        return any(
            operation.kind in _PRODUCTS or any(map(self._multiplies, operation.called()))
            for operation in self.computations.get(computation, ())
        )

    @functools.cached_property
    def products(self) -> tuple["Product", ...]:
        """All matrix products."""
        found = []
        for operations in self.computations.values():
            given = {operation.name: operation for operation in operations}
            for operation in operations:
                if operation.kind in _PRODUCTS:
                    found.append(_product(operation, given))
        return tuple(found)


_PRODUCTS = ("convolution", "dot")
_COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
# They make no array.
_RENAMES = ("bitcast", "tuple", "get-tuple-element", "parameter", "while", "constant")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        operands, result: what it multiplies, and what it gives.
        passes: products of bfloat16 operands that the matrix unit makes for it.
    """

    operands: tuple[Array, ...]
    result: Array
    passes: int

    @property
    def multiplications(self) -> int:
        """Of numbers, in one pass: m k n, if no axis is one of a batch."""
        return math.isqrt(math.prod(array.size for array in (*self.operands, self.result)))


def _product(operation: Operation, given: Mapping[str, Operation]) -> Product:
    operands = tuple(given[name].arrays[0] for name in operation.operands)
    found = _PRECISION.search(operation.text)
    precision = max(found.groups(), key=list(_PASSES).index) if found else "default"
    narrow = sum(array.dtype == "bf16" for array in operands)
    with_narrow, wide = _PASSES[precision]
    passes = 1 if narrow == len(operands) else with_narrow if narrow else wide
    return Product(operands, operation.arrays[0], passes)


def _computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    """The computations by name, and the name of the one that is the program.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    found, entry, current = {}, None, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (named := _NAMED.match(line)):
            current.append(_operation(named[1], line, named.end()))
    if entry is None:
        raise ValueError("no computation is the program's entry: this is not a compiled program")
    return found, entry


def _operation(name: str, line: str, start: int) -> Operation:
    """An operation, whose type begins at `start` of its line."""
    # A tuple's type has spaces; an array's has none.
    end = _closed(line, start) if line[start] == "(" else line.index(" ", start)
    kind, _, _ = line[end:].strip().partition("(")
    first = line.index("(", end)
    arguments = line[first : _closed(line, first)]
    arrays = [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(line[start:end])
    ]
    return Operation(name, kind, tuple(arrays), tuple(re.findall(r"%([\w.\-]+)", arguments)), line)


def _closed(line: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"a bracket is not closed: {line[:200]}")
