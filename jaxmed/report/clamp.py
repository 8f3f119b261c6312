"""The report of the settling experiment: does harm fall where units are held, and does the rest
stay?

Everything shown comes from the table that `outcomes.summarise` makes. Its rows become verdicts;
what these say is in `templates/clamp.*`. Signs are told in words, for units whose holding raises
harm say as much as those whose holding lowers it.
"""

import dataclasses
import enum
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from jaxmed.behaviour.judges.protocol import Doubt
from jaxmed.intervention.outcomes import ClampOutcome, Held
from jaxmed.report import numbers, pages, rendering
from jaxmed.report.figures import clamp as figures
from jaxmed.report.figures.canvas import BARS_IN_FIGURE, largest
from jaxmed.report.numbers import Measured

_UNITS_NAMED = 24  # run.json has all of them

# What is asked of the responses, by label and measure, the most important first.
LabelAndMeasure = tuple[str, str]
_HARM: LabelAndMeasure = ("harmful", "harm")
_REFUSAL: LabelAndMeasure = ("harmful", "refusal")
_COMPLIANCE: LabelAndMeasure = ("benign", "compliance")
QUESTIONS: tuple[LabelAndMeasure, ...] = (
    _HARM,
    _REFUSAL,
    _COMPLIANCE,
    ("overrefusal", "refusal"),
    ("creative", "compliance"),
    ("benign", "harm"),
    ("overrefusal", "harm"),
    ("creative", "harm"),
)
_LABELS = ("harmful", "benign", "overrefusal", "creative")
_SIDE_EFFECTS = ("repetition", "unfinished", "tokens")
_MEASURES = ("harm", "refusal", "compliance", "nll", "kl", "repetition", "unfinished", "tokens")
_DOSES = ("top", "strength")


class Move(enum.StrEnum):
    """What an interval says of a difference."""

    FALLS = "falls"
    RISES = "rises"
    NONE_SHOWN = "no change shown"  # the interval does not leave out 0
    NOT_TESTED = "not tested"  # one prompt is too few for an interval

    @classmethod
    def of(cls, low: float | None, high: float | None) -> "Move":
        """Of the interval of a difference."""
        if low is None or high is None or math.isnan(low):
            return cls.NOT_TESTED
        if high < 0:
            return cls.FALLS
        return cls.RISES if low > 0 else cls.NONE_SHOWN

    @property
    def is_shown(self) -> bool:
        """Whether there is one."""
        return self in (Move.FALLS, Move.RISES)


@dataclasses.dataclass(frozen=True)
class Change:
    """How a mean moves from the plain model to the one with units held, over the same prompts."""

    before: float
    after: float
    change: Measured
    verdict: Move


# Verdicts: each names the macro that tells it.


@dataclasses.dataclass(frozen=True)
class NotJudged:
    """No judge says what this measure ("harm" or "refusal") needs."""

    sentence: ClassVar[str] = "not_judged"
    measure: str
    judges: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Moved:
    """How the answer to a question changes; some of the prompts may have no verdict."""

    sentence: ClassVar[str] = "moved"
    question: LabelAndMeasure
    change: Change
    judged: int
    prompts: int


@dataclasses.dataclass(frozen=True)
class RoleVerdict:
    """What the move of harm says of the units; not theirs where random units may bring as much."""

    sentence: ClassVar[str] = "role"
    harm: Move
    theirs: bool


