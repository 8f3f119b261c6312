"""What all figures share: colours, axes, labels."""

import numpy as np
from matplotlib import figure, ticker

BARS_IN_FIGURE = 20
# Okabe and Ito's colours, which colour-blind readers tell apart; directions and modules never
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


def canvas(height: float, rows: int = 1, columns: int = 1, **options):
    drawing = figure.Figure(figsize=(6.8, height), layout="constrained")
    drawing.get_layout_engine().set(wspace=0.05, hspace=0.03)
    axes = drawing.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.tick_params(labelsize=TEXT_SIZE - 1, color=FAINT, labelcolor=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
    return drawing, axes


def label_axes(axis, x: str = "", y: str = "", title: str = "") -> None:
    axis.set_xlabel(x, fontsize=TEXT_SIZE, color=INK)
    axis.set_ylabel(y, fontsize=TEXT_SIZE, color=INK)
    axis.set_title(title, fontsize=TEXT_SIZE, color=INK, loc="left")


def whole_number_ticks(axis, most: int = 9) -> None:
    axis.set_major_locator(ticker.MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def legend(drawing, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))  # one entry for several rings
    labels = sorted(by_label, key=lambda label: label in _LAST_IN_LEGEND)
    drawing.legend(
        [by_label[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        fontsize=TEXT_SIZE - 1,
    )
