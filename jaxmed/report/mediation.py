"""The report of a run: pictures, tables, and verdicts made of measured values.

Everything shown comes from a results folder; nothing is computed here that `statistics` does not
compute. What verdicts say is in `templates/mediation.*`.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from matplotlib.figure import Figure

from jaxmed.analysis import ranking, slabs
from jaxmed.analysis.summary import read_summary
from jaxmed.question.effects import ESTIMANDS, Status
from jaxmed.report import numbers, pages, rendering
from jaxmed.report.figures import effects as figures
from jaxmed.report.figures.canvas import BARS_IN_FIGURE, largest
from jaxmed.report.figures.effects import EstimandValues, UnitTable
from jaxmed.report.numbers import Measured
from jaxmed.store.results import Results
from jaxmed.validation import scoring
from models.errors import InputError

_UNITS_IN_TABLE = 10
_SIGNIFICANT = 0.05
# Of the summary, what is told of units.
_COLUMNS = ["layer", "site", "unit", "position", "n_pairs", "mean", "ci_low", "ci_high", "q_value"]


@dataclasses.dataclass(frozen=True)
class TotalVerdict:
    """What exchanging the whole prompt does.

    Attributes:
        te: mean total effect, in the metric's unit.
        metric_unit: its name.
        pairs: how many base prompts it is the mean of.
        negative: pairs whose total effect is negative.
        complies: pairs whose base prompt makes the harmful answer the likelier one.
    """

    te: Measured
    metric_unit: str
    pairs: int
    negative: int
    complies: int


@dataclasses.dataclass(frozen=True)
class UnitEffect:
    """A unit, its mean effect, and what share of TE that is; None where no share is formed."""

    unit: str
    mean: float
    share: float | None


@dataclasses.dataclass(frozen=True)
class LargestVerdict:
    """The units of a granularity with the largest |NIE| and |TIE|, and whether it is one unit."""

    nie: UnitEffect
    tie: UnitEffect
    same: bool
    metric_unit: str


@dataclasses.dataclass(frozen=True)
class Significant:
    """How many units have a q below the level, by NIE and by TIE."""

    nie: int
    tie: int


@dataclasses.dataclass(frozen=True)
class SpreadVerdict:
    """How many units stand out.

    Attributes:
        units: how many are ranked.
        screened: there are others, which were only estimated.
        compared, shared: of so many largest by NIE and by TIE, how many are the same; None where
            there are too few units to compare.
        level: of q.
        significant: how many are below it; None where one pair is too few to test any.
    """

    units: int
    screened: bool
    compared: int
    shared: int | None
    level: float
    significant: Significant | None


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """Shares of TE of a joint set on pairs that it was not searched on."""

    share_nie: float
    share_tie: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class JointStep:
    """A neuron of a joint set, and the shares of TE that it has with those before it."""

    name: str
    planted: bool
    share_nie: float
    share_tie: float


@dataclasses.dataclass(frozen=True)
class JointVerdict:
    """What a joint set carries on the pairs that it was searched on, and on others.

    Attributes:
        steps: in the order in which they were added.
        share_nie, share_tie: of TE.
        sought: the share that it was to reach by both.
        confirmed: None without other pairs.
    """

    steps: Sequence[JointStep]
    share_nie: float
    share_tie: float
    sought: float
    confirmed: Confirmation | None

    @property
    def neurons(self) -> int:
        """How many they are."""
        return len(self.steps)

    @property
    def reached(self) -> bool:
        """Whether it has the share that was sought, by both estimands."""
        return min(self.share_nie, self.share_tie) >= self.sought


class Audited(enum.StrEnum):
    """What is known of the neurons that a screen, or scouts, left out."""

    COMPLETE = "complete"  # there are none
    NOT_AUDITED = "not audited"  # nothing, without a sample of them
    BOUNDED = "bounded"  # how many strong ones are among them at most


@dataclasses.dataclass(frozen=True)
class ScreenVerdict:
    """What a screen computed, or what scouts had computed of other pairs, and what it may have
    missed.

    Attributes:
        verdict: what is known of the others.
        candidates, sampled, uncomputed: neurons that were computed because gradients or scouts rank
            them highest, those that were computed as a sample of the others, and the rest.
        group_size: adjacent neurons of each.
        wanted: how many of the strongest were asked for.
        threshold: strength of the weakest of these among the candidates, in the metric's unit.
        bound: how many stronger ones are missing at most, at this `confidence`.
        hits: stronger ones in the sample.
        spearman: rank correlation of strengths, as estimated or in the scouts and exact ones, over
            the sample; None without.
        scouts, others: how many pairs ranked the neurons, and of how many others they were
            computed; 0 where gradients did.
    """

    verdict: Audited
    candidates: int
    sampled: int
    uncomputed: int
    group_size: int
    wanted: int
    threshold: float
    metric_unit: str
    bound: int
    confidence: float
    hits: int
    spearman: float | None
    scouts: int = 0
    others: int = 0

    @property
    def units(self) -> int:
        """How many there are."""
        return self.candidates + self.sampled + self.uncomputed

    @property
    def leaves_much_open(self) -> bool:
        """Whether as many may be missing as half of those that were asked for."""
        return 2 * self.bound >= self.wanted


@dataclasses.dataclass(frozen=True)
class RankingScore:
    """How well a ranking, named by its title, finds what was planted; NaN where nothing was."""

    title: str
    auroc: float
    precision_at_k: float


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a granularity's rankings find the units that were planted."""

    granularity: str
    planted: int
    rankings: Sequence[RankingScore]


