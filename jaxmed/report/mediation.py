"""The report of a run: pictures, tables, and sentences made of measured values.

Everything shown comes from a results folder; nothing is computed here that `statistics` does not
compute. The page carries its figures, has no scripts, and escapes all text.
"""

import math
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from jaxmed.analysis import ranking
from jaxmed.analysis import summary as summary_lib
from jaxmed.question.effects import ESTIMANDS, Status
from jaxmed.report import numbers, pages
from jaxmed.report.figures import effects as figures
from jaxmed.report.figures.canvas import BARS_IN_FIGURE, largest
from jaxmed.report.figures.effects import EstimandValues, UnitTable
from jaxmed.store import results as results_lib
from jaxmed.validation import scoring
from models.errors import InputError

_UNITS_IN_TABLE = 10
_SIGNIFICANT = 0.05
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
    "direction": "Directions",
}


def write(folder, show_text: bool = False, pairs=None) -> pathlib.Path:
    """Writes `figures/*.png` and `report.html` into a results folder.

    Args:
        folder: a results folder; its `summary.parquet` is written if missing or out of date.
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
    summary = summary_lib.read_summary(results)
    te = _total(summary, "te")
    found = _found(results, summary)
    ranked = {granularity: _ranked(units) for granularity, units in found.items()}
    truth = results.run.get("truth")
    joint = _joint(results)
    audit = results.run.get("audit")
    unit = results.run["metric_unit"]

    drawn = {}
    mean_te = te and te["mean"]
    for granularity, units in found.items():
        drawing = figures.DRAWINGS[granularity](units, mean_te, unit, _planted(units, truth))
        drawn[granularity] = pages.save(drawing, results.folder, granularity)
    if joint:
        shares = ranking.joint_set(results)
        drawn["joint"] = pages.save(
            figures.draw_joint({"nie": shares.share_nie, "tie": shares.share_tie}),
            results.folder,
            "joint",
        )
    if audit:
        drawn["screen"] = pages.save(_screen_figure(results, audit), results.folder, "screen")

    return pages.write(
        results.folder,
        "mediation.html.j2",
        run=results.run,
        title=f"Causal mediation in {pages.model_name(results.run['model'])}",
        # The page is one of the files that a run writes before it is finished.
        finished=not any(results.missing(name) for name in results.granularities),
        facts=_facts(results, te),
        meaning=results.run["meaning"],
        minimum=ranking.MINIMUM_TOTAL_EFFECT,
        total_sentence=_total_sentence(results, te, unit),
        sections=[
            {
                "title": _TITLES[granularity],
                "sentence": _largest_sentence(units, unit)
                + _spread_sentence(units, _count(results, units)),
                "figure": drawn[granularity],
                "caption": _caption(units),
                "rows": _table(units, _planted(units, truth)),
                "count": _count(results, units),
            }
            for granularity, units in ranked.items()
        ],
        unit=unit,
        truth=truth,
        scores=_score_rows(results) if truth else [],
        joint=joint,
        joint_figure=drawn.get("joint"),
        screen=_screen_sentences(results) if audit else [],
        screen_figure=drawn.get("screen"),
        screen_caption=_CAPTIONS["screen"],
        statuses=_statuses(results),
        totals=_totals_by_pair(results, pairs if show_text else None),
        show_text=show_text,
        files=_files(drawn),
    )


def closing_lines(results: results_lib.Results) -> list[str]:
    """What a run prints at its end: where the results are, and what was measured."""
    summary = summary_lib.read_summary(results)
    unit = results.run["metric_unit"]
    missing = max(len(results.missing(name)) for name in results.granularities)
    lines = []
    if missing:
        lines.append(f"Not finished: {missing} of {len(results.pair_ids)} pairs are missing.")
    lines += [
        f"Results: {results.folder} (open {results.folder / 'report.html'})",
        _total_sentence(results, _total(summary, "te"), unit),
    ]
    for granularity, units in _found(results, summary).items():
        sentence = _largest_sentence(_ranked(units), unit)
        lines.append(f"{_TITLES[granularity]}: {sentence}")
    if results.run.get("audit"):
        lines.append(f"Screen: {' '.join(_screen_sentences(results))}")
    if joint := results.run.get("joint"):
        lines.append(f"Joint set: {_joint_sentence(joint)}")
    if results.run.get("truth"):
        lines += _score_lines(results)
    return lines


def _score_lines(results: results_lib.Results) -> list[str]:
    """The score against a planted truth, a line for each granularity; see `scoring.score`."""
    lines = []
    for granularity, by_direction in scoring.score(results).items():
        planted = int(scoring.truth_mask(results, granularity).sum())
        scores = "; ".join(
            f"{ranking.RANKINGS[name]} {values['auroc']:.3f} and {values['precision_at_k']:.3f}"
            for name, values in by_direction.items()
        )
        lines.append(
            f"Planted {_TITLES[granularity].lower()} ({planted}), AUROC and precision@{planted} by "
            f"{scores}"
        )
    return lines


def _total(summary: pa.Table, estimand: str) -> dict | None:
    """The summary's row of a total, or None if it was not measured for any pair."""
    rows = summary.filter(
        (pc.field("granularity") == "total") & (pc.field("estimand") == estimand)
    ).to_pylist()
    return rows[0] if rows else None


