"""The figures of reports: of a run one for each granularity, for the screen, and for the joint set;
of units that were held still, how conditions compare; of a certificate, how methods do."""

import dataclasses

import numpy as np
from matplotlib import colors, figure, patheffects, ticker

from jaxmed import results as results_lib

BARS_IN_FIGURE = 20
DIRECTIONS = ("nie", "tie")
# Okabe and Ito's colours, which colour-blind readers tell apart; directions and modules never
# share one.
_COLOURS = {"nie": "#0072b2", "tie": "#d55e00", "attention": "#7b4fa3", "mlp": "#00785a"}
SITE_TITLES = {
    "residual": "residual",
    "layer": "layer",
    "attention": "attention",
    "mlp": "MLP",
    "head": "heads",
    "neuron": "neurons",
}
# Of several series in one panel; overlapping lines are told apart by their dashes.
_SERIES = ("#0072b2", "#d55e00", "#222222", "#009e73", "#cc79a7", "#e69f00", "#8a8a8a", "#56b4e9")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))
# Of what units that are held still change, and of the conditions that are compared.
_RATE_COLOURS = {"harm": "#d55e00", "refusal": "#7b4fa3", "compliance": "#0072b2"}
_CONDITIONS = {
    "plain": ("#222222", "o"),
    "clamp": ("#d55e00", "D"),
    "random": ("#0072b2", "s"),
    "module": ("#7b4fa3", "^"),
}
_MARKERS = {"nie": "o", "tie": "s", "attention": "o", "mlp": "s"}
_INK, _FAINT, _ABSENT = "#222222", "#8a8a8a", "#e4e4e4"
TEXT_SIZE = 11  # points, in a figure of 6.8 inches
_DIRECTION_TITLES = {
    "nie": "NIE: source’s value in the base run",
    "tie": "TIE: base’s value in the source run",
}
_BOUNDS = ("mean", "low", "high")
_LINEAR_DOSES = 16  # above, doubling the dose is one step to the right
_LAST_IN_LEGEND = ("mean TE", "planted")


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


