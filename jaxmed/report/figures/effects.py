"""Figures of effects: one for each granularity, for the screen, and for the joint set.

`draw_..._on` draws on axes that are given; `DRAWINGS` have the whole figures, panels and all.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from jaxmed.question.effects import ESTIMANDS
from jaxmed.question.sites import MODULE_SITES, TOKEN_SITES
from jaxmed.report.figures.canvas import (
    ABSENT,
    BARS_IN_FIGURE,
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    TEXT_SIZE,
    label_axes,
    largest,
    legend,
    panel,
    panels,
    whole_number_ticks,
)

SITE_TITLES = {
    "residual": "residual",
    "layer": "layer",
    "attention": "attention",
    "mlp": "MLP",
    "head": "heads",
    "neuron": "neurons",
}
ESTIMAND_TITLES = {
    "nie": "NIE: source’s value in the base run",
    "tie": "TIE: base’s value in the source run",
}
_DASHED = (0, (5, 3))


@dataclasses.dataclass(frozen=True)
class EstimandValues:
    """One estimand of every unit of a granularity.

    Attributes:
        mean: over pairs, in the metric's unit.
        low, high: its 95% interval; NaN where there is none.
        q: false discovery rate; NaN where it was not tested.
        share: of the mean TE, a fraction; NaN where there is too little to take a share of, or
            where it is not told.
    """

    mean: Float[np.ndarray, "unit"]
    low: Float[np.ndarray, "unit"]
    high: Float[np.ndarray, "unit"]
    q: Float[np.ndarray, "unit"]
    share: Float[np.ndarray, "unit"]

    def of(self, chosen: np.ndarray) -> "EstimandValues":
        """Those of some units, a mask or indices."""
        values = {name: value[chosen] for name, value in vars(self).items()}
        return dataclasses.replace(self, **values)


@dataclasses.dataclass(frozen=True)
class UnitTable:
    """Every unit of one granularity that any pair has.

    Attributes:
        granularity: which.
        layer, site, unit, position: where each unit is, as in the summary; -1 where one is not.
        n_pairs: how many pairs have it.
        nie, tie: the effects.
        group_size: adjacent neurons per unit.
    """

    granularity: str
    layer: Int[np.ndarray, "unit"]
    site: np.ndarray
    unit: Int[np.ndarray, "unit"]
    position: Int[np.ndarray, "unit"]
    n_pairs: Int[np.ndarray, "unit"]
    nie: EstimandValues
    tie: EstimandValues
    group_size: int = 1

    def __len__(self) -> int:
        return len(self.layer)

    def by_estimand(self) -> dict[str, EstimandValues]:
        """The effects by the names of their estimands, "nie" and "tie"."""
        return {"nie": self.nie, "tie": self.tie}

    def values(self, estimand: str) -> EstimandValues:
        """The effects by one estimand, "nie" or "tie"."""
        return self.by_estimand()[estimand]

    def size(self) -> Float[np.ndarray, "unit"]:
        """The larger of |mean NIE| and |mean TIE|."""
        return np.maximum(np.abs(self.nie.mean), np.abs(self.tie.mean))

    def of(self, chosen: np.ndarray) -> "UnitTable":
        """Some of the units, a mask or indices."""
        places = {
            name: getattr(self, name)[chosen]
            for name in ("layer", "site", "unit", "position", "n_pairs")
        }
        return dataclasses.replace(self, **places, nie=self.nie.of(chosen), tie=self.tie.of(chosen))

    def name(self, index: int | np.integer) -> str:
        """What a unit is called in figures, tables and sentences."""
        layer, unit = f"L{self.layer[index]}", self.unit[index]
        site = SITE_TITLES.get(self.site[index], self.site[index])
        match self.granularity:
            case "layer":
                return layer
            case "module":
                return f"{layer} {site}"
            case "head":
                return f"{layer}.h{unit}"
            case "token":
                place = self.position[index]
                return f"{layer} {site}, {f'token −{place}' if place else 'last token'}"
            case "neuron":
                return f"{layer}.n{unit}"
            case "direction":
                return f"{layer} {site}, direction {unit}"
            case _:
                raise ValueError(f"no granularity: {self.granularity}")


def draw_layers_on(
    axes: Axes,
    units: UnitTable,
    metric_unit: str,
    *,
    mean_te: float | None = None,
    planted: np.ndarray | None = None,
    estimands: Sequence[str] = ESTIMANDS,
) -> None:
    """Draws mean effects by layer, a line with intervals for each estimand.

    Args:
        axes: where to.
        units: of the layer granularity.
        metric_unit: of the effects, for the label.
        mean_te: a dashed line is drawn there; None for no line.
        planted: bool [unit], which units get a ring.
        estimands: those that are drawn.
    """
    everything = np.arange(len(units))
    series = [_Series(name, name.upper(), units.values(name), everything) for name in estimands]
    _lines_by_layer(axes, units, series, planted)
    _draw_te(axes, mean_te)
    label_axes(axes, "layer", f"mean effect ({metric_unit})")


def draw_modules_on(
    axes: Axes,
    units: UnitTable,
    metric_unit: str,
    estimand: str,
    *,
    mean_te: float | None = None,
    planted: np.ndarray | None = None,
) -> None:
    """Draws mean effects by layer, a line with intervals for attention and one for MLPs.

    Args:
        axes: where to.
        units: of the module granularity.
        metric_unit: of the effects, for the label.
        estimand: "nie" or "tie".
        mean_te: a dashed line is drawn there; None for no line.
        planted: bool [unit], which units get a ring.
    """
    series = [
        _Series(site, SITE_TITLES[site], units.values(estimand), np.flatnonzero(units.site == site))
        for site in MODULE_SITES
    ]
    _lines_by_layer(axes, units, series, planted)
    _draw_te(axes, mean_te)
    label_axes(axes, "layer", f"mean effect ({metric_unit})", ESTIMAND_TITLES[estimand])


def draw_heads_on(
    axes: Axes,
    units: UnitTable,
    estimand: str,
    *,
    limit: float | None = None,
    planted: np.ndarray | None = None,
) -> AxesImage:
    """Draws a map of mean effects, heads from left to right and layers upwards.

    Args:
        axes: where to.
        units: of the head granularity.
        estimand: "nie" or "tie".
        limit: the colour scale reaches from -limit to limit; by default `colour_limit`.
        planted: bool [unit], which units get a ring.

    Returns:
        The image, of which a colour bar can be made.
    """
    values = np.full((units.layer.max() + 1, units.unit.max() + 1), np.nan)
    values[units.layer, units.unit] = units.values(estimand).mean
    image = _map(axes, values, colour_limit(units) if limit is None else limit)
    if planted is not None:
        _ring(axes, units.unit[planted], units.layer[planted])
    whole_number_ticks(axes.xaxis)
    label_axes(axes, "head", "layer", title=estimand.upper())
    return image


def draw_tokens_on(
    axes: Axes, units: UnitTable, site: str, estimand: str, *, limit: float | None = None
) -> AxesImage:
    """Draws a map of mean effects, the last prompt token at the right and layers upwards.

    Args:
        axes: where to.
        units: of the token granularity.
        site: "residual", "attention" or "mlp".
        estimand: "nie" or "tie".
        limit: the colour scale reaches from -limit to limit; by default the `colour_limit` of
            this site's units.

    Returns:
        The image, of which a colour bar can be made.
    """
    here = units.of(units.site == site)
    values = np.full((units.layer.max() + 1, units.position.max() + 1), np.nan)
    values[here.layer, here.position] = here.values(estimand).mean
    image = _map(axes, values, colour_limit(here) if limit is None else limit)
    label_axes(axes, _POSITION, "layer", f"{SITE_TITLES[site]}, {estimand.upper()}")
    whole_number_ticks(axes.xaxis, most=6)
    axes.xaxis.set_major_formatter(lambda x, _: "last" if x == 0 else f"−{x:.0f}")
    axes.set_xlim(values.shape[1] - 0.5, -0.5)  # text runs to the right, and the last token is 0
    return image


def draw_largest_on(
    axes: Axes,
    units: UnitTable,
    metric_unit: str,
    *,
    planted: np.ndarray | None = None,
    count: int = BARS_IN_FIGURE,
) -> None:
    """Draws bars with intervals of the units with the largest of |NIE| and |TIE|.

    Args:
        axes: where to.
        units: of any granularity.
        metric_unit: of the effects, for the label.
        planted: bool [unit], which units are marked.
        count: of the largest that are drawn at most.
    """
    chosen = largest(units.size(), count)
    marked = np.zeros(len(units), bool) if planted is None else planted
    place = np.arange(len(chosen))
    for offset, name in zip((-0.2, 0.2), ESTIMANDS, strict=True):
        values = units.values(name).of(chosen)
        axes.barh(
            place + offset,
            values.mean,
            height=0.38,
            xerr=_bars_around(values),
            label=name.upper(),
            color=COLOURS[name],
            error_kw={"elinewidth": 1.1, "capsize": 2, "ecolor": INK},
        )
    axes.axvline(0, color=FAINT, linewidth=0.8)
    if marked[chosen].any():
        axes.plot([], [], "o", color=INK, label="planted")
    names = [units.name(index) + ("  ●" if marked[index] else "") for index in chosen]
    axes.set_yticks(place, names)
    for text, is_marked in zip(axes.get_yticklabels(), marked[chosen], strict=True):
        text.set_fontweight("bold" if is_marked else "normal")
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    label_axes(axes, f"mean effect ({metric_unit})")


def colour_limit(units: UnitTable) -> float:
    """The end of a colour scale that both estimands of these units share."""
    return float(np.nanmax(units.size())) or 1.0


def draw_screen(
    *,
    estimated: Float[np.ndarray, "unit"],
    exact: Float[np.ndarray, "unit"],
    candidates: int,
    threshold: float,
    metric_unit: str,
    scouted: bool = False,
) -> Figure:
    """Strengths of the neurons that were computed exactly, against what they were chosen by.

    Args:
        estimated, exact: units that are not positive in both are not shown.
        candidates: how many of the strongest by estimate were computed for that reason.
        threshold: exact strength above which a neuron is wanted.
        metric_unit: of all of them.
        scouted: whether they were chosen by strengths in other pairs, not by gradients.
    """
    figure, axes = panel(4.6)
    order = largest(estimated, len(estimated))
    kinds = {
        "candidate": (order[:candidates], COLOURS["mlp"], "o"),
        "audit sample": (order[candidates:], COLOURS["attention"], "s"),
    }
    for label, (chosen, colour, marker) in kinds.items():
        chosen = chosen[(estimated[chosen] > 0) & (exact[chosen] > 0)]
        axes.plot(
            estimated[chosen],
            exact[chosen],
            marker,
            label=label,
            color=colour,
            markersize=3.5,
            alpha=0.6,
            markeredgewidth=0,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    middle = [*axes.get_xlim()]
    axes.plot(middle, middle, color=FAINT, linewidth=0.8, scalex=False, scaley=False)
    if threshold > 0:
        axes.axhline(threshold, color=INK, linewidth=1.1, linestyle=_DASHED, label="threshold")
    estimates, exact_ones = (
        ("strength in the scouts", "strength in the other pairs")
        if scouted
        else ("strength estimated by gradient", "exact strength")
    )
    label_axes(axes, f"{estimates} ({metric_unit})", f"{exact_ones} ({metric_unit})")
    legend(figure, axes)
    return figure


def draw_joint(shares: dict[str, Sequence[float]]) -> Figure:
    """Shares of TE that neurons have together, by how many they are.

    Args:
        shares: by estimand, a fraction for each number of neurons from 1.
    """
    figure, axes = panel(3.4)
    for name, by_number in shares.items():
        axes.plot(
            np.arange(1, len(by_number) + 1),
            [100 * share for share in by_number],
            label=f"joint {name.upper()}",
            color=COLOURS[name],
            marker=MARKERS[name],
            markersize=5,
            linewidth=1.4,
        )
    for level in (0, 100):
        axes.axhline(level, color=FAINT, linewidth=0.8)
    whole_number_ticks(axes.xaxis)
    label_axes(axes, "neurons edited together", "share of TE (%)")
    legend(figure, axes)
    return figure


@dataclasses.dataclass(frozen=True)
class _Series:
    """A line of a panel: the key of its colour and marker, its label, effects, and which units."""

    key: str
    label: str
    values: EstimandValues
    chosen: np.ndarray


def _lines_by_layer(
    axes: Axes, units: UnitTable, series: Sequence[_Series], planted: np.ndarray | None
) -> None:
    # Series are set apart a little, so that their intervals do not cover each other.
    offsets = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.14
    for offset, line in zip(offsets, series, strict=True):
        layer, values = units.layer[line.chosen] + offset, line.values.of(line.chosen)
        axes.errorbar(
            layer,
            values.mean,
            yerr=_bars_around(values),
            label=line.label,
            color=COLOURS[line.key],
            marker=MARKERS[line.key],
            markersize=5,
            linewidth=1.4,
            elinewidth=1.2,
            capsize=2.5,
        )
        if planted is not None:
            ringed = planted[line.chosen]
            _ring(axes, layer[ringed], values.mean[ringed])
    axes.axhline(0, color=FAINT, linewidth=0.8)
    whole_number_ticks(axes.xaxis)


def _bars_around(values: EstimandValues) -> np.ndarray | None:
    """Error bars down to `low` and up to `high`, [2, unit]; None if there is no interval."""
    mean, low, high = values.mean, values.low, values.high
    bars = np.maximum(np.stack([mean - low, high - mean]), 0)
    return None if np.isnan(bars).all() else bars


def _draw_te(axes: Axes, mean_te: float | None) -> None:
    if mean_te is not None:
        axes.axhline(mean_te, color=INK, linewidth=1.1, linestyle=_DASHED, label="mean TE")


def _ring(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Marks planted units, legibly on light and on dark."""
    if len(x):
        axes.scatter(
            x,
            y,
            s=150,
            facecolors="none",
            edgecolors=INK,
            linewidths=1.3,
            path_effects=[withStroke(linewidth=3.5, foreground="white")],
            label="planted",
        )