@dataclasses.dataclass(frozen=True)
class Section:
    """A granularity: what stands out, and a row for each of the largest units."""

    granularity: str
    largest: LargestVerdict
    spread: SpreadVerdict
    decimals: int
    rows: Sequence[dict]


def write(folder, show_text: bool = False, pairs=None) -> str:
    """Writes `figures/*.png` and `report.html` into a results folder.

    Args:
        folder: a results folder; its `summary.parquet` is written if missing or out of date.
        show_text: show the prompts' text, escaped.
        pairs: objects with `id`, `prompt_text` and `counterfactual_text` (or None); needed for
            show_text.

    Returns:
        Where `report.html` is, a local path or gs://bucket/path.

    Raises:
        InputError: the folder is no results folder, or show_text has no pairs to show.
    """
    if show_text and pairs is None:
        raise InputError("show_text needs pairs: a results folder holds no text")
    results = Results.open(folder)
    tables, told = _measured(results)
    te, truth = told["total"] and told["total"].te.value, _truth(results)
    drawn = {
        granularity: figures.DRAWINGS[granularity](
            units, te, results.run["metric_unit"], _planted(units, truth)
        )
        for granularity, units in tables.items()
    }
    if told["joint"]:
        shares = ranking.joint_set(results)
        drawn["joint"] = figures.draw_joint({"nie": shares.share_nie, "tie": shares.share_tie})
    if told["screen"]:
        drawn["screen"] = _screen_figure(results, told["screen"])
    with results.place.written_locally() as folder:
        pages.write(
            folder,
            "mediation.html.j2",
            run=results.run,
            model=pages.model_name(results.run["model"]),
            sizes=results.sizes,
            group_size=results.run.get("group_size", 1),
            granularities=results.granularities,
            # The page is one of the files that a run writes before it is finished.
            finished=not any(results.missing(name) for name in results.granularities),
            minimum=ranking.MINIMUM_TOTAL_EFFECT,
            bars=BARS_IN_FIGURE,
            statuses=_statuses(results),
            pairs=_pairs(results, pairs if show_text else None),
            show_text=show_text,
            figures={name: pages.save(figure, folder, name) for name, figure in drawn.items()},
            **told,
        )
    return results.place.path("report.html")


def closing_lines(results: Results) -> list[str]:
    """What a run prints at its end: where the results are, and what was measured."""
    _, told = _measured(results)
    return rendering.lines(
        "mediation.txt.j2",
        folder=results.folder,
        report=results.place.path("report.html"),
        missing=max(len(results.missing(name)) for name in results.granularities),
        pairs=len(results.pair_ids),
        **told,
    )


