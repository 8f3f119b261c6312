"""The report of a run: pictures, tables, and sentences made of measured values.

Everything shown comes from a results folder; nothing is computed here that `statistics` does not
compute. The page carries its figures, has no scripts, and escapes all text.
"""

import base64
import dataclasses
import io
import json
import math
import pathlib

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colors, figure, patheffects, ticker

from jaxmed import estimands, statistics
from jaxmed import results as results_lib
from models.errors import InputError

_TRUTH_KEYS = {"module": "modules", "head": "heads", "neuron": "neurons"}

_UNITS_IN_TABLE = 10
_NEURONS_IN_FIGURE = 20
_SIGNIFICANT = 0.05

_DIRECTIONS = ("nie", "tie")

# How a score ranks units.
_RANKINGS = {
    "nie": "|mean NIE|",
    "tie": "|mean TIE|",
    "max": "larger of both",
    "joint": "joint, greedy",
}

# Okabe and Ito's colours, which colour-blind readers tell apart; directions and modules never
# share one.
_COLOURS = {"nie": "#0072b2", "tie": "#d55e00", "attention": "#7b4fa3", "mlp": "#00785a"}
_SITE_TITLES = {"residual": "residual", "attention": "attention", "mlp": "MLP"}
_MARKERS = {"nie": "o", "tie": "s", "attention": "o", "mlp": "s"}
_INK, _FAINT, _ABSENT = "#222222", "#8a8a8a", "#e4e4e4"
_TEXT_SIZE = 11  # points, in a figure of 6.8 inches


@dataclasses.dataclass(frozen=True)
class _Metric:
    unit: str
    meaning: str
    direction: str


_TOWARDS_SAFE = (
    "Y is harmful minus safe and the base prompt is the one that complies, so a negative effect"
    " means that patching moves the answer towards the safe one."
)
_METRICS = {
    "logit_diff": _Metric(
        "logits",
        "the logit of the harmful answer’s first token minus that of the safe one’s, at the last"
        " prompt token",
        _TOWARDS_SAFE,
    ),
    "response_logprob_diff": _Metric(
        "nats per token",
        "the mean token log-probability of the harmful response minus that of the safe one",
        _TOWARDS_SAFE,
    ),
    "refusal_logodds": _Metric(
        "nats",
        "the log-odds of a refusal",
        "Y grows with refusal and the base prompt is the one that complies, so a positive effect"
        " means that patching moves the answer towards refusal.",
    ),
    "judge_rate": _Metric(
        "fraction of samples",
        "the fraction of sampled answers that the judge calls harmful",
        "The base prompt is the one that complies, so a negative effect means that patching makes"
        " harmful answers rarer.",
    ),
}

_POSITIONS = {
    "last": "the last prompt token",
    "differing": "from the first token that differs between the prompts to the end of the prompt",
    "prompt": "all aligned prompt tokens",
    "response": "the response’s tokens",
}

_TITLES = {
    "layer": "Layers",
    "module": "Modules",
    "head": "Attention heads",
    "token": "Layers × tokens",
    "neuron": "Neurons",
}