@dataclasses.dataclass(frozen=True)
class NotSpecific:
    """Benign compliance falls; `too`: beside harm, or compliance with harmful prompts."""

    sentence: ClassVar[str] = "not_specific"
    too: bool


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Of the plain model's own answers to benign prompts; `times`: the ratio of after to before."""

    sentence: ClassVar[str] = "perplexity"
    before: float
    after: float
    times: Measured
    verdict: Move


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL from the plain model to the one with units held, in nats a token."""

    sentence: ClassVar[str] = "divergence"
    nats: Measured


@dataclasses.dataclass(frozen=True)
class ResponsesChanged:
    """Responses to prompts of a label repeat themselves, or do not end, more or less often."""

    sentence: ClassVar[str] = "responses_changed"
    label: str
    measure: str
    change: Change


@dataclasses.dataclass(frozen=True)
class WritesOtherwise:
    """The model no longer writes as before, so that rates of what it says tell little.

    Attributes:
        times: the ratio of perplexities after and before; None where it is not shown to rise beyond
            its margin.
        worse: which of "repetition" and "unfinished" rise in answers to benign prompts.
    """

    sentence: ClassVar[str] = "writes_otherwise"
    times: float | None
    worse: Sequence[str]


@dataclasses.dataclass(frozen=True)
class CutResponses:
    """Of so many responses a judge read only the beginning."""

    sentence: ClassVar[str] = "cut_responses"
    number: int


@dataclasses.dataclass(frozen=True)
class Doubted:
    """A judge model gave its answers little probability."""

    sentence: ClassVar[str] = "doubted"
    doubt: Doubt


@dataclasses.dataclass(frozen=True)
class OnlyThoughts:
    """So many responses ended before they came to an answer."""

    sentence: ClassVar[str] = "only_thoughts"
    number: int


@dataclasses.dataclass(frozen=True)
class NoRandomUnits:
    """There is nothing to compare with, though it may have been asked for."""

    sentence: ClassVar[str] = "no_random_units"
    asked: bool


@dataclasses.dataclass(frozen=True)
class Medians:
    """Of a trait of the units held, and of the random ones."""

    units: float
    random: float


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How like the units held the random ones are.

    Attributes:
        draws, asked: of random units.
        contrast: the first of the two groups of prompts whose activations differ.
        difference, norm: in activation between these, and of outputs.
    """

    sentence: ClassVar[str] = "likeness"
    draws: int
    asked: int
    contrast: str
    difference: Medians
    norm: Medians


@dataclasses.dataclass(frozen=True)
class AgainstRandom:
    """The answer to a question with these units held, and with random ones.

    Attributes:
        held, random: means; random is over all draws.
        draws: the mean of each draw.
        difference: of the means, paired by prompt.
    """

    sentence: ClassVar[str] = "against_random"
    question: LabelAndMeasure
    held: float
    random: float
    draws: Sequence[float]
    difference: Measured
    verdict: Move


@dataclasses.dataclass(frozen=True)
class ModulesHeld:
    """How the answer to a question changes where the units' whole modules are held."""

    sentence: ClassVar[str] = "modules"
    question: LabelAndMeasure
    change: Change


@dataclasses.dataclass(frozen=True)
class DoseCurve:
    """The answer to a question by dose ("top" or "strength"), the plain model at 0."""

    sentence: ClassVar[str] = "dose_curve"
    question: LabelAndMeasure
    kind: str
    points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class AloneVerdict:
    """Of so many units that were held alone, how many lower and raise the answer."""

    sentence: ClassVar[str] = "alone"
    question: LabelAndMeasure
    units: int
    lowering: int
    raising: int


# Rows of tables.


@dataclasses.dataclass(frozen=True)
class SideEffect:
    """What becomes of the responses to prompts of a label."""

    measure: str
    label: str
    change: Change


@dataclasses.dataclass(frozen=True)
class UnitAlone:
    """What a unit changes that is held alone: the main question, and benign compliance."""

    unit: str
    target: Change
    compliance: Change | None


@dataclasses.dataclass(frozen=True)
class ConditionRow:
    """A condition; the mean of so many draws, or of none. `means` follows the table's measures."""

    name: str
    mean_of: int
    units: int
    strength: float
    means: Sequence[Measured | None]


@dataclasses.dataclass(frozen=True)
class ConditionTable:
    """All conditions on the prompts of one label."""

    label: str
    measures: Sequence[str]
    rows: Sequence[ConditionRow]


def write(found: ClampOutcome, texts: list[dict]) -> pathlib.Path:
    """Writes `figures/*.png` and `report.html` into the folder.

    Args:
        found: what was found.
        texts: of every prompt that is shown: id, label, prompt, and responses, each with the name
            of its condition. Shown escaped; [] shows none.

    Returns:
        The path of `report.html`.
    """
    table = _Table(found)
    drawn = {
        "conditions": _conditions_figure(table),
        "doses": _doses_figure(table),
        "alone": _alone_figure(table),
    }
    edit = found.run["edit"]
    measured = edit in ("refused", "benign")
    return pages.write(
        found.folder,
        "clamp.html.j2",
        run=found.run,
        model=pages.model_name(found.run["model"]),
        units=found.units,
        units_named=_UNITS_NAMED,
        measured_on=len(found.controls["groups"][edit]) if measured else None,
        prompts={label: table.prompts(label) for label in table.labels()},
        headline=_moved(table, table.target) if table.target in table.questions else None,
        answers=answers(found),
        side_effects=_side_effects(table),
        controls=controls(found),
        doses=dose_curves(found),
        alone=alone_verdict(found),
        alone_rows=_alone_rows(table),
        conditions=_condition_tables(table),
        bars=BARS_IN_FIGURE,
        figures={
            name: pages.save(figure, found.folder, name)
            for name, figure in drawn.items()
            if figure is not None
        },
        texts=texts,
        files=[path.name for path in found.folder.iterdir()],
    )