def _measured(results: Results) -> tuple[dict[str, UnitTable], dict[str, Any]]:
    """The units of each granularity; and what page and closing lines tell alike, by the names that
    templates have for it."""
    summary = read_summary(results)
    total = total_verdict(results, summary)
    tables = unit_tables(results, summary, total)
    return tables, {
        "total": total,
        "sections": [_section(results, units) for units in map(_ranked, tables.values())],
        "scores": scores(results),
        "joint": joint_verdict(results),
        "screen": screen_verdict(results),
    }


def total_verdict(results: Results, summary: ds.Dataset) -> TotalVerdict | None:
    """The total effect; None if it was not measured for any pair."""
    rows = _rows(summary, "total", "te").to_pylist()
    if not rows:
        return None
    te = {name: math.nan if value is None else value for name, value in rows[0].items()}
    return TotalVerdict(
        te=Measured(te["mean"], te["ci_low"], te["ci_high"]),
        metric_unit=results.run["metric_unit"],
        pairs=int(te["n_pairs"]),
        negative=int((results.te < 0).sum()),
        complies=int((results.y_base > 0).sum()),
    )


def unit_tables(
    results: Results, summary: ds.Dataset, total: TotalVerdict | None
) -> dict[str, UnitTable]:
    """The units of each granularity that has any, coarse to fine; exact effects alone.

    They have shares where they are told of.
    """
    # No share is formed of a total effect that may be 0.
    unsure = total is not None and total.te.low <= 0 <= total.te.high
    tables = {}
    for granularity in results.granularities:
        nie, tie = (_rows(summary, granularity, name) for name in ESTIMANDS)
        if not nie.num_rows:
            continue
        units = UnitTable(
            granularity,
            layer=_column(nie, "layer"),
            site=nie["site"].to_numpy(),
            unit=_column(nie, "unit"),
            position=_column(nie, "position"),
            n_pairs=_column(nie, "n_pairs"),
            group_size=results.run.get("group_size", 1),
            nie=_values(nie),
            tie=_values(tie),
        )
        tables[granularity] = units if unsure else _with_shares(results, units)
    return tables


def _rows(summary: ds.Dataset, granularity: str, estimand: str) -> pa.Table:
    """The summary's exact rows of one family; no others are read."""
    family = (pc.field("granularity") == granularity) & (pc.field("estimand") == estimand)
    return summary.to_table(columns=_COLUMNS, filter=family & pc.field("exact"))


def _values(rows: pa.Table) -> EstimandValues:
    """Of one estimand, without shares."""
    return EstimandValues(
        mean=_column(rows, "mean"),
        low=_column(rows, "ci_low"),
        high=_column(rows, "ci_high"),
        q=_column(rows, "q_value"),
        share=np.full(rows.num_rows, np.nan),
    )


def _with_shares(results: Results, units: UnitTable) -> UnitTable:
    """The same units, with shares of those that are told of: only these effects are read."""
    told = np.flatnonzero(_is_ranked(units))
    told = told[_told(units.of(told))]
    shares = {name: values.share.copy() for name, values in units.by_estimand().items()}
    for slab in slabs.slabs(results, units.granularity, units.layer[told].tolist()):
        here = told[np.isin(units.layer[told], slab.coordinates["layer"])]
        at = tuple(np.transpose([_index(units, each, slab.coordinates) for each in here]))
        exact = slab.done[:, *at] == Status.EXACT
        for name, share in shares.items():
            effects = np.where(exact, getattr(slab, name)[:, *at], np.nan)
            share[here] = ranking.share(effects, slab.te)
    values = units.by_estimand().items()
    return dataclasses.replace(
        units, **{name: dataclasses.replace(each, share=shares[name]) for name, each in values}
    )


def _told(units: UnitTable) -> np.ndarray:
    """Indices of the units whose shares are told: of the table's rows, and of the largest by each
    estimand."""
    of_each = [np.argmax(np.abs(values.mean)) for values in units.by_estimand().values()]
    return np.union1d(largest(units.size(), _UNITS_IN_TABLE), of_each)


def _index(
    units: UnitTable, index: int | np.integer, coordinates: dict[str, np.ndarray]
) -> list[int]:
    """Where a unit lies in arrays of effects with these coordinates."""
    place = {name: getattr(units, name)[index] for name in ("layer", "site", "position")}
    axes = list(coordinates)[1:]  # after the pair's
    return [
        int(np.flatnonzero(coordinates[name] == place.get(name, units.unit[index]))[0])
        for name in axes
    ]


