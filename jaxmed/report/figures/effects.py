"""The figures of reports: of a run one for each granularity, for the screen, and for the joint set;
of units that were held still, how conditions compare; of a certificate, how methods do."""

import dataclasses

import numpy as np
from matplotlib import colors, figure, patheffects, ticker

from jaxmed.question import sites as sites_lib
from jaxmed.report.figures import canvas
from jaxmed.report.figures.canvas import (
    ABSENT,
    BARS_IN_FIGURE,
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    TEXT_SIZE,
    canvas,
    label_axes,
    legend,
    whole_number_ticks,
)

DIRECTIONS = ("nie", "tie")
SITE_TITLES = {
    "residual": "residual",
    "layer": "layer",
    "attention": "attention",
    "mlp": "MLP",
    "head": "heads",
    "neuron": "neurons",
}
_DIRECTION_TITLES = {
    "nie": "NIE: source’s value in the base run",
    "tie": "TIE: base’s value in the source run",
}


@dataclasses.dataclass(frozen=True)
class Direction:
    """One estimand of every unit of a granularity, float64 [unit]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    q: np.ndarray
    share: np.ndarray


@dataclasses.dataclass(frozen=True)
class Units:
    """Every unit of one granularity that any pair has; arrays are [unit].

    Attributes:
        granularity: which.
        layer, site, unit, position: where each unit is, as in the summary; -1 where one is not.
        n_pairs: how many pairs have it.
        nie, tie: the effects.
        group_size: adjacent neurons per unit.
    """

    granularity: str
    layer: np.ndarray
    site: np.ndarray
    unit: np.ndarray
    position: np.ndarray
    n_pairs: np.ndarray
    nie: Direction
    tie: Direction
    group_size: int

    def size(self) -> np.ndarray:
        """The larger of |mean NIE| and |mean TIE|."""
        return np.maximum(np.abs(self.nie.mean), np.abs(self.tie.mean))

    def name(self, index: int) -> str:
        layer = f"L{self.layer[index]}"
        match self.granularity:
            case "layer":
                return layer
            case "module":
                return f"{layer} {SITE_TITLES[self.site[index]]}"
            case "head":
                return f"{layer}.h{self.unit[index]}"
            case "token":
                place = self.position[index]
                token = f"token −{place}" if place else "last token"
                return f"{layer} {SITE_TITLES[self.site[index]]}, {token}"
            case "neuron":
                return f"{layer}.n{self.unit[index]}"
            case "direction":
                return f"{layer} {SITE_TITLES[self.site[index]]}, direction {self.unit[index]}"


def _bars_around(direction: Direction, chosen: np.ndarray) -> np.ndarray | None:
    """Error bars down to `low` and up to `high`, [2, unit]; None if there is no interval."""
    mean, low, high = direction.mean[chosen], direction.low[chosen], direction.high[chosen]
    bars = np.maximum(np.stack([mean - low, high - mean]), 0)
    return None if np.isnan(bars).all() else bars


def _lines_by_layer(
    axis, units: Units, planted: np.ndarray, series: list[tuple[str, str, Direction, np.ndarray]]
) -> None:
    """Draws one line with intervals per series: (key of its colour, label, effects, units)."""
    # Series are set apart a little, so that their intervals do not cover each other.
    offsets = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.14
    for offset, (key, label, direction, chosen) in zip(offsets, series, strict=True):
        axis.errorbar(
            units.layer[chosen] + offset,
            direction.mean[chosen],
            yerr=_bars_around(direction, chosen),
            label=label,
            color=COLOURS[key],
            marker=MARKERS[key],
            markersize=5,
            linewidth=1.4,
            elinewidth=1.2,
            capsize=2.5,
        )
        ringed = chosen[planted[chosen]]
        _ring(axis, units.layer[ringed] + offset, direction.mean[ringed])
    axis.axhline(0, color=FAINT, linewidth=0.8)
    whole_number_ticks(axis.xaxis)


def _draw_te(axis, te: dict | None) -> None:
    if te is not None:
        axis.axhline(te["mean"], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label="mean TE")


def _draw_layers(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    drawing, axes = canvas(3.6)
    everything = np.arange(len(units.layer))
    series = [(name, name.upper(), getattr(units, name), everything) for name in DIRECTIONS]
    _lines_by_layer(axes[0, 0], units, planted, series)
    _draw_te(axes[0, 0], te)
    label_axes(axes[0, 0], "layer", f"mean effect ({unit})")
    legend(drawing, axes[0, 0])
    return drawing


def _draw_modules(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    drawing, axes = canvas(5.8, rows=2, sharex=True, sharey=True)
    for axis, name in zip(axes[:, 0], DIRECTIONS, strict=True):
        direction = getattr(units, name)
        series = [
            (site, SITE_TITLES[site], direction, np.flatnonzero(units.site == site))
            for site in sites_lib.MODULE_SITES
        ]
        _lines_by_layer(axis, units, planted, series)
        _draw_te(axis, te)
        label_axes(axis, y=f"mean effect ({unit})", title=_DIRECTION_TITLES[name])
    axes[1, 0].set_xlabel("layer", fontsize=TEXT_SIZE, color=INK)
    legend(drawing, axes[0, 0])
    return drawing


def _ring(axis, x: np.ndarray, y: np.ndarray) -> None:
    """Marks planted units, legibly on light and on dark."""
    if len(x):
        axis.scatter(
            x,
            y,
            s=150,
            facecolors="none",
            edgecolors=INK,
            linewidths=1.3,
            path_effects=[patheffects.withStroke(linewidth=3.5, foreground="white")],
            label="planted",
        )


def _draw_heads(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te  # a head's effect is compared with other heads'
    layers, heads = units.layer.max() + 1, units.unit.max() + 1
    height = _map_height(layers)
    drawing, axes = canvas(height, columns=2, sharey=True)
    limit = _limit(units, np.arange(len(units.layer)))
    for axis, name in zip(axes[0], DIRECTIONS, strict=True):
        values = np.full((layers, heads), np.nan)
        values[units.layer, units.unit] = getattr(units, name).mean
        image = _map(axis, values, limit)
        _ring(axis, units.unit[planted], units.layer[planted])
        whole_number_ticks(axis.xaxis)
        label_axes(axis, "head", title=name.upper())
    axes[0, 0].set_ylabel("layer", fontsize=TEXT_SIZE, color=INK)
    _colour_bar(drawing, image, axes[0], unit, height)
    return drawing


def _draw_tokens(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te, planted  # a map of residuals, attention and MLPs has neither
    layers, positions = units.layer.max() + 1, units.position.max() + 1
    sites = sites_lib.TOKEN_SITES
    height = min(_map_height(layers), 3.2)
    drawing, axes = canvas(
        len(sites) * height, rows=len(sites), columns=2, sharex=True, sharey=True
    )
    for row, site in zip(axes, sites, strict=True):
        here = np.flatnonzero(units.site == site)
        limit = _limit(units, here)
        for axis, name in zip(row, DIRECTIONS, strict=True):
            values = np.full((layers, positions), np.nan)
            values[units.layer[here], units.position[here]] = getattr(units, name).mean[here]
            image = _map(axis, values, limit)
            label_axes(axis, title=f"{SITE_TITLES[site]}, {name.upper()}")
        row[0].set_ylabel("layer", fontsize=TEXT_SIZE, color=INK)
        _colour_bar(drawing, image, row, unit, height)
    for axis in axes[-1]:
        whole_number_ticks(axis.xaxis, most=6)
        axis.xaxis.set_major_formatter(lambda x, _: "last" if x == 0 else f"−{x:.0f}")
    axes[0, 0].invert_xaxis()  # shared by all: text runs to the right, and the last token is 0
    drawing.supxlabel(
        "position (tokens before the last prompt token)", fontsize=TEXT_SIZE, color=INK
    )
    return drawing


def _map_height(layers: int) -> float:
    return float(np.clip(1.1 + 0.16 * layers, 2.2, 5.5))


def _limit(units: Units, chosen: np.ndarray) -> float:
    """The end of a colour scale that both directions share."""
    return float(np.nanmax(units.size()[chosen])) or 1.0


def _map(axis, values: np.ndarray, limit: float):
    """Draws [layer, place], layer 0 at the bottom, white at 0, grey where there is no value."""
    image = axis.imshow(
        values,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        norm=colors.Normalize(-limit, limit),
    )
    axis.set_facecolor(ABSENT)
    axis.spines[:].set_visible(False)
    axis.label_outer(remove_inner_ticks=True)
    whole_number_ticks(axis.yaxis)
    return image


def _colour_bar(drawing, image, axes, unit: str, height: float) -> None:
    bar = drawing.colorbar(image, ax=list(axes), pad=0.02, aspect=8 * height)
    bar.set_label(f"mean effect\n({unit})", fontsize=TEXT_SIZE - 1, color=INK)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 2, color=FAINT, labelcolor=INK)
    bar.locator = ticker.MaxNLocator(nbins=5, symmetric=True)
    bar.outline.set_visible(False)


def _draw_largest(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te  # one neuron's effect would vanish beside it
    chosen = canvas.largest(units.size(), BARS_IN_FIGURE)
    drawing, axes = canvas(1.2 + 0.34 * len(chosen))
    axis = axes[0, 0]
    place = np.arange(len(chosen))
    for offset, name in zip((-0.2, 0.2), DIRECTIONS, strict=True):
        direction = getattr(units, name)
        axis.barh(
            place + offset,
            direction.mean[chosen],
            height=0.38,
            xerr=_bars_around(direction, chosen),
            label=name.upper(),
            color=COLOURS[name],
            error_kw={"elinewidth": 1.1, "capsize": 2, "ecolor": INK},
        )
    axis.axvline(0, color=FAINT, linewidth=0.8)
    if planted[chosen].any():
        axis.plot([], [], "o", color=INK, label="planted")
    names = [units.name(index) + ("  ●" if planted[index] else "") for index in chosen]
    axis.set_yticks(place, names)
    for text, is_planted in zip(axis.get_yticklabels(), planted[chosen], strict=True):
        text.set_fontweight("bold" if is_planted else "normal")
    axis.set_ylim(len(chosen) - 0.4, -0.6)
    label_axes(axis, f"mean effect ({unit})")
    legend(drawing, axis)
    return drawing


def draw_screen(
    estimated: np.ndarray, exact: np.ndarray, candidates: int, threshold: float, unit: str
) -> figure.Figure:
    """Strengths of the neurons that were computed exactly, against the gradient's estimates.

    Args:
        estimated, exact: [unit]; units that are not positive in both are not shown.
        candidates: how many of the strongest by estimate were computed for that reason.
        threshold: exact strength above which a neuron is wanted.
        unit: of all of them.
    """
    drawing, axes = canvas(4.6)
    axis = axes[0, 0]
    order = canvas.largest(estimated, len(estimated))
    kinds = {
        "candidate": (order[:candidates], COLOURS["mlp"], "o"),
        "audit sample": (order[candidates:], COLOURS["attention"], "s"),
    }
    for label, (chosen, colour, marker) in kinds.items():
        chosen = chosen[(estimated[chosen] > 0) & (exact[chosen] > 0)]
        axis.plot(
            *(estimated[chosen], exact[chosen], marker),
            label=label,
            color=colour,
            markersize=3.5,
            alpha=0.6,
            markeredgewidth=0,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    middle = [*axis.get_xlim()]
    axis.plot(middle, middle, color=FAINT, linewidth=0.8, scalex=False, scaley=False)
    if threshold > 0:
        axis.axhline(threshold, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label="threshold")
    label_axes(axis, f"strength estimated by gradient ({unit})", f"exact strength ({unit})")
    legend(drawing, axis)
    return drawing


def draw_joint(joint: dict) -> figure.Figure:
    drawing, axes = canvas(3.4)
    axis = axes[0, 0]
    count = np.arange(1, len(joint["steps"]) + 1)
    for name in DIRECTIONS:
        axis.plot(
            count,
            [100 * step[name] for step in joint["steps"]],
            label=f"joint {name.upper()}",
            color=COLOURS[name],
            marker=MARKERS[name],
            markersize=5,
            linewidth=1.4,
        )
    for level in (0, 100):
        axis.axhline(level, color=FAINT, linewidth=0.8)
    whole_number_ticks(axis.xaxis)
    label_axes(axis, "neurons edited together", "share of TE (%)")
    legend(drawing, axis)
    return drawing


DRAWINGS = {
    "layer": _draw_layers,
    "module": _draw_modules,
    "head": _draw_heads,
    "token": _draw_tokens,
    "neuron": _draw_largest,
    "direction": _draw_largest,
}
