"""What all figures share: colours, axes, labels."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

BARS_IN_FIGURE = 20
# Okabe and Ito's colours, which colour-blind readers tell apart; estimands and modules never
# share one.
COLOURS = {"nie": "#0072b2", "tie": "#d55e00", "attention": "#7b4fa3", "mlp": "#00785a"}
# Of several series in one panel; overlapping lines are told apart by their dashes.
SERIES = ("#0072b2", "#d55e00", "#222222", "#009e73", "#cc79a7", "#e69f00", "#8a8a8a", "#56b4e9")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))
MARKERS = {"nie": "o", "tie": "s", "attention": "o", "mlp": "s"}
INK, FAINT, ABSENT = "#222222", "#8a8a8a", "#e4e4e4"
TEXT_SIZE = 11  # points, in a figure of 6.8 inches
_LAST_IN_LEGEND = ("mean TE", "planted")


def largest(size: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest sizes, the largest first."""
    return np.argsort(-size, kind="stable")[:count]


def panels(height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """A figure of 6.8 by `height` inches, and its panels, [row, column] of Axes.

    Args:
        height: in inches.
        rows, columns: of panels.
        options: of `Figure.subplots`.
    """
    layout = ConstrainedLayoutEngine(wspace=0.05, hspace=0.03)
    figure = Figure(figsize=(6.8, height), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        style(axes)
    return figure, grid


def panel(height: float) -> tuple[Figure, Axes]:
    """A figure of 6.8 by `height` inches with one panel."""
    figure, grid = panels(height)
    return figure, grid[0, 0]


def style(axes: Axes) -> None:
    """Gives axes the look of all figures."""
    axes.tick_params(labelsize=TEXT_SIZE - 1, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def label_axes(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    axes.set_xlabel(x, fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel(y, fontsize=TEXT_SIZE, color=INK)
    axes.set_title(title, fontsize=TEXT_SIZE, color=INK, loc="left")


def whole_number_ticks(axis: Axis, most: int = 9) -> None:
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def legend(figure: Figure, axes: Axes) -> None:
    """The legend of one panel, above all of them."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))  # one entry for several rings
    labels = sorted(by_label, key=lambda label: label in _LAST_IN_LEGEND)
    figure.legend(
        [by_label[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        fontsize=TEXT_SIZE - 1,
    )