def _column(table: pa.Table, name: str) -> np.ndarray:
    column = table[name]
    missing = -1 if pa.types.is_integer(column.type) else math.nan
    return column.fill_null(missing).to_numpy()


def _ranked(units: UnitTable) -> UnitTable:
    """The units that are ranked: the residual stream is left to the map of tokens, as the whole of
    it at the last token of the last layer is TE by definition."""
    return units.of(_is_ranked(units))


def _is_ranked(units: UnitTable) -> np.ndarray:
    return (units.granularity != "token") | (units.site != "residual")


def _section(results: Results, units: UnitTable) -> Section:
    planted = _planted(units, _truth(results))
    chosen = largest(units.size(), _UNITS_IN_TABLE)
    return Section(
        granularity=units.granularity,
        largest=largest_verdict(units, results.run["metric_unit"]),
        spread=spread_verdict(units, bool(results.run.get("screen") or results.scouts)),
        decimals=numbers.decimals(units.size()[chosen].max()),
        rows=[
            {
                "name": units.name(index),
                "planted": bool(planted[index]),
                "n_pairs": int(units.n_pairs[index]),
                "nie": _cell(units.nie, index),
                "tie": _cell(units.tie, index),
            }
            for index in chosen
        ],
    )


def _cell(values: EstimandValues, index: int | np.integer) -> dict:
    return {
        "effect": Measured(
            float(values.mean[index]), float(values.low[index]), float(values.high[index])
        ),
        "q": float(values.q[index]),
        "share": float(values.share[index]),
    }


def largest_verdict(units: UnitTable, metric_unit: str) -> LargestVerdict:
    """Which units have the largest effects."""
    nie, tie = (int(np.argmax(np.abs(units.values(name).mean))) for name in ESTIMANDS)
    return LargestVerdict(
        nie=_unit_effect(units, units.nie, nie),
        tie=_unit_effect(units, units.tie, tie),
        same=nie == tie,
        metric_unit=metric_unit,
    )


def _unit_effect(units: UnitTable, values: EstimandValues, index: int | np.integer) -> UnitEffect:
    share = float(values.share[index])
    return UnitEffect(
        units.name(index), float(values.mean[index]), None if math.isnan(share) else share
    )


def spread_verdict(units: UnitTable, screened: bool) -> SpreadVerdict:
    """How many units stand out, and whether both estimands name the same ones."""
    shared = significant = None
    if len(units) > 2 * _UNITS_IN_TABLE:
        nie, tie = (
            set(largest(np.abs(units.values(name).mean), _UNITS_IN_TABLE).tolist())
            for name in ESTIMANDS
        )
        shared = len(nie & tie)
    if not np.isnan(units.nie.q).all():
        nie, tie = (int((units.values(name).q < _SIGNIFICANT).sum()) for name in ESTIMANDS)
        significant = Significant(nie, tie)
    return SpreadVerdict(
        units=len(units),
        screened=screened and units.granularity == "neuron",
        compared=_UNITS_IN_TABLE,
        shared=shared,
        level=_SIGNIFICANT,
        significant=significant,
    )


def _truth(results: Results) -> dict:
    """What is planted, by kind; empty where nothing is."""
    return results.run.get("truth") or {}


def _planted(units: UnitTable, truth: dict) -> np.ndarray:
    """Which units are planted, bool [unit]; none without a truth."""
    key = scoring.TRUTH_KEYS.get(units.granularity)
    places = {tuple(place) for place in truth.get(key, [])}
    if not places:
        return np.zeros(len(units), bool)
    if units.granularity == "neuron":
        places = {(layer, unit - unit % units.group_size) for layer, unit in places}
    second = units.site if units.granularity == "module" else units.unit
    here = zip(units.layer.tolist(), second.tolist(), strict=True)
    return np.array([place in places for place in here], bool)


