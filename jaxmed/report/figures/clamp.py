"""Figures of units that were held still: how conditions compare."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxmed.report.figures.canvas import (
    ABSENT,
    FAINT,
    INK,
    TEXT_SIZE,
    label_axes,
    legend,
    panel,
    panels,
    whole_number_ticks,
)
from jaxmed.report.numbers import Measured

# What figures call rates (by label and measure), conditions and doses.
RATE_TITLES = {
    ("harmful", "harm"): "harm,\nharmful prompts",
    ("harmful", "refusal"): "refusal,\nharmful prompts",
    ("benign", "compliance"): "compliance,\nbenign prompts",
    ("overrefusal", "refusal"): "refusal, harmless\nthat look harmful",
    ("creative", "compliance"): "compliance,\ncreative prompts",
    ("benign", "harm"): "judged harmful,\nbenign prompts",
    ("overrefusal", "harm"): "judged harmful,\nonly look harmful",
    ("creative", "harm"): "judged harmful,\ncreative prompts",
}
CONDITION_TITLES = {
    "plain": "plain",
    "clamp": "units held",
    "random": "random (dots: each draw)",
    "module": "whole modules",
}
DOSE_TITLES = {"top": "number of units", "strength": "strength"}
# Of what units that are held still change, and of the conditions that are compared. Where two rates
# are the same, what is drawn first, large and hollow, shows around what is drawn over it.
_RATE_COLOURS = {"harm": "#d55e00", "refusal": "#7b4fa3", "compliance": "#0072b2"}
_RATE_MARKERS = {"harm": "s", "refusal": "s", "compliance": "o"}
_RATE_SIZES = {"harm": 10.0, "refusal": 10.0, "compliance": 4.5}
_RATE_LINES = {"harm": 3.2, "refusal": 3.2, "compliance": 1.3}
_RATE_FILLS = {"harm": "none", "refusal": "none", "compliance": "full"}
_CONDITIONS = {
    "plain": ("#222222", "o"),
    "clamp": ("#d55e00", "D"),
    "random": ("#0072b2", "s"),
    "module": ("#7b4fa3", "^"),
}
_LINEAR_DOSES = 16  # above, doubling the dose is one step to the right


def draw_conditions(
    rates: dict[str, dict[str, Measured]], draws: dict[str, list[float]], titles: dict[str, str]
) -> Figure:
    """Rates under the plain model, the units held, random units and whole modules.

    Args:
        rates: by title of the rate, then by condition.
        draws: by title of the rate, the means of the single draws of random units.
        titles: of the conditions, in their order.
    """
    figure, axes = panel(0.9 + 0.72 * len(rates))
    steps = (np.arange(len(titles)) - (len(titles) - 1) / 2) * 0.19
    offsets = dict(zip(titles, steps, strict=True))
    for condition, title in titles.items():
        colour, marker = _CONDITIONS[condition]
        rows = {
            place: by_condition[condition]
            for place, by_condition in enumerate(rates.values())
            if condition in by_condition
        }
        axes.errorbar(
            [row.value for row in rows.values()],
            [place + offsets[condition] for place in rows],
            xerr=_bars_around(list(rows.values())),
            fmt=marker,
            label=title,
            color=colour,
            markersize=5.5,
            elinewidth=1.3,
            capsize=2.5,
        )
    for place, means in enumerate(draws.values()):
        axes.plot(
            means,
            np.full(len(means), place + offsets["random"] + 0.1),
            ".",
            color=_CONDITIONS["random"][0],
            markersize=4.5,
            alpha=0.6,
        )
    _name_rows(axes, list(rates))
    axes.set_xlim(-0.02, 1.02)
    label_axes(axes, "rate, with 95% interval")
    legend(figure, axes)
    return figure


def draw_doses(
    curves: dict[str, dict[str, list[tuple[float, Measured]]]], titles: dict[str, str]
) -> Figure:
    """Rates by how much is held, a panel for each kind of dose.

    Args:
        curves: by the dose's title, then by measure: the dose, and the rate.
        titles: of the measures.
    """
    figure, grid = panels(3.4, columns=len(curves), sharey=True)
    for axes, (dose, by_measure) in zip(grid[0], curves.items(), strict=True):
        for measure, points in by_measure.items():
            axes.errorbar(
                [place for place, _ in points],
                [rate.value for _, rate in points],
                yerr=_bars_around([rate for _, rate in points]),
                label=titles[measure],
                color=_RATE_COLOURS[measure],
                marker=_RATE_MARKERS[measure],
                markersize=_RATE_SIZES[measure],
                fillstyle=_RATE_FILLS[measure],
                linewidth=_RATE_LINES[measure],
                elinewidth=1.2,
                capsize=1.2 + _RATE_SIZES[measure] / 2,
                zorder=10 - _RATE_SIZES[measure],
            )
        places = [place for points in by_measure.values() for place, _ in points]
        if max(places) > _LINEAR_DOSES:
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        elif all(float(place).is_integer() for place in places):
            whole_number_ticks(axes.xaxis)
        axes.set_ylim(-0.03, 1.03)
        label_axes(axes, dose)
    grid[0, 0].set_ylabel("rate", fontsize=TEXT_SIZE, color=INK)
    legend(figure, grid[0, 0])
    return figure


def draw_alone(
    names: list[str], changes: dict[str, list[Measured | None]], titles: dict[str, str]
) -> Figure:
    """How far each unit moves rates when it is held alone.

    Args:
        names: of the units, from top to bottom.
        changes: by measure: of each unit the change; None where it is not known.
        titles: of the measures.
    """
    figure, axes = panel(1.2 + 0.34 * len(names))
    offsets = (np.arange(len(changes)) - (len(changes) - 1) / 2) * 0.3
    for offset, (measure, by_unit) in zip(offsets, changes.items(), strict=True):
        known = {place: change for place, change in enumerate(by_unit) if change is not None}
        axes.errorbar(
            [change.value for change in known.values()],
            [place + offset for place in known],
            xerr=_bars_around(list(known.values())),
            fmt=_RATE_MARKERS[measure],
            label=titles[measure],
            color=_RATE_COLOURS[measure],
            markersize=5,
            elinewidth=1.2,
            capsize=2.5,
        )
    axes.axvline(0, color=FAINT, linewidth=0.8)
    _name_rows(axes, names)
    label_axes(axes, "change from the plain model, with 95% interval")
    legend(figure, axes)
    return figure


def _bars_around(rows: Sequence[Measured]) -> np.ndarray:
    """Error bars down to `low` and up to `high`, [2, row]."""
    down = [row.value - row.low for row in rows]
    up = [row.high - row.value for row in rows]
    return np.maximum([down, up], 0)


def _name_rows(axes: Axes, names: list[str]) -> None:
    """Names the rows of points, from top to bottom, and parts them by lines."""
    for place in range(1, len(names)):
        axes.axhline(place - 0.5, color=ABSENT, linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