@dataclasses.dataclass(frozen=True)
class _Direction:
    """One estimand of every unit of a granularity, float64 [unit]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    q: np.ndarray
    share: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Units:
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
    nie: _Direction
    tie: _Direction
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
                return f"{layer} {_SITE_TITLES[self.site[index]]}"
            case "head":
                return f"{layer}.h{self.unit[index]}"
            case "token":
                place = self.position[index]
                token = f"token −{place}" if place else "last token"
                return f"{layer} {_SITE_TITLES[self.site[index]]}, {token}"
            case "neuron":
                return f"{layer}.n{self.unit[index]}"


def write(folder, truth: dict | None = None, show_text: bool = False, pairs=None) -> pathlib.Path:
    """Writes `figures/*.png` and `report.html` into a results folder.

    Args:
      folder: a results folder; its `summary.parquet` is written if missing or out of date.
      truth: an organism's planted answer, as in `score`; adds a section that scores the run.
      show_text: show the prompts' text, escaped.
      pairs: objects with `id`, `prompt_text` and `counterfactual_text` (or None); needed for
        show_text.

    Returns:
      The path of `report.html`.

    Raises:
      InputError: the folder is no results folder, or show_text has no pairs to show.
    """
    if show_text and pairs is None:
        raise InputError("--show_text needs --pairs: a results folder holds no text")
    results = results_lib.Results.open(folder)
    summary = statistics.read_summary(results)
    metric = _metric(results)
    te = _total(summary, "te")
    found = _found(results, summary)
    ranked = {granularity: _without_residual(units) for granularity, units in found.items()}
    joint = _joint(results, truth)

    figures = {}
    for granularity, units in found.items():
        drawing = _DRAWINGS[granularity](units, te, metric.unit, _planted(units, truth))
        figures[granularity] = _save(drawing, results.folder, granularity)
    if joint:
        figures["joint"] = _save(_draw_joint(joint), results.folder, "joint")

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        title=f"Causal mediation in {results.run.get('model', 'an unnamed model')}",
        finished=results.run["finished"],
        facts=_facts(results, metric, te),
        metric=metric,
        minimum=statistics.MINIMUM_TOTAL_EFFECT,
        total_sentence=_total_sentence(results, te, metric.unit),
        sections=[
            {
                "title": _TITLES[granularity],
                "sentence": _largest_sentence(units, metric.unit) + _spread_sentence(units),
                "figure": figures[granularity],
                "caption": _caption(units),
                "rows": _table(units, _planted(units, truth)),
                "count": f"{len(units.layer):,}",
            }
            for granularity, units in ranked.items()
        ],
        unit=metric.unit,
        truth=truth,
        scores=_score_rows(results, truth) if truth else [],
        joint=joint,
        joint_figure=figures.get("joint"),
        statuses=_statuses(results),
        totals=_totals_by_pair(results, pairs if show_text else None),
        show_text=show_text,
        files=_files(figures),
        settings=json.dumps(results.run, indent=2, ensure_ascii=False),
    )
    path = results.folder / "report.html"
    results_lib.replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def score(results: results_lib.Results, truth: dict) -> dict:
    """Scores the effects of a run on a model with a planted answer.

    Args:
      results: the run.
      truth: {"contrast": text, "modules": [[layer, "attention" or "mlp"], ...],
        "heads": [[layer, head], ...], "neurons": [[layer, neuron], ...]}.

    Returns:
      {granularity: {direction: {"auroc": fraction, "precision_at_k": fraction}}} for those of
      module, head and neuron that were run; a direction is "nie", "tie" or "max", and units are
      ranked by |mean NIE|, |mean TIE| or the larger of both; neurons by "joint" as well where the
      run has a joint set: first its neurons, in their order. NaN where nothing is planted.

    Raises:
      InputError: a planted unit does not exist in this run.
    """
    scores = {}
    for granularity in _TRUTH_KEYS:
        if granularity not in results.granularities:
            continue
        mask = _truth_mask(results, truth, granularity)
        sizes = [np.abs(statistics.pair_mean(values)) for values in results.effects(granularity)]
        sizes = {"nie": sizes[0], "tie": sizes[1], "max": np.fmax(*sizes)}
        if granularity == "neuron" and "joint" in results.run:
            sizes["joint"] = _joint_set(results).scores(sizes["max"])
        scores[granularity] = {
            direction: {
                "auroc": statistics.auroc(size, mask),
                "precision_at_k": statistics.precision_at_k(size, mask),
            }
            for direction, size in sizes.items()
        }
    return scores


def closing_lines(results: results_lib.Results) -> list[str]:
    """What a run prints at its end: where the results are, and what was measured."""
    summary = statistics.read_summary(results)
    unit = _metric(results).unit
    lines = [
        f"Results: {results.folder}",
        _total_sentence(results, _total(summary, "te"), unit),
    ]
    for granularity, units in _found(results, summary).items():
        if granularity in ("module", results.granularities[-1]):
            sentence = _largest_sentence(_without_residual(units), unit)
            lines.append(f"{_TITLES[granularity]}: {sentence}")
    return lines


def score_lines(results: results_lib.Results, truth: dict) -> list[str]:
    """The score against a planted truth, a line for each granularity; see `score`."""
    lines = []
    for granularity, by_direction in score(results, truth).items():
        planted = int(_truth_mask(results, truth, granularity).sum())
        scores = "; ".join(
            f"{_RANKINGS[direction]} {values['auroc']:.3f} and {values['precision_at_k']:.3f}"
            for direction, values in by_direction.items()
        )
        lines.append(
            f"Planted {_TITLES[granularity].lower()} ({planted}), AUROC and precision@{planted} by "
            f"{scores}"
        )
    return lines


def _metric(results: results_lib.Results) -> _Metric:
    name = results.run["metric"]
    return _METRICS.get(name, _Metric("units of Y", str(name), "The sign is that of Y."))


def _total(summary: pa.Table, estimand: str) -> dict | None:
    """The summary's row of a total, or None if it was not measured for any pair."""
    rows = summary.filter(
        (pc.field("granularity") == "total") & (pc.field("estimand") == estimand)
    ).to_pylist()
    return rows[0] if rows else None