def _found(results: results_lib.Results, summary: pa.Table) -> dict[str, UnitTable]:
    """The units of each granularity that has any, coarse to fine; exact effects alone."""
    found, te = {}, _total(summary, "te")
    for granularity in results.granularities:
        rows = summary.filter((pc.field("granularity") == granularity) & pc.field("exact"))
        by_direction = [rows.filter(pc.field("estimand") == name) for name in ESTIMANDS]
        nie = by_direction[0]
        if not nie.num_rows:
            continue
        directions = []
        effects = results.effects(granularity, exact=True)
        for values, table in zip(effects, by_direction, strict=True):
            share = ranking.share(values, results.te)
            if te and te["ci_low"] is not None and te["ci_low"] <= 0 <= te["ci_high"]:
                share = np.full_like(share, np.nan)
            directions.append(
                EstimandValues(
                    mean=_column(table, "mean"),
                    low=_column(table, "ci_low"),
                    high=_column(table, "ci_high"),
                    q=_column(table, "q_value"),
                    share=share[~np.isnan(values).all(axis=0)],
                )
            )
        found[granularity] = UnitTable(
            granularity,
            layer=_column(nie, "layer"),
            site=nie["site"].to_numpy(),
            unit=_column(nie, "unit"),
            position=_column(nie, "position"),
            n_pairs=_column(nie, "n_pairs"),
            nie=directions[0],
            tie=directions[1],
            group_size=results.run.get("group_size", 1),
        )
    return found


def _ranked(units: UnitTable) -> UnitTable:
    """The units that are ranked: the residual stream is left to the map of tokens, as the whole of
    it at the last token of the last layer is TE by definition."""
    if units.granularity != "token":
        return units
    return units.of(units.site != "residual")


def _column(table: pa.Table, name: str) -> np.ndarray:
    column = table[name]
    missing = -1 if pa.types.is_integer(column.type) else math.nan
    return column.fill_null(missing).to_numpy()


def _planted(units: UnitTable, truth: dict | None) -> np.ndarray:
    """Which units are planted, bool [unit]; none without a truth."""
    places = {
        tuple(place) for place in (truth or {}).get(scoring.TRUTH_KEYS.get(units.granularity), [])
    }
    if units.granularity == "neuron":
        places = {(layer, unit - unit % units.group_size) for layer, unit in places}
    second = units.site if units.granularity == "module" else units.unit
    here = zip(units.layer.tolist(), second.tolist(), strict=True)
    return np.array([place in places for place in here])


def _score_rows(results: results_lib.Results) -> list[dict]:
    return [
        {
            "granularity": _TITLES[granularity],
            "planted": int(scoring.truth_mask(results, granularity).sum()),
            "ranking": ranking.RANKINGS[direction],
            "auroc": numbers.fixed(values["auroc"], 3),
            "precision_at_k": numbers.fixed(values["precision_at_k"], 3),
        }
        for granularity, by_direction in scoring.score(results).items()
        for direction, values in by_direction.items()
    ]