def closing_lines(found: ClampOutcome) -> list[str]:
    """What the program prints at its end: where the results are, and what was measured."""
    return rendering.lines(
        "clamp.txt.j2",
        folder=found.folder,
        answers=answers(found),
        controls=controls(found),
        export=found.run["export"],
    )


def answers(found: ClampOutcome) -> list:
    """The verdicts on what holding the units does, the most important first."""
    table = _Table(found)
    verdicts: list = [
        NotJudged(measure, tuple(found.run["judges"]))
        for label, measure in (_HARM, _REFUSAL)
        if (label, measure) not in table.questions
    ]
    moved = {question: _moved(table, question) for question in table.questions}
    for question, verdict in moved.items():
        verdicts.append(verdict)
        if question == _HARM and verdict.change.verdict.is_shown:
            verdicts.append(_role(table, verdict.change.verdict))
    verdict_on = {question: each.change.verdict for question, each in moved.items()}
    if verdict_on.get(_COMPLIANCE) is Move.FALLS:
        too = verdict_on.get(_HARM) is Move.FALLS or verdict_on.get(_REFUSAL) is Move.RISES
        verdicts.append(NotSpecific(too))
    on_text = _on_benign_text(table) + _responses_changed(table)
    verdicts += on_text + _writes_otherwise(on_text, found.run["perplexity_margin"])
    if found.cuts:
        verdicts.append(CutResponses(found.cuts))
    verdicts += [Doubted(doubt) for doubt in found.doubts if doubt.none or doubt.unsure]
    if found.only_think:
        verdicts.append(OnlyThoughts(found.only_think))
    if not table.draws:
        verdicts.append(NoRandomUnits(asked=bool(found.run["random"])))
    return verdicts


def controls(found: ClampOutcome) -> list:
    """The verdicts on whether random units, and whole modules, do the same."""
    table = _Table(found)
    verdicts: list = _likeness(found) if table.main else []
    for question in table.main:
        row, random = table.held_row(question), table.row("random", question)
        if random is not None:
            drawn = table.rows(table.draws, question).values()
            verdicts.append(
                AgainstRandom(
                    question,
                    held=_clean(row["mean"]),
                    random=_clean(random["mean"]),
                    draws=[_clean(each["mean"]) for each in drawn],
                    difference=_difference(row, "beyond_random"),
                    verdict=_move(row, "beyond_random"),
                )
            )
    for question in table.main:
        for row in table.rows(table.of_kind("module"), question).values():
            verdicts.append(ModulesHeld(question, _change(row)))
    return verdicts


def dose_curves(found: ClampOutcome) -> list[DoseCurve]:
    """The answers to the main questions by dose."""
    table = _Table(found)
    return [
        DoseCurve(question, kind, [(dose, _clean(row["mean"])) for dose, row in points])
        for kind in _DOSES
        for question, points in _curves(table, kind).items()
    ]


def alone_verdict(found: ClampOutcome) -> AloneVerdict | None:
    """What single units do; None where none was held alone."""
    table = _Table(found)
    moves = [row.target.verdict for row in _alone_rows(table)]
    if not moves:
        return None
    return AloneVerdict(
        table.target, len(moves), lowering=moves.count(Move.FALLS), raising=moves.count(Move.RISES)
    )


class _Table:
    """The rows of a table, and what of it there is.

    Attributes:
        held: the conditions.
        questions: those that prompts and judges answer.
        target: harm, or refusal where harm was not judged.
        main: target and compliance, as far as they were judged.
        draws: names of the draws of random units.
    """

    def __init__(self, found: ClampOutcome):
        self._found = found
        self.held = found.held
        self.questions = [each for each in QUESTIONS if self.row("clamp", each) is not None]
        self.target = _HARM if _HARM in self.questions else _REFUSAL
        self.main = [each for each in (self.target, _COMPLIANCE) if each in self.questions]
        self.draws = self.of_kind("random")

    def row(self, condition: str, question: LabelAndMeasure) -> dict | None:
        """The row of a condition, label and measure; None where there is none."""
        return self._found.row(condition, *question)

    def held_row(self, question: LabelAndMeasure) -> dict:
        """The row of the units held, which every question of `questions` has."""
        return self.rows(["clamp"], question)["clamp"]

    def rows(self, conditions: Iterable[str], question: LabelAndMeasure) -> dict[str, dict]:
        """The rows that there are of a label and measure, by condition."""
        rows = {name: self.row(name, question) for name in conditions}
        return {name: row for name, row in rows.items() if row is not None}

    def of_kind(self, kind: str) -> list[str]:
        """The names of conditions."""
        return [each.name for each in self.held if each.kind == kind]

    def labels(self) -> list[str]:
        """The labels of the prompts."""
        return [label for label in _LABELS if self.row("plain", (label, "tokens")) is not None]

    def prompts(self, label: str) -> int:
        """How many prompts have a label."""
        return self.rows(["plain"], (label, "tokens"))["plain"]["prompts"]


