"""Figures of a certificate: how methods do."""

import numpy as np
from matplotlib.figure import Figure

from jaxmed.report.figures.canvas import DASHES, FAINT, INK, SERIES, TEXT_SIZE, label_axes, panels
from jaxmed.report.figures.effects import SITE_TITLES


def draw_certificate(
    precision: dict[str, dict[tuple[str, str], float]], methods: dict[str, str]
) -> Figure:
    """How much of the planted truth each method finds, a map for each granularity.

    Args:
        precision: precision@k, by granularity, then by organism and method.
        methods: titles of the methods, in their order.
    """
    figure, grid = panels(1.0 + 2.9 * len(precision), rows=len(precision))
    for axes, (granularity, values) in zip(grid[:, 0], precision.items(), strict=True):
        names = list(dict.fromkeys(organism for organism, _ in values))
        rows = [method for method in methods if any(method == key[1] for key in values)]
        table = np.array([[values.get((name, row), np.nan) for name in names] for row in rows])
        axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=TEXT_SIZE - 1,
                    color="white" if value > 0.6 else INK,
                )
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axes.set_yticks(range(len(rows)), [methods[row] for row in rows])
        label_axes(axes, title=f"{SITE_TITLES.get(granularity, granularity)}: precision@k")
    return figure


def draw_faithfulness(
    curves: dict[str, dict[str, np.ndarray]], sizes: tuple[float, ...], methods: dict[str, str]
) -> Figure:
    """Faithfulness of circuits by their size, a panel for each organism.

    Args:
        curves: by organism and method, [size].
        sizes: of the circuits, fractions of all neurons.
        methods: titles of the methods, in their order.
    """
    columns = min(2, max(1, len(curves)))
    rows = max(1, -(-len(curves) // columns))
    figure, grid = panels(0.8 + 2.1 * rows, rows, columns, sharex=True, sharey=True)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (organism, by_method) in zip(grid.flat, curves.items(), strict=False):
        axes.axhline(1, color=FAINT, linewidth=0.8)
        for number, (method, title) in enumerate(methods.items()):
            if method in by_method:
                axes.plot(
                    sizes,
                    by_method[method],
                    label=title,
                    color=SERIES[number % len(SERIES)],
                    linewidth=1.4,
                    linestyle=DASHES[number % len(DASHES)],
                )
        axes.set_xscale("log")
        axes.set_ylim(-0.1, 1.3)  # what overshoots further is no better than what does so here
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
        label_axes(axes, title=organism)
    for axes in grid.flat[max(0, len(curves) - columns) : len(curves)]:
        axes.tick_params(labelbottom=True)  # none is below it in its column
    figure.supxlabel("neurons kept, of all", fontsize=TEXT_SIZE, color=INK)
    figure.supylabel("faithfulness", fontsize=TEXT_SIZE, color=INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=TEXT_SIZE - 1
    )
    return figure