def _joint(results: results_lib.Results) -> dict | None:
    """The greedy path to the joint set, one step per neuron, or None."""
    if "joint" not in results.run:
        return None
    joint = ranking.joint_set(results)
    truth = results.run.get("truth") or {}
    planted = {tuple(place) for place in truth.get("neurons", [])}
    return {
        "sentence": _joint_sentence(results.run["joint"]),
        "steps": [
            {
                "name": f"L{layer}.n{neuron}",
                "planted": (layer, neuron) in planted,
                "nie": nie,
                "tie": tie,
                "share_nie": numbers.percent(nie),
                "share_tie": numbers.percent(tie),
            }
            for (layer, neuron), nie, tie in zip(
                joint.picked, joint.share_nie, joint.share_tie, strict=True
            )
        ],
    }


def _joint_sentence(joint: dict) -> str:
    """What the set carries, where it was searched and where it was not."""
    confirmed, count = joint["confirmed"], len(joint["picked"])
    sentence = (
        f"{count} {'neuron has' if count == 1 else 'neurons together have'}"
        f" {numbers.percent(joint['share_nie'][-1])} of TE by NIE and"
        f" {numbers.percent(joint['share_tie'][-1])} by TIE on the pairs that they were searched on"
    )
    if min(joint["share_nie"][-1], joint["share_tie"][-1]) < joint["share"]:
        sentence += f", less than the {numbers.percent(joint['share'])} that were sought"
    if confirmed is None:
        return f"{sentence}; no other pairs confirm it."
    return (
        f"{sentence}, and {numbers.percent(confirmed['share_nie'])} and"
        f" {numbers.percent(confirmed['share_tie'])} on {confirmed['pairs']} other pairs."
    )


def _facts(results: results_lib.Results, te: dict | None) -> list[tuple]:
    run, unit = results.run, results.run["metric_unit"]
    positions = str(run["positions"])
    explained = _POSITIONS.get(positions)
    sizes = results.sizes
    return [
        ("Model", run.get("model", "not recorded")),
        ("Size", f"{sizes.layers} layers of {sizes.heads} heads and {_neurons_of_layer(results)}"),
        ("Metric Y", f"{run['metric']}: {run['meaning']}, in {unit}"),
        ("Edited positions", f"{positions}: {explained}" if explained else positions),
        ("Aligned by", run.get("align", "not recorded")),
        ("Granularities", ", ".join(results.granularities)),
        *([("Directions", run["directions"])] if run.get("directions") else []),
        ("Precision", run["precision"]),
        ("Device", run.get("device", "not recorded")),
        ("Pairs", str(len(results.pair_ids))),
        ("Mean total effect", f"{_with_interval(te)} {unit}"),
    ]


def _neurons_of_layer(results: results_lib.Results) -> str:
    group_size = results.run.get("group_size", 1)
    if group_size == 1:
        return f"{results.sizes.neurons:,} neurons"
    return f"{results.sizes.neurons:,} groups of {group_size} neurons"


def _count(results: results_lib.Results, units: UnitTable) -> str:
    """How many units are ranked, and that there are others, if so."""
    screened = units.granularity == "neuron" and results.run.get("screen")
    return f"{len(units.layer):,}{' (those computed exactly)' if screened else ''}"