def _found(results: results_lib.Results, summary: pa.Table) -> dict[str, _Units]:
    """The units of each granularity that has any, coarse to fine."""
    found = {}
    for granularity in results.granularities:
        rows = summary.filter(pc.field("granularity") == granularity)
        by_direction = [rows.filter(pc.field("estimand") == name) for name in _DIRECTIONS]
        nie = by_direction[0]
        if not nie.num_rows:
            continue
        directions = []
        for values, table in zip(results.effects(granularity), by_direction, strict=True):
            share = statistics.share(values, results.te)
            directions.append(
                _Direction(
                    *(_column(table, name) for name in ("mean", "ci_low", "ci_high", "q_value")),
                    share=share[~np.isnan(values).all(axis=0)],
                )
            )
        found[granularity] = _Units(
            granularity,
            *(_column(nie, "layer"), nie["site"].to_numpy()),
            *(_column(nie, name) for name in ("unit", "position", "n_pairs")),
            *directions,
            group_size=results.run.get("group_size", 1),
        )
    return found


def _without_residual(units: _Units) -> _Units:
    """The units that are ranked: the residual stream is left to the map, as the whole of it at the
    last token of the last layer is TE by definition."""
    kept = units.site != "residual"

    def narrowed(record):
        fields = vars(record).items()
        arrays = {name: value[kept] for name, value in fields if isinstance(value, np.ndarray)}
        return dataclasses.replace(record, **arrays)

    return dataclasses.replace(narrowed(units), nie=narrowed(units.nie), tie=narrowed(units.tie))