def scores(results: Results) -> list[Score]:
    """Scores against the planted truth, coarse to fine; none without a truth. See
    `scoring.score`."""
    if not _truth(results):
        return []
    return [
        Score(
            granularity,
            planted=int(scoring.truth_mask(results, granularity).sum()),
            rankings=[
                RankingScore(ranking.RANKINGS[name], values["auroc"], values["precision_at_k"])
                for name, values in by_ranking.items()
            ],
        )
        for granularity, by_ranking in scoring.score(results).items()
    ]


def joint_verdict(results: Results) -> JointVerdict | None:
    """The greedy path to the joint set, one step per neuron, and what the set carries; None where
    none was looked for."""
    if not results.run.get("joint"):
        return None
    found, joint = ranking.joint_set(results), results.run["joint"]
    planted = {tuple(place) for place in _truth(results).get("neurons", [])}
    confirmed = joint["confirmed"]
    return JointVerdict(
        steps=[
            JointStep(f"L{layer}.n{neuron}", (layer, neuron) in planted, nie, tie)
            for (layer, neuron), nie, tie in zip(
                found.picked, found.share_nie, found.share_tie, strict=True
            )
        ],
        share_nie=found.share_nie[-1],
        share_tie=found.share_tie[-1],
        sought=joint["share"],
        confirmed=confirmed
        and Confirmation(confirmed["share_nie"], confirmed["share_tie"], confirmed["pairs"]),
    )


def screen_verdict(results: Results) -> ScreenVerdict | None:
    """What was computed of the neurons, what may be missing, and how good the estimates are; None
    without a screen and scouts."""
    run, audit = results.run, results.run.get("audit")
    if not audit:
        return None
    verdict = Audited.BOUNDED if audit["sampled"] else Audited.NOT_AUDITED
    return ScreenVerdict(
        verdict=verdict if audit["uncomputed"] else Audited.COMPLETE,
        candidates=audit["candidates"],
        sampled=audit["sampled"],
        uncomputed=audit["uncomputed"],
        group_size=run.get("group_size", 1),
        wanted=run["screen"] or run["scout_top"],
        threshold=audit["threshold"],
        metric_unit=run["metric_unit"],
        bound=audit["bound"],
        confidence=audit["confidence"],
        hits=audit["hits"],
        spearman=audit["spearman"],
        scouts=len(results.scouts),
        others=len(results.pair_ids) - len(results.scouts) if results.scouts else 0,
    )


def _screen_figure(results: Results, screen: ScreenVerdict) -> Figure:
    exact = ranking.exact_strength(results, "neuron")
    estimated = ranking.estimated_strength(results)
    both = ~np.isnan(exact) & ~np.isnan(estimated)
    return figures.draw_screen(
        estimated=estimated[both],
        exact=exact[both],
        candidates=screen.candidates,
        threshold=screen.threshold,
        metric_unit=screen.metric_unit,
        scouted=bool(screen.scouts),
    )


def _statuses(results: Results) -> list[dict]:
    """How many effects of each granularity have which status."""
    rows = []
    for granularity in results.granularities:
        counts, begun = slabs.statuses(results, granularity)
        # Positions beyond a pair's length, and directions that do not exist, are no work undone.
        if granularity in ("token", "direction"):
            units = math.prod(results.sizes.shape(granularity))
            counts[Status.NOT_RUN] = units * np.count_nonzero(~begun)
        rows.append(
            {
                "granularity": granularity,
                "exact": counts[Status.EXACT],
                "estimated": counts[Status.ESTIMATED],
                "failed": counts[Status.FAILED],
                "left_out": counts[Status.LEFT_OUT],
                "not_run": counts[Status.NOT_RUN],
            }
        )
    return rows


def _pairs(results: Results, shown) -> list[dict]:
    """What was measured of each pair, and the text of those that are to be shown."""
    texts = {str(pair.id): pair for pair in shown or ()}
    rows = []
    # Each is read from its file once, not once for each pair.
    totals = zip(results.pair_ids, results.y_base, results.y_source, results.te, strict=True)
    for pair_id, y_base, y_source, te in totals:
        pair = texts.get(pair_id)
        rows.append(
            {
                "id": pair_id,
                "y_base": y_base,
                "y_source": y_source,
                "te": te,
                "prompt": pair and pair.prompt_text,
                "counterfactual": pair and pair.counterfactual_text,
            }
        )
    return rows
