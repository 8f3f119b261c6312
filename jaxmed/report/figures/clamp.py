"""Figures of units that were held still: how conditions compare."""

import numpy as np
from matplotlib import figure

from jaxmed.report.figures.canvas import (
    ABSENT,
    FAINT,
    INK,
    TEXT_SIZE,
    canvas,
    label_axes,
    legend,
    whole_number_ticks,
)

# Of what units that are held still change, and of the conditions that are compared.
_RATE_COLOURS = {"harm": "#d55e00", "refusal": "#7b4fa3", "compliance": "#0072b2"}
_CONDITIONS = {
    "plain": ("#222222", "o"),
    "clamp": ("#d55e00", "D"),
    "random": ("#0072b2", "s"),
    "module": ("#7b4fa3", "^"),
}
_BOUNDS = ("mean", "low", "high")
_LINEAR_DOSES = 16  # above, doubling the dose is one step to the right


def draw_conditions(
    rates: dict[str, dict[str, dict]], draws: dict[str, list[float]], titles: dict[str, str]
) -> figure.Figure:
    """Rates under the plain model, the units held, random units and whole modules.

    Args:
        rates: by title of the rate, then by condition: mean, low and high.
        draws: by title of the rate, the means of the single draws of random units.
        titles: of the conditions, in their order.
    """
    drawing, axes = canvas(0.9 + 0.72 * len(rates))
    axis = axes[0, 0]
    offsets = dict(
        zip(titles, (np.arange(len(titles)) - (len(titles) - 1) / 2) * 0.19, strict=True)
    )
    for condition, title in titles.items():
        colour, marker = _CONDITIONS[condition]
        rows = [
            (place, by[condition]) for place, by in enumerate(rates.values()) if condition in by
        ]
        mean, low, high = (np.array([row[name] for _, row in rows]) for name in _BOUNDS)
        axis.errorbar(
            *(mean, [place + offsets[condition] for place, _ in rows]),
            xerr=np.maximum([mean - low, high - mean], 0),
            **{"fmt": marker, "label": title, "color": colour, "markersize": 5.5},
            **{"elinewidth": 1.3, "capsize": 2.5},
        )
    for place, means in enumerate(draws.values()):
        axis.plot(
            *(means, np.full(len(means), place + offsets["random"] + 0.1), "."),
            **{"color": _CONDITIONS["random"][0], "markersize": 4.5, "alpha": 0.6},
        )
    _bands(axis, list(rates))
    axis.set_xlim(-0.02, 1.02)
    label_axes(axis, "rate, with 95% interval")
    legend(drawing, axis)
    return drawing


def _bands(axis, names: list[str]) -> None:
    """Names the rows of points, from top to bottom, and parts them by lines."""
    for place in range(1, len(names)):
        axis.axhline(place - 0.5, color=ABSENT, linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)


def draw_doses(
    curves: dict[str, dict[str, list[tuple[float, dict]]]], titles: dict[str, str]
) -> figure.Figure:
    """Rates by how much is held, a panel for each kind of dose.

    Args:
        curves: by the dose's title, then by measure: the dose, and mean, low and high.
        titles: of the measures.
    """
    drawing, axes = canvas(3.4, columns=len(curves), sharey=True)
    for axis, (dose, by_measure) in zip(axes[0], curves.items(), strict=True):
        for measure, points in by_measure.items():
            places = [place for place, _ in points]
            mean, low, high = (np.array([row[name] for _, row in points]) for name in _BOUNDS)
            axis.errorbar(
                *(places, mean),
                yerr=np.maximum([mean - low, high - mean], 0),
                **{"label": titles[measure], "color": _RATE_COLOURS[measure]},
                **{"marker": "o" if measure == "compliance" else "s", "markersize": 5},
                **{"linewidth": 1.4, "elinewidth": 1.2, "capsize": 2.5},
            )
        if max(places) > _LINEAR_DOSES:
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        elif all(float(place).is_integer() for place in places):
            whole_number_ticks(axis.xaxis)
        axis.set_ylim(-0.03, 1.03)
        label_axes(axis, dose)
    axes[0, 0].set_ylabel("rate", fontsize=TEXT_SIZE, color=INK)
    legend(drawing, axes[0, 0])
    return drawing


def draw_alone(
    names: list[str], changes: dict[str, list[dict | None]], titles: dict[str, str]
) -> figure.Figure:
    """How far each unit moves rates when it is held alone.

    Args:
        names: of the units, from top to bottom.
        changes: by measure: of each unit change, change_low and change_high; None where unknown.
        titles: of the measures.
    """
    drawing, axes = canvas(1.2 + 0.34 * len(names))
    axis = axes[0, 0]
    offsets = (np.arange(len(changes)) - (len(changes) - 1) / 2) * 0.3
    for offset, (measure, rows) in zip(offsets, changes.items(), strict=True):
        known = [(place, row) for place, row in enumerate(rows) if row is not None]
        change, low, high = (
            np.array([row[name] for _, row in known])
            for name in ("change", "change_low", "change_high")
        )
        axis.errorbar(
            *(change, [place + offset for place, _ in known]),
            xerr=np.maximum([change - low, high - change], 0),
            **{"fmt": "o" if measure == "compliance" else "s", "label": titles[measure]},
            **{"color": _RATE_COLOURS[measure], "markersize": 5, "elinewidth": 1.2, "capsize": 2.5},
        )
    axis.axvline(0, color=FAINT, linewidth=0.8)
    _bands(axis, names)
    label_axes(axis, "change from the plain model, with 95% interval")
    legend(drawing, axis)
    return drawing