def _largest(size: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest sizes, the largest first."""
    return np.argsort(-size, kind="stable")[:count]


def _column(table: pa.Table, name: str) -> np.ndarray:
    column = table[name]
    missing = -1 if pa.types.is_integer(column.type) else math.nan
    return column.fill_null(missing).to_numpy()


# What the truth says.


def _truth_mask(results: results_lib.Results, truth: dict, granularity: str) -> np.ndarray:
    """Which units are planted, bool [layer, unit]."""
    mask = np.zeros(results.sizes.shape(granularity), bool)
    for layer, unit in truth.get(_TRUTH_KEYS[granularity], []):
        if granularity == "module":
            sites = results_lib.MODULE_SITES
            index = sites.index(unit) if unit in sites else -1
        elif granularity == "neuron":
            index = unit // results.run.get("group_size", 1)
        else:
            index = unit
        if not (0 <= layer < mask.shape[0] and 0 <= index < mask.shape[1]):
            raise InputError(
                f"the truth plants {granularity} {unit} in layer {layer}, but the run in"
                f" {results.folder} has {mask.shape[1]} units in each of {mask.shape[0]} layers"
            )
        mask[layer, index] = True
    return mask


def _planted(units: _Units, truth: dict | None) -> np.ndarray:
    """Which units are planted, bool [unit]; none without a truth."""
    places = {tuple(place) for place in (truth or {}).get(_TRUTH_KEYS.get(units.granularity), [])}
    if units.granularity == "neuron":
        places = {(layer, unit - unit % units.group_size) for layer, unit in places}
    second = units.site if units.granularity == "module" else units.unit
    here = zip(units.layer.tolist(), second.tolist(), strict=True)
    return np.array([place in places for place in here])


def _score_rows(results: results_lib.Results, truth: dict) -> list[dict]:
    return [
        {
            "granularity": _TITLES[granularity],
            "planted": int(_truth_mask(results, truth, granularity).sum()),
            "ranking": _RANKINGS[direction],
            "auroc": _fixed(values["auroc"], 3),
            "precision_at_k": _fixed(values["precision_at_k"], 3),
        }
        for granularity, by_direction in score(results, truth).items()
        for direction, values in by_direction.items()
    ]


def _joint_set(results: results_lib.Results) -> estimands.JointSet:
    joint = results.run["joint"]
    picked = [(layer, neuron) for layer, neuron in joint["picked"]]
    return estimands.JointSet(picked, joint["share_nie"], joint["share_tie"])


def _joint(results: results_lib.Results, truth: dict | None) -> dict | None:
    """The greedy path to the joint set, one step per neuron, or None."""
    if "joint" not in results.run:
        return None
    joint = _joint_set(results)
    planted = {tuple(place) for place in truth.get("neurons", [])} if truth else set()
    return {
        "steps": [
            {
                "name": f"L{layer}.n{neuron}",
                "planted": (layer, neuron) in planted,
                "nie": nie,
                "tie": tie,
                "share_nie": _percent(nie),
                "share_tie": _percent(tie),
            }
            for (layer, neuron), nie, tie in zip(
                joint.picked, joint.share_nie, joint.share_tie, strict=True
            )
        ]
    }


# Sentences and tables.


def _facts(results: results_lib.Results, metric: _Metric, te: dict | None) -> list[tuple]:
    run = results.run
    positions = str(run["positions"])
    explained = _POSITIONS.get(positions)
    sizes = results.sizes
    return [
        ("Model", run.get("model", "not recorded")),
        ("Size", f"{sizes.layers} layers of {sizes.heads} heads and {_neurons_of_layer(results)}"),
        ("Metric Y", f"{run['metric']}: {metric.meaning}, in {metric.unit}"),
        ("Edited positions", f"{positions}: {explained}" if explained else positions),
        ("Granularities", ", ".join(results.granularities)),
        ("Precision", run["precision"]),
        ("Device", run.get("device", "not recorded")),
        ("Pairs", str(len(results.pair_ids))),
        ("Mean total effect", f"{_with_interval(te)} {metric.unit}"),
    ]


def _neurons_of_layer(results: results_lib.Results) -> str:
    group_size = results.run.get("group_size", 1)
    if group_size == 1:
        return f"{results.sizes.neurons:,} neurons"
    return f"{results.sizes.neurons:,} groups of {group_size} neurons"


def _total_sentence(results: results_lib.Results, te: dict | None, unit: str) -> str:
    if te is None:
        return "No total effect was measured."
    pairs = "1 pair" if te["n_pairs"] == 1 else f"{te['n_pairs']} pairs"
    negative = int((results.te < 0).sum())
    return (
        f"Over {pairs}, exchanging the whole base prompt for its source moves Y by"
        f" {_with_interval(te)} {unit} (TE); TE is negative in {negative} of {pairs}."
    )


def _largest_sentence(units: _Units, unit: str) -> str:
    best = [_largest(np.abs(getattr(units, name).mean), 1)[0] for name in _DIRECTIONS]
    measured = []
    for index, name in zip(best, _DIRECTIONS, strict=True):
        direction = getattr(units, name)
        text = f"{_number(direction.mean[index])} {unit}"
        if not np.isnan(direction.share[index]):
            text += f", {_percent(direction.share[index])} of TE"
        measured.append(text)
    if best[0] == best[1]:
        return (
            f"{units.name(best[0])} has the largest effect in both directions"
            f" (NIE {measured[0]}; TIE {measured[1]})."
        )
    return (
        f"{units.name(best[0])} has the largest NIE ({measured[0]}),"
        f" {units.name(best[1])} the largest TIE ({measured[1]})."
    )


def _spread_sentence(units: _Units) -> str:
    """How many units stand out, and whether both directions name the same ones."""
    count = len(units.layer)
    text = ""
    if count > 2 * _UNITS_IN_TABLE:
        nie, tie = (
            set(_largest(np.abs(getattr(units, name).mean), _UNITS_IN_TABLE).tolist())
            for name in _DIRECTIONS
        )
        text = f" {len(nie & tie)} of the {_UNITS_IN_TABLE} largest are the same in both."
    if np.isnan(units.nie.q).all():
        return f"{text} One pair is too few to test them."
    nie, tie = (int((getattr(units, name).q < _SIGNIFICANT).sum()) for name in _DIRECTIONS)
    return f"{text} Of {count:,}, q < {_SIGNIFICANT} holds for {nie:,} by NIE and {tie:,} by TIE."


def _table(units: _Units, planted: np.ndarray) -> list[dict]:
    chosen = _largest(units.size(), _UNITS_IN_TABLE)
    decimals = _decimals(units.size()[chosen].max())
    return [
        {
            "name": units.name(index),
            "planted": bool(planted[index]),
            "n_pairs": int(units.n_pairs[index]),
            "directions": [
                {
                    "mean": _fixed(direction.mean[index], decimals),
                    "interval": _interval(direction.low[index], direction.high[index], decimals),
                    "q": _q(direction.q[index]),
                    "share": _percent(direction.share[index]),
                }
                for direction in (units.nie, units.tie)
            ],
        }
        for index in chosen
    ]


def _statuses(results: results_lib.Results) -> list[dict]:
    """How many effects of each granularity have which status."""
    rows = []
    for granularity in results.granularities:
        done = results.done(granularity)
        counts = np.bincount(done.ravel(), minlength=4)
        if granularity == "token":  # positions beyond a pair's length are not work left undone
            begun = (done != results_lib.NOT_RUN).any(axis=(1, 2, 3))
            counts[results_lib.NOT_RUN] = done[~begun].size
        rows.append(
            {
                "granularity": granularity,
                "exact": f"{counts[results_lib.EXACT]:,}",
                "estimated": f"{counts[results_lib.ESTIMATED]:,}",
                "failed": f"{counts[results_lib.FAILED]:,}",
                "not_run": f"{counts[results_lib.NOT_RUN]:,}",
            }
        )
    return rows


def _totals_by_pair(results: results_lib.Results, pairs) -> list[dict]:
    shown = {str(pair.id): pair for pair in pairs or ()}
    rows = []
    for index, pair_id in enumerate(results.pair_ids):
        pair = shown.get(pair_id)
        rows.append(
            {
                "id": pair_id,
                "y_base": _number(results.y_base[index]),
                "y_source": _number(results.y_source[index]),
                "te": _number(results.te[index]),
                "prompt": (pair and pair.prompt_text) or "–",
                "counterfactual": (pair and pair.counterfactual_text) or "–",
            }
        )
    return rows


def _files(figures: dict) -> list[tuple[str, str]]:
    return [
        ("run.json", "what was asked: every setting, the sizes, the pair ids in order"),
        (
            "effects.zarr",
            "every effect of every pair: NIE, TIE and status by granularity, TE, Y of base and"
            " source",
        ),
        (
            "summary.parquet",
            "one row per unit and estimand: mean, interval, p, q, number of pairs",
        ),
        *((f"figures/{name}.png", _FIGURES[name]) for name in figures),
        ("report.html", "this page; it needs none of the other files"),
    ]


# Numbers as text.


def _fixed(value: float | None, decimals: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    # Adding 0 turns the -0 of a small negative number into 0.
    return f"{round(float(value), decimals) + 0:.{decimals}f}".replace("-", "−")


def _decimals(value: float) -> int:
    """How many decimals show three digits of a value."""
    if not value or not math.isfinite(value):
        return 2
    return max(0, 2 - math.floor(math.log10(abs(value))))


def _number(value: float) -> str:
    return _fixed(value, _decimals(value))


def _interval(low: float | None, high: float | None, decimals: int) -> str:
    if low is None or math.isnan(low):
        return "–"
    return f"[{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


def _with_interval(row: dict | None) -> str:
    if row is None:
        return "–"
    if row["ci_low"] is None:
        return _number(row["mean"])
    decimals = _decimals(row["mean"])
    interval = _interval(row["ci_low"], row["ci_high"], decimals)
    return f"{_fixed(row['mean'], decimals)} {interval}"


def _percent(fraction: float | None) -> str:
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{_fixed(100 * fraction, 0)}%"


def _q(value: float) -> str:
    return "< 0.001" if value < 0.001 else _fixed(value, 3)


# Figures.


def _canvas(height: float, rows: int = 1, columns: int = 1, **options):
    drawing = figure.Figure(figsize=(6.8, height), layout="constrained")
    drawing.get_layout_engine().set(wspace=0.05, hspace=0.03)
    axes = drawing.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.tick_params(labelsize=_TEXT_SIZE - 1, color=_FAINT, labelcolor=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
    return drawing, axes


def _label(axis, x: str = "", y: str = "", title: str = "") -> None:
    axis.set_xlabel(x, fontsize=_TEXT_SIZE, color=_INK)
    axis.set_ylabel(y, fontsize=_TEXT_SIZE, color=_INK)
    axis.set_title(title, fontsize=_TEXT_SIZE, color=_INK, loc="left")


def _whole_number_ticks(axis, most: int = 9) -> None:
    axis.set_major_locator(ticker.MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def _bars_around(direction: _Direction, chosen: np.ndarray) -> np.ndarray | None:
    """Error bars down to `low` and up to `high`, [2, unit]; None if there is no interval."""
    mean, low, high = direction.mean[chosen], direction.low[chosen], direction.high[chosen]
    bars = np.maximum(np.stack([mean - low, high - mean]), 0)
    return None if np.isnan(bars).all() else bars


def _lines_by_layer(
    axis, units: _Units, planted: np.ndarray, series: list[tuple[str, str, _Direction, np.ndarray]]
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


_LAST_IN_LEGEND = ("mean TE", "planted")


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
        fontsize=_TEXT_SIZE - 1,
    )


def _draw_te(axis, te: dict | None) -> None:
    if te is not None:
        axis.axhline(te["mean"], color=_INK, linewidth=1.1, linestyle=(0, (5, 3)), label="mean TE")


def _draw_layers(units: _Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    drawing, axes = _canvas(3.6)
    everything = np.arange(len(units.layer))
    series = [(name, name.upper(), getattr(units, name), everything) for name in _DIRECTIONS]
    _lines_by_layer(axes[0, 0], units, planted, series)
    _draw_te(axes[0, 0], te)
    _label(axes[0, 0], "layer", f"mean effect ({unit})")
    _legend(drawing, axes[0, 0])
    return drawing


def _draw_modules(units: _Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    drawing, axes = _canvas(5.8, rows=2, sharex=True, sharey=True)
    for axis, name in zip(axes[:, 0], _DIRECTIONS, strict=True):
        direction = getattr(units, name)
        series = [
            (site, _SITE_TITLES[site], direction, np.flatnonzero(units.site == site))
            for site in results_lib.MODULE_SITES
        ]
        _lines_by_layer(axis, units, planted, series)
        _draw_te(axis, te)
        _label(axis, y=f"mean effect ({unit})", title=_DIRECTION_TITLES[name])
    axes[1, 0].set_xlabel("layer", fontsize=_TEXT_SIZE, color=_INK)
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


def _draw_heads(units: _Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te  # a head's effect is compared with other heads'
    layers, heads = units.layer.max() + 1, units.unit.max() + 1
    height = _map_height(layers)
    drawing, axes = _canvas(height, columns=2, sharey=True)
    limit = _limit(units, np.arange(len(units.layer)))
    for axis, name in zip(axes[0], _DIRECTIONS, strict=True):
        values = np.full((layers, heads), np.nan)
        values[units.layer, units.unit] = getattr(units, name).mean
        image = _map(axis, values, limit)
        _ring(axis, units.unit[planted], units.layer[planted])
        _whole_number_ticks(axis.xaxis)
        _label(axis, "head", title=name.upper())
    axes[0, 0].set_ylabel("layer", fontsize=_TEXT_SIZE, color=_INK)
    _colour_bar(drawing, image, axes[0], unit, height)
    return drawing


def _draw_tokens(units: _Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
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
        for axis, name in zip(row, _DIRECTIONS, strict=True):
            values = np.full((layers, positions), np.nan)
            values[units.layer[here], units.position[here]] = getattr(units, name).mean[here]
            image = _map(axis, values, limit)
            _label(axis, title=f"{_SITE_TITLES[site]}, {name.upper()}")
        row[0].set_ylabel("layer", fontsize=_TEXT_SIZE, color=_INK)
        _colour_bar(drawing, image, row, unit, height)
    for axis in axes[-1]:
        _whole_number_ticks(axis.xaxis, most=6)
        axis.xaxis.set_major_formatter(lambda x, _: "last" if x == 0 else f"−{x:.0f}")
    axes[0, 0].invert_xaxis()  # shared by all: text runs to the right, and the last token is 0
    drawing.supxlabel(
        "position (tokens before the last prompt token)", fontsize=_TEXT_SIZE, color=_INK
    )
    return drawing


def _map_height(layers: int) -> float:
    return float(np.clip(1.1 + 0.16 * layers, 2.2, 5.5))


def _limit(units: _Units, chosen: np.ndarray) -> float:
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
    bar.set_label(f"mean effect\n({unit})", fontsize=_TEXT_SIZE - 1, color=_INK)
    bar.ax.tick_params(labelsize=_TEXT_SIZE - 2, color=_FAINT, labelcolor=_INK)
    bar.locator = ticker.MaxNLocator(nbins=5, symmetric=True)
    bar.outline.set_visible(False)


def _draw_neurons(units: _Units, te: dict | None, unit: str, planted: np.ndarray) -> figure.Figure:
    del te  # one neuron's effect would vanish beside it
    chosen = _largest(units.size(), _NEURONS_IN_FIGURE)
    drawing, axes = _canvas(1.2 + 0.34 * len(chosen))
    axis = axes[0, 0]
    place = np.arange(len(chosen))
    for offset, name in zip((-0.2, 0.2), _DIRECTIONS, strict=True):
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


def _draw_joint(joint: dict) -> figure.Figure:
    drawing, axes = _canvas(3.4)
    axis = axes[0, 0]
    count = np.arange(1, len(joint["steps"]) + 1)
    for name in _DIRECTIONS:
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


_DRAWINGS = {
    "layer": _draw_layers,
    "module": _draw_modules,
    "head": _draw_heads,
    "token": _draw_tokens,
    "neuron": _draw_neurons,
}
_DIRECTION_TITLES = {
    "nie": "NIE: source’s value in the base run",
    "tie": "TIE: base’s value in the source run",
}
_FIGURES = {
    "layer": "effects by layer",
    "module": "effects of attention and MLP by layer",
    "head": "effects of every head",
    "token": "effects by layer and token",
    "neuron": "the neurons with the largest effects",
    "joint": "the joint effect of neurons, added one by one",
}
_CAPTIONS = {
    "layer": "Mean effect of all that a layer adds to the residual stream. Bars are 95% bootstrap"
    " intervals over pairs.",
    "module": "Mean effect of each attention block and each MLP. Bars are 95% bootstrap intervals"
    " over pairs.",
    "head": "Mean effect of each query head, both directions on one colour scale.",
    "token": "Mean effect of one layer at one token, both directions of a row on one colour scale."
    " Far tokens are means over the pairs that are long enough. The residual stream is a block’s"
    " whole output, and is left out of the table: at the last token of the last layer it is TE by"
    " definition.",
    "neuron": f"The {_NEURONS_IN_FIGURE} neurons with the largest of |NIE| and |TIE|. Bars are 95%"
    " bootstrap intervals over pairs, not corrected for having picked the largest.",
}


def _caption(units: _Units) -> str:
    caption = _CAPTIONS[units.granularity]
    if units.granularity == "neuron" and units.group_size > 1:
        caption += (
            f" Each is a group of {units.group_size} adjacent neurons, named by its first one."
        )
    return caption


def _save(drawing: figure.Figure, folder: pathlib.Path, name: str) -> str:
    """Writes `figures/name.png`, and returns it as a data URI."""
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=200)
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture.getvalue())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