def _screen_sentences(results: results_lib.Results) -> list[str]:
    """What was computed of the neurons, what may be missing, and how good the estimates are."""
    run, audit = results.run, results.run["audit"]
    top, sampled, left = run["screen"], audit["sampled"], audit["uncomputed"]
    units = "neurons" if run.get("group_size", 1) == 1 else "groups of neurons"
    sentences = [
        f"Of {audit['candidates'] + sampled + left:,} {units}, {audit['candidates']:,} were"
        f" computed exactly because gradients rank them highest, and {sampled:,} of the others as"
        " an audit sample."
    ]
    if not left:
        return [*sentences, "That is all of them, so none is missing."]
    if not sampled:
        return [
            *sentences,
            f"Without a sample nothing is known of the {left:,} others (--screen_audit).",
        ]
    sentences.append(
        f"At most {audit['bound']:,} {units} stronger than the {_ordinal(top)} strongest of the"
        f" candidates ({numbers.number(audit['threshold'])} {run['metric_unit']}) are missing, at"
        f" {numbers.percent(audit['confidence'])} confidence; the audit found {audit['hits']:,} of"
        f" {sampled:,}."
    )
    if audit["spearman"] is not None:
        sentences.append(
            "Over the audit sample, estimated and exact strengths have a rank correlation of"
            f" {numbers.fixed(audit['spearman'], 3)}."
        )
    return sentences


def _screen_figure(results: results_lib.Results, audit: dict) -> Figure:
    exact = ranking.strength(*results.effects("neuron", exact=True))
    estimated = ranking.strength(*results.estimates())
    both = ~np.isnan(exact) & ~np.isnan(estimated)
    return figures.draw_screen(
        estimated=estimated[both],
        exact=exact[both],
        candidates=audit["candidates"],
        threshold=audit["threshold"],
        metric_unit=results.run["metric_unit"],
    )