def largest(size: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest sizes, the largest first."""
    return np.argsort(-size, kind="stable")[:count]


def _canvas(height: float, rows: int = 1, columns: int = 1, **options):
    drawing = figure.Figure(figsize=(6.8, height), layout="constrained")
    drawing.get_layout_engine().set(wspace=0.05, hspace=0.03)
    axes = drawing.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.tick_params(labelsize=TEXT_SIZE - 1, color=_FAINT, labelcolor=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
    return drawing, axes


def _label(axis, x: str = "", y: str = "", title: str = "") -> None:
    axis.set_xlabel(x, fontsize=TEXT_SIZE, color=_INK)
    axis.set_ylabel(y, fontsize=TEXT_SIZE, color=_INK)
    axis.set_title(title, fontsize=TEXT_SIZE, color=_INK, loc="left")


def _whole_number_ticks(axis, most: int = 9) -> None:
    axis.set_major_locator(ticker.MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


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
            color=_COLOURS[key],
            marker=_MARKERS[key],
            markersize=5,
            linewidth=1.4,
            elinewidth=1.2,
            capsize=2.5,
        )
        ringed = chosen[planted[chosen]]
        _ring(axis, units.layer[ringed] + offset, direction.mean[ringed])
    axis.axhline(0, color=_FAINT, linewidth=0.8)
    _whole_number_ticks(axis.xaxis)


def _legend(drawing, axis) -> None:
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


def _draw_te(axis, te: dict | None) -> None:
    if te is not None:
        axis.axhline(te["mean"], color=_INK, linewidth=1.1, linestyle=(0, (5, 3)), label="mean TE")


def _draw_layers(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    drawing, axes = _canvas(3.6)
    everything = np.arange(len(units.layer))
    series = [(name, name.upper(), getattr(units, name), everything) for name in DIRECTIONS]
    _lines_by_layer(axes[0, 0], units, planted, series)
    _draw_te(axes[0, 0], te)
    _label(axes[0, 0], "layer", f"mean effect ({unit})")
    _legend(drawing, axes[0, 0])
    return drawing


def _draw_modules(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    drawing, axes = _canvas(5.8, rows=2, sharex=True, sharey=True)
    for axis, name in zip(axes[:, 0], DIRECTIONS, strict=True):
        direction = getattr(units, name)
        series = [
            (site, SITE_TITLES[site], direction, np.flatnonzero(units.site == site))
            for site in results_lib.MODULE_SITES
        ]
        _lines_by_layer(axis, units, planted, series)
        _draw_te(axis, te)
        _label(axis, y=f"mean effect ({unit})", title=_DIRECTION_TITLES[name])
    axes[1, 0].set_xlabel("layer", fontsize=TEXT_SIZE, color=_INK)
    _legend(drawing, axes[0, 0])
    return drawing


def _ring(axis, x: np.ndarray, y: np.ndarray) -> None:
    """Marks planted units, legibly on light and on dark."""
    if len(x):
        axis.scatter(
            x,
            y,
            s=150,
            facecolors="none",
            edgecolors=_INK,
            linewidths=1.3,
            path_effects=[patheffects.withStroke(linewidth=3.5, foreground="white")],
            label="planted",
        )


def _draw_heads(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te  # a head's effect is compared with other heads'
    layers, heads = units.layer.max() + 1, units.unit.max() + 1
    height = _map_height(layers)
    drawing, axes = _canvas(height, columns=2, sharey=True)
    limit = _limit(units, np.arange(len(units.layer)))
    for axis, name in zip(axes[0], DIRECTIONS, strict=True):
        values = np.full((layers, heads), np.nan)
        values[units.layer, units.unit] = getattr(units, name).mean
        image = _map(axis, values, limit)
        _ring(axis, units.unit[planted], units.layer[planted])
        _whole_number_ticks(axis.xaxis)
        _label(axis, "head", title=name.upper())
    axes[0, 0].set_ylabel("layer", fontsize=TEXT_SIZE, color=_INK)
    _colour_bar(drawing, image, axes[0], unit, height)
    return drawing


def _draw_tokens(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te, planted  # a map of residuals, attention and MLPs has neither
    layers, positions = units.layer.max() + 1, units.position.max() + 1
    sites = results_lib.TOKEN_SITES
    height = min(_map_height(layers), 3.2)
    drawing, axes = _canvas(
        len(sites) * height, rows=len(sites), columns=2, sharex=True, sharey=True
    )
    for row, site in zip(axes, sites, strict=True):
        here = np.flatnonzero(units.site == site)
        limit = _limit(units, here)
        for axis, name in zip(row, DIRECTIONS, strict=True):
            values = np.full((layers, positions), np.nan)
            values[units.layer[here], units.position[here]] = getattr(units, name).mean[here]
            image = _map(axis, values, limit)
            _label(axis, title=f"{SITE_TITLES[site]}, {name.upper()}")
        row[0].set_ylabel("layer", fontsize=TEXT_SIZE, color=_INK)
        _colour_bar(drawing, image, row, unit, height)
    for axis in axes[-1]:
        _whole_number_ticks(axis.xaxis, most=6)
        axis.xaxis.set_major_formatter(lambda x, _: "last" if x == 0 else f"−{x:.0f}")
    axes[0, 0].invert_xaxis()  # shared by all: text runs to the right, and the last token is 0
    drawing.supxlabel(
        "position (tokens before the last prompt token)", fontsize=TEXT_SIZE, color=_INK
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
    axis.set_facecolor(_ABSENT)
    axis.spines[:].set_visible(False)
    axis.label_outer(remove_inner_ticks=True)
    _whole_number_ticks(axis.yaxis)
    return image


def _colour_bar(drawing, image, axes, unit: str, height: float) -> None:
    bar = drawing.colorbar(image, ax=list(axes), pad=0.02, aspect=8 * height)
    bar.set_label(f"mean effect\n({unit})", fontsize=TEXT_SIZE - 1, color=_INK)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 2, color=_FAINT, labelcolor=_INK)
    bar.locator = ticker.MaxNLocator(nbins=5, symmetric=True)
    bar.outline.set_visible(False)


def _draw_largest(units: Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te  # one neuron's effect would vanish beside it
    chosen = largest(units.size(), BARS_IN_FIGURE)
    drawing, axes = _canvas(1.2 + 0.34 * len(chosen))
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
            color=_COLOURS[name],
            error_kw={"elinewidth": 1.1, "capsize": 2, "ecolor": _INK},
        )
    axis.axvline(0, color=_FAINT, linewidth=0.8)
    if planted[chosen].any():
        axis.plot([], [], "o", color=_INK, label="planted")
    names = [units.name(index) + ("  ●" if planted[index] else "") for index in chosen]
    axis.set_yticks(place, names)
    for text, is_planted in zip(axis.get_yticklabels(), planted[chosen], strict=True):
        text.set_fontweight("bold" if is_planted else "normal")
    axis.set_ylim(len(chosen) - 0.4, -0.6)
    _label(axis, f"mean effect ({unit})")
    _legend(drawing, axis)
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
    drawing, axes = _canvas(4.6)
    axis = axes[0, 0]
    order = largest(estimated, len(estimated))
    kinds = {
        "candidate": (order[:candidates], _COLOURS["mlp"], "o"),
        "audit sample": (order[candidates:], _COLOURS["attention"], "s"),
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
    axis.plot(middle, middle, color=_FAINT, linewidth=0.8, scalex=False, scaley=False)
    if threshold > 0:
        axis.axhline(threshold, color=_INK, linewidth=1.1, linestyle=(0, (5, 3)), label="threshold")
    _label(axis, f"strength estimated by gradient ({unit})", f"exact strength ({unit})")
    _legend(drawing, axis)
    return drawing


def draw_joint(joint: dict) -> figure.Figure:
    drawing, axes = _canvas(3.4)
    axis = axes[0, 0]
    count = np.arange(1, len(joint["steps"]) + 1)
    for name in DIRECTIONS:
        axis.plot(
            count,
            [100 * step[name] for step in joint["steps"]],
            label=f"joint {name.upper()}",
            color=_COLOURS[name],
            marker=_MARKERS[name],
            markersize=5,
            linewidth=1.4,
        )
    for level in (0, 100):
        axis.axhline(level, color=_FAINT, linewidth=0.8)
    _whole_number_ticks(axis.xaxis)
    _label(axis, "neurons edited together", "share of TE (%)")
    _legend(drawing, axis)
    return drawing


DRAWINGS = {
    "layer": _draw_layers,
    "module": _draw_modules,
    "head": _draw_heads,
    "token": _draw_tokens,
    "neuron": _draw_largest,
    "direction": _draw_largest,
}


def draw_certificate(
    precision: dict[str, dict[tuple[str, str], float]], methods: dict[str, str]
) -> figure.Figure:
    """How much of the planted truth each method finds, a map for each granularity.

    Args:
        precision: precision@k, by granularity, then by organism and method.
        methods: titles of the methods, in their order.
    """
    drawing, axes = _canvas(1.0 + 2.9 * len(precision), rows=len(precision))
    for axis, (granularity, values) in zip(axes[:, 0], precision.items(), strict=True):
        names = list(dict.fromkeys(organism for organism, _ in values))
        rows = [method for method in methods if any(method == key[1] for key in values)]
        table = np.array([[values.get((name, row), np.nan) for name in names] for row in rows])
        axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                colour = "white" if value > 0.6 else _INK
                axis.text(
                    *(column, row, f"{value:.2f}"),
                    **{"ha": "center", "va": "center", "fontsize": TEXT_SIZE - 1, "color": colour},
                )
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set_yticks(range(len(rows)), [methods[row] for row in rows])
        _label(axis, title=f"{SITE_TITLES.get(granularity, granularity)}: precision@k")
    return drawing


def draw_faithfulness(
    curves: dict[str, dict[str, np.ndarray]], sizes: tuple[float, ...], methods: dict[str, str]
) -> figure.Figure:
    """Faithfulness of circuits by their size, a panel for each organism.

    Args:
        curves: by organism and method, [size].
        sizes: of the circuits, fractions of all neurons.
        methods: titles of the methods, in their order.
    """
    columns = min(2, max(1, len(curves)))
    rows = max(1, -(-len(curves) // columns))
    drawing, axes = _canvas(0.8 + 2.1 * rows, rows, columns, sharex=True, sharey=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (organism, by_method) in zip(axes.flat, curves.items(), strict=False):
        axis.axhline(1, color=_FAINT, linewidth=0.8)
        for number, (method, title) in enumerate(methods.items()):
            if method in by_method:
                axis.plot(
                    *(sizes, by_method[method]),
                    **{"label": title, "color": _SERIES[number % len(_SERIES)], "linewidth": 1.4},
                    linestyle=_DASHES[number % len(_DASHES)],
                )
        axis.set_xscale("log")
        axis.set_ylim(-0.1, 1.3)  # what overshoots further is no better than what does so here
        axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
        _label(axis, title=organism)
    for axis in axes.flat[max(0, len(curves) - columns) : len(curves)]:
        axis.tick_params(labelbottom=True)  # none is below it in its column
    drawing.supxlabel("neurons kept, of all", fontsize=TEXT_SIZE, color=_INK)
    drawing.supylabel("faithfulness", fontsize=TEXT_SIZE, color=_INK)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(
        *(handles, labels),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=TEXT_SIZE - 1,
    )
    return drawing


def draw_conditions(
    rates: dict[str, dict[str, dict]], draws: dict[str, list[float]], titles: dict[str, str]
) -> figure.Figure:
    """Rates under the plain model, the units held, random units and whole modules.

    Args:
        rates: by title of the rate, then by condition: mean, low and high.
        draws: by title of the rate, the means of the single draws of random units.
        titles: of the conditions, in their order.
    """
    drawing, axes = _canvas(0.9 + 0.72 * len(rates))
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
    _label(axis, "rate, with 95% interval")
    _legend(drawing, axis)
    return drawing


def _bands(axis, names: list[str]) -> None:
    """Names the rows of points, from top to bottom, and parts them by lines."""
    for place in range(1, len(names)):
        axis.axhline(place - 0.5, color=_ABSENT, linewidth=0.8, zorder=0)
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
    drawing, axes = _canvas(3.4, columns=len(curves), sharey=True)
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
            _whole_number_ticks(axis.xaxis)
        axis.set_ylim(-0.03, 1.03)
        _label(axis, dose)
    axes[0, 0].set_ylabel("rate", fontsize=TEXT_SIZE, color=_INK)
    _legend(drawing, axes[0, 0])
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
    drawing, axes = _canvas(1.2 + 0.34 * len(names))
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
    axis.axvline(0, color=_FAINT, linewidth=0.8)
    _bands(axis, names)
    _label(axis, "change from the plain model, with 95% interval")
    _legend(drawing, axis)
    return drawing