def _map(axes: Axes, values: np.ndarray, limit: float) -> AxesImage:
    """Draws [layer, place], layer 0 at the bottom, white at 0, grey where there is no value."""
    image = axes.imshow(
        values,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        norm=Normalize(-limit, limit),
    )
    axes.set_facecolor(ABSENT)
    axes.spines[:].set_visible(False)
    whole_number_ticks(axes.yaxis)
    return image


# Whole figures.


def _layers_figure(units: UnitTable, mean_te: float | None, metric_unit: str, planted) -> Figure:
    figure, axes = panel(3.6)
    draw_layers_on(axes, units, metric_unit, mean_te=mean_te, planted=planted)
    legend(figure, axes)
    return figure


def _modules_figure(units: UnitTable, mean_te: float | None, metric_unit: str, planted) -> Figure:
    figure, grid = panels(5.8, rows=2, sharex=True, sharey=True)
    for axes, name in zip(grid[:, 0], ESTIMANDS, strict=True):
        draw_modules_on(axes, units, metric_unit, name, mean_te=mean_te, planted=planted)
        axes.label_outer()
    legend(figure, grid[0, 0])
    return figure


def _heads_figure(units: UnitTable, mean_te: float | None, metric_unit: str, planted) -> Figure:
    """A head's effect is compared with other heads', not with TE."""
    height = _map_height(units)
    figure, grid = panels(height, columns=len(ESTIMANDS), sharey=True)
    images = [
        draw_heads_on(axes, units, name, planted=planted)
        for axes, name in zip(grid[0], ESTIMANDS, strict=True)
    ]
    for axes in grid[0]:
        axes.label_outer(remove_inner_ticks=True)
    colour_bar(figure, images[-1], grid[0], metric_unit, height)
    return figure


