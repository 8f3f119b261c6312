"""What compilation takes: JAX tells of every program that it compiles or finds in its cache."""

import dataclasses

import jax

_TRACED, _LOWERED, _COMPILED = (
    f"/jax/core/compile/{step}_duration"
    for step in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
_FOUND = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What has been compiled.

    Attributes:
        programs: that were compiled.
        cached: that were found in the cache instead.
        seconds: that both took, tracing included.
    """

    programs: int = 0
    cached: int = 0
    seconds: float = 0.0

    @property
    def told(self) -> str:
        """A sentence on it; "" where nothing was compiled."""
        if not (self.programs or self.cached):
            return ""
        return (
            f"Compilation took {self.seconds:.0f} seconds: {self.programs} programs were compiled, "
            f"{self.cached} came from the cache"
        )

    def since(self, earlier: "Compilation") -> "Compilation":
        """What has been compiled between two moments."""
        return Compilation(
            programs=self.programs - earlier.programs,
            cached=self.cached - earlier.cached,
            seconds=self.seconds - earlier.seconds,
        )


def so_far() -> Compilation:
    """What this process has compiled."""
    return Compilation(
        programs=_counted.ready - _counted.cached,
        cached=_counted.cached,
        seconds=_counted.seconds,
    )


class _Counted:
    """Counts what JAX tells.

    Attributes:
        ready: programs that were compiled or found.
        cached: those that were found.
        seconds: during which either went on; functions are traced inside of others.
    """

    def __init__(self):
        self.ready = self.cached = 0
        self.seconds = 0.0
        self._inner: list[tuple[float, float]] = []  # spans that a later one may hold

    def span(self, event: str, start_time: float, end_time: float, **_) -> None:
        """A step of a compilation, told when it ends."""
        if event not in (_TRACED, _LOWERED, _COMPILED):
            return
        self.ready += event == _COMPILED
        while self._inner and self._inner[-1][0] >= start_time:
            inner = self._inner.pop()
            self.seconds -= inner[1] - inner[0]
        self._inner.append((start_time, end_time))
        self.seconds += end_time - start_time

    def event(self, event: str, **_) -> None:
        """Something that happened."""
        self.cached += event == _FOUND


_counted = _Counted()
jax.monitoring.register_event_time_span_listener(_counted.span)
jax.monitoring.register_event_listener(_counted.event)
