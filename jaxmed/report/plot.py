"""`jaxmed.plot`: the reports' figures of effects, on axes of one's own.

Each function takes the effects of one granularity, as `jaxmed.scan` and `jaxmed.open_run` give
them, and draws means over pairs with 95% bootstrap intervals. The drawing is the reports' own.
"""

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from jaxmed.analysis import statistics
from jaxmed.question.effects import ESTIMANDS, Effects, Status
from jaxmed.report.figures import canvas
from jaxmed.report.figures import effects as figures
from jaxmed.report.figures.effects import EstimandValues, UnitTable
from models.errors import InputError


def layers(effects: Effects, ax: Axes | None = None) -> Axes:
    """Mean NIE and TIE of every layer, with intervals; a dashed line at the mean TE.

    Args:
        effects: of the layer granularity.
        ax: where to draw; new axes by default.

    Returns:
        The axes.

    Raises:
        InputError: the effects are of another granularity, or there are none.
    """
    units = _units(effects, "layer")
    ax = _axes(ax)
    figures.draw_layers_on(ax, units, effects.attributes["metric_unit"], mean_te=_mean_te(effects))
    return _with_legend(ax)


def modules(effects: Effects, ax: Axes | None = None, *, estimand: str = "nie") -> Axes:
    """Mean effects of every attention and MLP module by layer, with intervals.

    Args:
        effects: of the module granularity.
        ax, estimand: as in `heads`.

    Returns:
        The axes.

    Raises:
        InputError: as in `heads`.
    """
    _check_estimand(estimand)
    units = _units(effects, "module")
    ax = _axes(ax)
    figures.draw_modules_on(
        ax, units, effects.attributes["metric_unit"], estimand, mean_te=_mean_te(effects)
    )
    return _with_legend(ax)


def heads(effects: Effects, ax: Axes | None = None, *, estimand: str = "nie") -> Axes:
    """A map of the mean effects of heads, layers upwards; NIE and TIE have one colour scale.

    Args:
        effects: of the head granularity.
        ax: where to draw; new axes by default.
        estimand: "nie" or "tie".

    Returns:
        The axes.

    Raises:
        InputError: the effects are of another granularity, or there are none; or there is no such
            estimand.
    """
    _check_estimand(estimand)
    units = _units(effects, "head")
    ax = _axes(ax)
    return _with_colour_bar(ax, figures.draw_heads_on(ax, units, estimand), effects)


def tokens(
    effects: Effects,
    ax: Axes | None = None,
    *,
    estimand: str = "nie",
    site: str = "residual",
) -> Axes:
    """A map of the mean effects of one site at each token, the last prompt token at the right.

    Args:
        effects: of the token granularity.
        ax, estimand: as in `heads`.
        site: "residual", "attention" or "mlp".

    Returns:
        The axes.

    Raises:
        InputError: as in `heads`, and where there is no such site.
    """
    _check_estimand(estimand)
    units = _units(effects, "token")
    if site not in units.site:
        raise InputError(f"site={site!r} is not one of {', '.join(dict.fromkeys(units.site))}")
    ax = _axes(ax)
    return _with_colour_bar(ax, figures.draw_tokens_on(ax, units, site, estimand), effects)


def neurons(
    effects: Effects, ax: Axes | None = None, *, count: int = canvas.BARS_IN_FIGURE
) -> Axes:
    """Bars of the neurons with the largest of |mean NIE| and |mean TIE|, with intervals.

    Intervals are not corrected for having picked the largest.

    Args:
        effects: of the neuron granularity.
        ax: where to draw; new axes by default.
        count: how many neurons.

    Returns:
        The axes.

    Raises:
        InputError: the effects are of another granularity, or there are none.
    """
    units = _units(effects, "neuron", count)
    ax = _axes(ax, height=1.2 + 0.34 * len(units))
    figures.draw_largest_on(ax, units, effects.attributes["metric_unit"], count=count)
    return _with_legend(ax)


def _units(effects: Effects, granularity: str, count: int | None = None) -> UnitTable:
    """The units that any pair has, exact effects alone; the `count` largest of them."""
    if effects.granularity != granularity:
        raise InputError(
            f"these are the effects of granularity '{effects.granularity}': '{granularity}' is "
            "drawn here"
        )
    effects, pairs = effects.tested(), len(effects.done)
    # As in the summary, a unit is exact or an estimate, for all pairs together.
    exact = ~(effects.done == Status.ESTIMATED).any(axis=0).ravel()
    sides = {
        name: statistics.by_base(getattr(effects, name), effects.totals.bases) for name in ESTIMANDS
    }
    sides = {name: values.reshape(len(values), -1) for name, values in sides.items()}
    n_pairs = (~np.isnan(sides["nie"])).sum(axis=0)
    kept = np.flatnonzero(exact & (n_pairs > 0))
    if not len(kept):
        raise InputError(f"no {granularity} has an exact effect in any of the {pairs} pairs")
    if count is not None:
        means = [np.abs(statistics.pair_mean(values[:, kept])) for values in sides.values()]
        kept = kept[canvas.largest(np.maximum(*means), count)]
    places = effects.places()
    neuron = effects.coordinates.get("neuron", np.arange(2))
    return UnitTable(
        granularity=granularity,
        layer=places["layer"][kept],
        site=places["site"][kept],
        unit=places["unit"][kept],
        position=places["position"][kept],
        n_pairs=n_pairs[kept],
        nie=_values(sides["nie"][:, kept]),
        tie=_values(sides["tie"][:, kept]),
        group_size=int(neuron[1] - neuron[0]) if len(neuron) > 1 else 1,
    )


def _values(values: np.ndarray) -> EstimandValues:
    """Means and intervals of [pair, unit]; nothing is tested for a figure."""
    mean, low, high = statistics.mean_interval(values)
    unknown = np.full(mean.shape, np.nan)
    return EstimandValues(mean=mean, low=low, high=high, q=unknown, share=unknown)


def _mean_te(effects: Effects) -> float | None:
    mean = float(statistics.pair_mean(statistics.by_base(effects.te, effects.totals.bases)))
    return None if np.isnan(mean) else mean


def _check_estimand(estimand: str) -> None:
    if estimand not in ESTIMANDS:
        raise InputError(f"estimand={estimand!r} is not one of {', '.join(ESTIMANDS)}")


def _axes(ax: Axes | None, height: float = 3.6) -> Axes:
    """Those that are given, or new ones; both get the look of the reports' figures."""
    if ax is None:
        _, ax = pyplot.subplots(figsize=(6.8, height), layout="constrained")
    canvas.style(ax)
    return ax


def _with_legend(ax: Axes) -> Axes:
    # Whatever it must cover can still be seen.
    ax.legend(edgecolor="none", framealpha=0.8, fontsize=canvas.TEXT_SIZE - 1)
    return ax


def _with_colour_bar(ax: Axes, image: AxesImage, effects: Effects) -> Axes:
    figure = ax.get_figure(root=True)
    assert figure is not None  # the axes are drawn on
    height = float(figure.get_figheight())
    figures.colour_bar(figure, image, [ax], effects.attributes["metric_unit"], height)
    return ax