def _tokens_figure(units: UnitTable, mean_te: float | None, metric_unit: str, planted) -> Figure:
    """A map of residuals, attention and MLPs has no place for TE or for what is planted."""
    height = min(_map_height(units), 3.2)
    rows = len(TOKEN_SITES)
    figure, grid = panels(
        rows * height, rows=rows, columns=len(ESTIMANDS), sharex=True, sharey=True
    )
    for row, site in zip(grid, TOKEN_SITES, strict=True):
        images = [
            draw_tokens_on(axes, units, site, name)
            for axes, name in zip(row, ESTIMANDS, strict=True)
        ]
        for axes in row:
            axes.label_outer(remove_inner_ticks=True)
            axes.set_xlabel("")
        colour_bar(figure, images[-1], row, metric_unit, height)
    figure.supxlabel(_POSITION, fontsize=TEXT_SIZE, color=INK)
    return figure


def _largest_figure(units: UnitTable, mean_te: float | None, metric_unit: str, planted) -> Figure:
    """One neuron's effect would vanish beside TE."""
    shown = min(len(units), BARS_IN_FIGURE)
    figure, axes = panel(1.2 + 0.34 * shown)
    draw_largest_on(axes, units, metric_unit, planted=planted)
    legend(figure, axes)
    return figure


_POSITION = "position (tokens before the last prompt token)"


def _map_height(units: UnitTable) -> float:
    return float(np.clip(1.1 + 0.16 * (units.layer.max() + 1), 2.2, 5.5))


def colour_bar(
    figure: Figure, image: AxesImage, row: Iterable[Axes], metric_unit: str, height: float
) -> None:
    """A colour scale beside the axes of a row, whose height is given in inches."""
    bar = figure.colorbar(image, ax=list(row), pad=0.02, aspect=8 * height)
    bar.set_label(f"mean effect\n({metric_unit})", fontsize=TEXT_SIZE - 1, color=INK)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 2, color=FAINT, labelcolor=INK)
    bar.locator = MaxNLocator(nbins=5, symmetric=True)
    bar.outline.set_visible(False)


# By granularity: the figure of its units, of the mean TE where there is one, of the metric's unit
# and of which units are planted.
DRAWINGS: dict[str, Callable[[UnitTable, float | None, str, Bool[np.ndarray, "unit"]], Figure]] = {
    "layer": _layers_figure,
    "module": _modules_figure,
    "head": _heads_figure,
    "token": _tokens_figure,
    "neuron": _largest_figure,
    "direction": _largest_figure,
}
