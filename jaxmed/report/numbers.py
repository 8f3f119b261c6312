"""Numbers as people read them; templates have these functions as filters."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number and its 95% interval; low and high are NaN where there is none."""

    value: float
    low: float
    high: float


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals; a small one is not shown as 0, which it is not."""
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:.{decimals}f}" if round(value, decimals) or not value else f"{value:.1g}"
    return shown.replace("-", "−")


def decimals(value: float) -> int:
    """How many decimals show three digits of a value."""
    if not value or not math.isfinite(value):
        return 2
    return max(0, 2 - math.floor(math.log10(abs(value))))


def number(value: float) -> str:
    """A number with three digits."""
    return fixed(value, decimals(value))


def interval(low: float | None, high: float | None, decimals: int) -> str:
    """An interval in brackets, with so many decimals."""
    if low is None or math.isnan(low):
        return "–"
    return f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def percent(fraction: float | None) -> str:
    """A fraction in whole per cent."""
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{round(100 * fraction)}%".replace("-", "−")
