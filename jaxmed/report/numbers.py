"""Numbers as people read them; templates have these functions as filters."""

import dataclasses
import math

import numpy as np

Number = float | np.floating  # NumPy's are shown as Python's are


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number and its 95% interval; low and high are NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether there is one."""
        return not math.isnan(self.low)


def fixed(value: Number | None, decimals: int = 2) -> str:
    """A number with so many decimals; a small one is not shown as 0, which it is not."""
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:.{decimals}f}" if round(value, decimals) or not value else f"{value:.1g}"
    return shown.replace("-", "−")


def signed(value: Number, decimals: int = 2) -> str:
    """A change, with its sign."""
    return ("+" if value > 0 else "") + fixed(value, decimals)


def decimals(value: Number) -> int:
    """How many decimals show three digits of a value."""
    if not value or not math.isfinite(value):
        return 2
    return max(0, 2 - math.floor(math.log10(abs(value))))


def number(value: Number) -> str:
    """A number with three digits."""
    return fixed(value, decimals(value))


def rounded(value: Number) -> str:
    """A number that may be very large: three digits below 10, else two, and no more than a
    million."""
    if math.isnan(value):
        return "–"
    if value >= 1e6:
        return "over a million"
    if value < 10:
        return number(value)
    return f"{round(value, 1 - math.floor(math.log10(value))):,.0f}"


def interval(measured: Measured, decimals: int = 2) -> str:
    """The interval in brackets, with so many decimals."""
    if not measured.has_interval:
        return "–"
    return f"[{fixed(measured.low, decimals)}, {fixed(measured.high, decimals)}]"


def with_interval(measured: Measured | None) -> str:
    """A number with three digits, and its interval if it has one."""
    if measured is None:
        return "–"
    shown = number(measured.value)
    if not measured.has_interval:
        return shown
    return f"{shown} {interval(measured, decimals(measured.value))}"


def percent(fraction: float | None) -> str:
    """A fraction in whole per cent."""
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{round(100 * fraction)}%".replace("-", "−")


def q_value(value: Number) -> str:
    """A false discovery rate."""
    return "< 0.001" if value < 0.001 else fixed(value, 3)


def whole(value: int | np.integer) -> str:
    """A whole number, with commas between thousands."""
    return f"{value:,}"


def counted(number: int, one: str, several: str = "") -> str:
    """How many of something: "1 pair", "2 pairs"."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th."""
    ends = {1: "st", 2: "nd", 3: "rd"}
    end = "th" if number % 100 in (11, 12, 13) else ends.get(number % 10, "th")
    return f"{number:,}{end}"
