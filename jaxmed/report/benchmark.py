"""Tables of speed, and of numerical error."""

from collections.abc import Iterable, Sequence

from jaxmed.report import rendering
from jaxmed.validation import chips
from jaxmed.validation.benchmark import Figures, GenerationFigures
from jaxmed.validation.kernels import Profile
from jaxmed.validation.lists import ListFigures
from jaxmed.validation.numerical_error import NumericalError


def table(figures: Figures) -> list[str]:
    """The figures of the engine for people."""
    return rendering.lines("speed.txt.j2", figures=figures) + _profiles([figures.profile])


def lists_table(figures: ListFigures) -> list[str]:
    """The figures of short lists for people."""
    profiles = _profiles(each.profile for each in figures.lists)
    return rendering.lines("list_speed.txt.j2", figures=figures) + profiles


def generation_table(figures: GenerationFigures) -> list[str]:
    """The figures of generation for people."""
    lines = rendering.lines("generation_speed.txt.j2", figures=figures)
    return lines + _profiles([figures.profile])


def compiled_table(figures: Sequence[chips.Figures]) -> list[str]:
    """What was compiled for chips, for people: every program, and a table of the loops."""
    return rendering.lines("compiled.txt.j2", figures=figures)


def numerical_error_table(rows: Sequence[NumericalError]) -> list[str]:
    """Numerical errors for people."""
    return rendering.lines("numerical_error.txt.j2", rows=rows)


_KERNELS = 25  # and scopes, that a table tells of
_WAITS = 5


def _profiles(profiles: Iterable[Profile | None]) -> list[str]:
    """A table for each profile that there is: scopes, kernels, and what the device waits for."""
    told = []
    for profile in filter(None, profiles):
        told += [
            "",
            *rendering.lines("kernels.txt.j2", profile=profile, most=_KERNELS, most_waits=_WAITS),
        ]
    return told