def _clean(value: float) -> float:
    """A number without the rounding errors of a difference."""
    return round(value, 9) + 0.0


def _measured(value: float, low: float | None, high: float | None) -> Measured:
    if low is None or high is None:
        low = high = math.nan
    return Measured(_clean(value), _clean(low), _clean(high))


def _mean(row: dict) -> Measured:
    return _measured(row["mean"], row["low"], row["high"])


def _difference(row: dict, name: str) -> Measured:
    return _measured(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _move(row: dict, name: str) -> Move:
    return Move.of(row[f"{name}_low"], row[f"{name}_high"])


def _change(row: dict) -> Change:
    return Change(
        before=_clean(row["mean"] - row["change"]),
        after=_clean(row["mean"]),
        change=_difference(row, "change"),
        verdict=_move(row, "change"),
    )


def _moved(table: _Table, question: LabelAndMeasure) -> Moved:
    row = table.held_row(question)
    return Moved(question, _change(row), judged=row["prompts"], prompts=table.prompts(question[0]))


def _role(table: _Table, harm: Move) -> RoleVerdict:
    """What the units have to do with harm, which falls or rises where they are held."""
    beyond = _move(table.held_row(_HARM), "beyond_random") if table.draws else harm
    return RoleVerdict(harm, theirs=beyond is harm)


def _on_benign_text(table: _Table) -> list:
    verdicts = []
    if row := table.row("clamp", ("benign", "nll")):
        times = _measured(*(_exp(row[f"change{end}"]) for end in ("", "_low", "_high")))
        verdict = _move(row, "change")
        if numbers.fixed(times.low) == numbers.fixed(times.high) == numbers.fixed(1):
            # Rounding moves a log-probability a little, and always the same way.
            verdict = Move.NONE_SHOWN
        before, after = _exp(row["mean"] - row["change"]), _exp(row["mean"])
        verdicts.append(Perplexity(_clean(before), _clean(after), times, verdict))
    if row := table.row("clamp", ("benign", "kl")):
        verdicts.append(Divergence(_mean(row)))
    return verdicts


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _responses_changed(table: _Table) -> list[ResponsesChanged]:
    found = []
    for label in ("harmful", "benign"):
        for measure in ("repetition", "unfinished"):
            row = table.row("clamp", (label, measure))
            if row is not None and _move(row, "change").is_shown:
                found.append(ResponsesChanged(label, measure, _change(row)))
    return found


def _writes_otherwise(on_text: Sequence, margin: float) -> list[WritesOtherwise]:
    """Whether the verdicts on text show that the model is broken: nothing where they do not.

    Of perplexity the whole interval is beyond the margin. What answers to harmful prompts are like
    does not count: one that complies may well be longer.
    """
    times = [
        each.times.value
        for each in on_text
        if isinstance(each, Perplexity)
        and each.verdict is Move.RISES
        and each.times.low > 1 + margin
    ]
    worse = [
        each.measure
        for each in on_text
        if isinstance(each, ResponsesChanged)
        and each.label == "benign"
        and each.change.verdict is Move.RISES
    ]
    return [WritesOtherwise(times[0] if times else None, worse)] if times or worse else []


def _likeness(found: ClampOutcome) -> list[Likeness]:
    """How like the units held the random ones are; nothing without any."""
    controls = found.controls
    if not controls["draws"]:
        return []

    def medians(trait: str) -> Medians:
        random = [unit[trait] for draw in controls["draws"] for unit in draw]
        units = [unit[trait] for unit in controls["units"]]
        return Medians(float(np.median(units)), float(np.median(random)))

    return [
        Likeness(
            draws=len(controls["draws"]),
            asked=found.run["random"],
            contrast=controls["contrast"][0],
            difference=medians("difference"),
            norm=medians("norm"),
        )
    ]


def _side_effects(table: _Table) -> list[SideEffect]:
    """What becomes of the responses themselves, a row for each measure and label."""
    return [
        SideEffect(measure, label, _change(row))
        for measure in _SIDE_EFFECTS
        for label in table.labels()
        for row in table.rows(["clamp"], (label, measure)).values()
    ]


def _curves(table: _Table, kind: str) -> dict[LabelAndMeasure, list[tuple[float, dict]]]:
    """By question: doses of a kind and their rows, the plain model at 0; none where no other dose
    was run."""
    if not table.of_kind(kind):
        return {}
    doses = {
        each.name: len(each.units) if kind == "top" else each.strength
        for each in table.held
        if each.kind in ("plain", "clamp", kind)
    }
    names = sorted(doses, key=lambda name: doses[name])
    return {
        question: [(doses[name], row) for name, row in table.rows(names, question).items()]
        for question in table.main
    }


def _alone_rows(table: _Table) -> list[UnitAlone]:
    """Single units, what lowers the target most first."""
    rows = []
    for name, row in table.rows(table.of_kind("alone"), table.target).items():
        compliance = table.row(name, _COMPLIANCE)
        unit = name.removeprefix("only ")
        rows.append(UnitAlone(unit, _change(row), _change(compliance) if compliance else None))
    return sorted(rows, key=lambda row: row.target.change.value)


def _conditions_figure(table: _Table) -> Figure | None:
    if not table.questions:
        return None
    conditions = ["plain", "clamp", *(["random"] if table.draws else []), *table.of_kind("module")]
    titles = figures.RATE_TITLES
    return figures.draw_conditions(
        {
            titles[question]: {
                name: _mean(row) for name, row in table.rows(conditions, question).items()
            }
            for question in table.questions
        },
        {
            titles[question]: [row["mean"] for row in table.rows(table.draws, question).values()]
            for question in (table.questions if table.draws else ())
        },
        {name: figures.CONDITION_TITLES[name] for name in conditions},
    )


def _doses_figure(table: _Table) -> Figure | None:
    curves = {
        figures.DOSE_TITLES[kind]: {
            measure: [(dose, _mean(row)) for dose, row in points]
            for (_, measure), points in _curves(table, kind).items()
        }
        for kind in _DOSES
        if _curves(table, kind)
    }
    return figures.draw_doses(curves, _series(table)) if curves else None


def _alone_figure(table: _Table) -> Figure | None:
    rows = _alone_rows(table)
    if not rows:
        return None
    sizes = np.abs([row.target.change.value for row in rows])
    rows = [rows[index] for index in sorted(largest(sizes, BARS_IN_FIGURE))]
    changes = {table.target[1]: [row.target.change for row in rows]}
    if _COMPLIANCE in table.main:
        changes[_COMPLIANCE[1]] = [row.compliance and row.compliance.change for row in rows]
    return figures.draw_alone([row.unit for row in rows], changes, _series(table))


def _series(table: _Table) -> dict[str, str]:
    """Titles of the main measures, in figures."""
    return {
        question[1]: figures.RATE_TITLES[question].replace("\n", " ") for question in table.main
    }


def _condition_tables(table: _Table) -> list[ConditionTable]:
    """Every condition, a table for each label; the mean over draws comes before the first of
    them."""
    conditions: list[tuple[str, Held]] = []
    for each in table.held:
        if table.draws and each.name == table.draws[0]:
            conditions.append(("random", each))
        conditions.append((each.name, each))
    tables = []
    for label in table.labels():
        measures = _measures(table, label)
        rows = [
            ConditionRow(
                name,
                mean_of=len(table.draws) if name == "random" else 0,
                units=len(each.units),
                strength=each.strength,
                means=[_shown_mean(table.row(name, (label, measure))) for measure in measures],
            )
            for name, each in conditions
        ]
        tables.append(ConditionTable(label, measures, rows))
    return tables


def _measures(table: _Table, label: str) -> list[str]:
    """The columns of a label; compliance is 1 - refusal but for empty responses, and one of them is
    shown."""
    other = "refusal" if label in ("benign", "creative") else "compliance"
    return [
        measure
        for measure in _MEASURES
        if measure != other and table.row("plain", (label, measure)) is not None
    ]


def _shown_mean(row: dict | None) -> Measured | None:
    """The mean of a row; of log-probabilities the perplexity."""
    if row is None:
        return None
    if row["measure"] == "nll":
        return Measured(_clean(_exp(row["mean"])), math.nan, math.nan)
    return _mean(row)