def _ordinal(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    end = "th" if number % 100 in (11, 12, 13) else ends.get(number % 10, "th")
    return f"{number:,}{end}"


def _total_sentence(results: results_lib.Results, te: dict | None, unit: str) -> str:
    if te is None:
        return "No total effect was measured."
    pairs = "1 pair" if te["n_pairs"] == 1 else f"{te['n_pairs']} pairs"
    negative, complies = int((results.te < 0).sum()), int((results.y_base > 0).sum())
    return (
        f"Over {pairs}, exchanging the whole base prompt for its source moves Y by"
        f" {_with_interval(te)} {unit} (TE); TE is negative in {negative} of {pairs}. The base"
        f" prompt makes the harmful answer the likelier one (Y > 0) in {complies} of {pairs}."
    )


def _largest_sentence(units: UnitTable, unit: str) -> str:
    best = [largest(np.abs(getattr(units, name).mean), 1)[0] for name in ESTIMANDS]
    measured = []
    for index, name in zip(best, ESTIMANDS, strict=True):
        direction = getattr(units, name)
        text = f"{numbers.number(direction.mean[index])} {unit}"
        if not np.isnan(direction.share[index]):
            text += f", {numbers.percent(direction.share[index])} of TE"
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


def _spread_sentence(units: UnitTable, count: str) -> str:
    """How many units stand out, and whether both directions name the same ones."""
    text = ""
    if len(units.layer) > 2 * _UNITS_IN_TABLE:
        nie, tie = (
            set(largest(np.abs(getattr(units, name).mean), _UNITS_IN_TABLE).tolist())
            for name in ESTIMANDS
        )
        text = f" {len(nie & tie)} of the {_UNITS_IN_TABLE} largest are the same in both."
    if np.isnan(units.nie.q).all():
        return f"{text} One pair is too few to test them."
    nie, tie = (int((getattr(units, name).q < _SIGNIFICANT).sum()) for name in ESTIMANDS)
    return f"{text} Of {count}, q < {_SIGNIFICANT} holds for {nie:,} by NIE and {tie:,} by TIE."


def _table(units: UnitTable, planted: np.ndarray) -> list[dict]:
    chosen = largest(units.size(), _UNITS_IN_TABLE)
    decimals = numbers.decimals(units.size()[chosen].max())
    return [
        {
            "name": units.name(index),
            "planted": bool(planted[index]),
            "n_pairs": int(units.n_pairs[index]),
            "directions": [
                {
                    "mean": numbers.fixed(direction.mean[index], decimals),
                    "interval": numbers.interval(
                        direction.low[index], direction.high[index], decimals
                    ),
                    "q": _q(direction.q[index]),
                    "share": numbers.percent(direction.share[index]),
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
        counts = np.bincount(done.ravel(), minlength=len(Status))
        # Positions beyond a pair's length, and directions that do not exist, are no work undone.
        if granularity in ("token", "direction"):
            begun = (done != Status.NOT_RUN).any(axis=(1, 2, 3))
            counts[Status.NOT_RUN] = done[~begun].size
        rows.append(
            {
                "granularity": granularity,
                "exact": f"{counts[Status.EXACT]:,}",
                "estimated": f"{counts[Status.ESTIMATED]:,}",
                "failed": f"{counts[Status.FAILED]:,}",
                "left_out": f"{counts[Status.LEFT_OUT]:,}",
                "not_run": f"{counts[Status.NOT_RUN]:,}",
            }
        )
    return rows


def _totals_by_pair(results: results_lib.Results, pairs) -> list[dict]:
    shown = {str(pair.id): pair for pair in pairs or ()}
    rows = []
    # Each is read from its file once, not once for each pair.
    totals = zip(results.pair_ids, results.y_base, results.y_source, results.te, strict=True)
    for pair_id, y_base, y_source, te in totals:
        pair = shown.get(pair_id)
        rows.append(
            {
                "id": pair_id,
                "y_base": numbers.number(y_base),
                "y_source": numbers.number(y_source),
                "te": numbers.number(te),
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
            "every effect of every pair: NIE, TIE and done (2: only estimated) by granularity, TE,"
            " Y of base and source",
        ),
        (
            "summary.parquet",
            "one row per unit and estimand: mean, interval, p, q, number of pairs, exact or"
            " estimated",
        ),
        *((f"figures/{name}.png", _FIGURES[name]) for name in figures),
        ("report.html", "this page; it needs none of the other files"),
    ]


def _with_interval(row: dict | None) -> str:
    if row is None:
        return "–"
    if row["ci_low"] is None:
        return numbers.number(row["mean"])
    decimals = numbers.decimals(row["mean"])
    interval = numbers.interval(row["ci_low"], row["ci_high"], decimals)
    return f"{numbers.fixed(row['mean'], decimals)} {interval}"


def _q(value: float) -> str:
    return "< 0.001" if value < 0.001 else numbers.fixed(value, 3)


_FIGURES = {
    "layer": "effects by layer",
    "module": "effects of attention and MLP by layer",
    "head": "effects of every head",
    "token": "effects by layer and token",
    "neuron": "the neurons with the largest effects",
    "direction": "the directions with the largest effects",
    "screen": "strengths of neurons, exact against estimated by gradient",
    "joint": "the joint effect of neurons, added one by one",
}
_CAPTIONS = {
    "layer": "Mean effect of all that a layer adds to the residual stream. Bars are 95% bootstrap"
    " intervals over pairs.",
    "module": "Mean effect of each attention block and each MLP. Bars are 95% bootstrap intervals"
    " over pairs.",
    "head": "Mean effect of each query head, both directions on one colour scale.",
    "token": "Mean effect of one layer at one token of the prompt, each aligned position edited"
    " alone whatever positions were asked for; both directions of a row on one colour scale."
    " Far tokens are means over the pairs that are long enough. The residual stream is a block’s"
    " whole output, and is left out of the table: at the last token of the last layer it is TE by"
    " definition.",
    "neuron": f"The {BARS_IN_FIGURE} neurons with the largest of |NIE| and |TIE|. Bars"
    " are 95% bootstrap intervals over pairs, not corrected for having picked the largest.",
    "direction": f"The {BARS_IN_FIGURE} directions with the largest of |NIE| and |TIE|,"
    " each numbered within its array of the file. Bars are 95% bootstrap intervals over pairs, not"
    " corrected for having picked the largest.",
    "screen": "Strength, the larger of |mean NIE| and |mean TIE|, of every neuron that was computed"
    " exactly. On the thin line the estimate is right. Audited neurons above the dashed line, the"
    " threshold, are strong ones that gradients rank too low.",
}


def _caption(units: UnitTable) -> str:
    caption = _CAPTIONS[units.granularity]
    if units.granularity == "neuron" and units.group_size > 1:
        caption += (
            f" Each is a group of {units.group_size} adjacent neurons, named by its first one."
        )
    return caption
