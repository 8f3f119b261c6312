"""Tables of speed, and of numerical error."""

from collections.abc import Sequence

from jaxmed.report import rendering
from jaxmed.validation import chips
from jaxmed.validation.benchmark import Figures, GenerationFigures
from jaxmed.validation.lists import ListFigures
from jaxmed.validation.numerical_error import NumericalError


def table(figures: Figures) -> list[str]:
    """The figures of the engine for people."""
    return rendering.lines("speed.txt.j2", figures=figures)


def lists_table(figures: ListFigures) -> list[str]:
    """The figures of short lists for people."""
    return rendering.lines("list_speed.txt.j2", figures=figures)


def generation_table(figures: GenerationFigures) -> list[str]:
    """The figures of generation for people."""
    return rendering.lines("generation_speed.txt.j2", figures=figures)


def compiled_table(figures: Sequence[chips.Figures]) -> list[str]:
    """What was compiled for chips, for people: every program, and a table of the loops."""
    return rendering.lines("compiled.txt.j2", figures=figures)


def numerical_error_table(rows: Sequence[NumericalError]) -> list[str]:
    """Numerical errors for people."""
    return rendering.lines("numerical_error.txt.j2", rows=rows)
