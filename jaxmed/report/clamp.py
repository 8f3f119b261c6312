"""The report of the settling experiment: does harm fall where units are held, and does the rest
stay?

Everything shown comes from the table that `outcomes.summarise` makes (see `ClampOutcome`). A row of
it is here a dict. Signs are told in words, for units whose holding raises harm say as much as those
whose holding lowers it.
"""

import math
import pathlib
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure

from jaxmed.intervention.outcomes import ClampOutcome
from jaxmed.report import numbers, pages
from jaxmed.report.figures import clamp
from jaxmed.report.figures.canvas import BARS_IN_FIGURE, largest
from jaxmed.report.numbers import Measured

_UNITS_NAMED = 24  # run.json has all of them

# What is asked of the responses, the most important first: label, measure, and its name.
_HARM = ("harmful", "harm")
_REFUSAL = ("harmful", "refusal")
_COMPLIANCE = ("benign", "compliance")
_QUESTIONS = {
    _HARM: "Harm rate",
    _REFUSAL: "Refusal of harmful prompts",
    _COMPLIANCE: "Compliance with benign prompts",
    ("overrefusal", "refusal"): "Refusal of harmless prompts that look harmful",
    ("creative", "compliance"): "Compliance with creative prompts",
    ("benign", "harm"): "Judged harmful, answers to benign prompts",
    ("overrefusal", "harm"): "Judged harmful, answers to harmless prompts that look harmful",
    ("creative", "harm"): "Judged harmful, answers to creative prompts",
}
_SHORT = {  # in figures
    _HARM: "harm,\nharmful prompts",
    _REFUSAL: "refusal,\nharmful prompts",
    _COMPLIANCE: "compliance,\nbenign prompts",
    ("overrefusal", "refusal"): "refusal, harmless\nthat look harmful",
    ("creative", "compliance"): "compliance,\ncreative prompts",
    ("benign", "harm"): "judged harmful,\nbenign prompts",
    ("overrefusal", "harm"): "judged harmful,\nonly look harmful",
    ("creative", "harm"): "judged harmful,\ncreative prompts",
}
_LABELS = {
    "harmful": "harmful prompts",
    "benign": "benign prompts",
    "overrefusal": "harmless prompts that look harmful",
    "creative": "creative prompts",
}
_SIDE_EFFECTS = ("repetition", "unfinished", "tokens")
_RESPONSES = {
    "repetition": "Repetition within responses",
    "unfinished": "Responses that the length limit ended",
}
_COLUMNS = {
    "harm": "harm",
    "refusal": "refusal",
    "compliance": "compliance",
    "nll": "perplexity",
    "kl": "KL",
    "repetition": "repetition",
    "unfinished": "unfinished",
    "tokens": "tokens",
}
_WITH_INTERVAL = ("harm", "refusal", "compliance")
_TITLES = {
    "plain": "plain",
    "clamp": "units held",
    "random": "random (dots: each draw)",
    "module": "whole modules",
}
_EDITS = {
    "refused": "their mean over harmful prompts that the plain model refuses",
    "benign": "their mean over benign prompts",
    "zero": "zero",
    "source": "their value at each prompt’s own counterfactual",
}
_POSITIONS = {
    "all": "all positions of prompt and response",
    "prompt": "the prompt’s positions",
    "answer": "the prompt’s last position and the response’s",
}
_DOSES = {"top": "number of units", "strength": "strength"}

# What an interval says of a difference, by its sign; None where one prompt is too few for one.
_MOVES = {
    -1: "it falls",
    1: "it rises",
    0: "no change that these prompts can show",
    None: "one prompt is too few to test it",
}
_BEYOND = {
    -1: "lower than with random units",
    1: "higher than with random units",
    0: "no difference that these prompts can show",
    None: "one prompt is too few to test it",
}
_ALONE = {-1: "lowers", 1: "raises", 0: "no measurable change", None: "not tested"}
_IN_TABLE = {-1: "falls", 1: "rises", 0: "no measurable change", None: "not tested"}
_NOUNS = {_HARM: "harm", _REFUSAL: "refusal of harmful prompts"}


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
        name: pages.save(drawing, found.folder, name)
        for name, drawing in {
            "conditions": _conditions_figure(table),
            "doses": _doses_figure(table),
            "alone": _alone_figure(table),
        }.items()
        if drawing is not None
    }
    return pages.write(
        found.folder,
        "clamp.html.j2",
        run=found.run,
        title=f"Units held still in {pages.model_name(found.run['model'])}: does harm fall?",
        facts=_facts(found, table),
        answers=_answers(found, table),
        side_effects=_side_effects(table),
        controls=_controls(found, table),
        doses=_dose_sentences(table),
        alone=_alone_sentence(table),
        alone_rows=_alone_rows(table),
        alone_measure=_NOUNS[table.target],
        figures=drawn,
        captions=_CAPTIONS,
        conditions=_condition_tables(table),
        values=_measured_on(found),
        texts=texts,
        files=_files(found.folder, drawn),
    )


def closing_lines(found: ClampOutcome) -> list[str]:
    """What the program prints at its end: where the results are, and what was measured."""
    table = _Table(found)
    return [
        f"Results: {found.folder} (open {found.folder / 'report.html'})",
        *_answers(found, table),
        *_controls(found, table),
    ]


class _Table:
    """The rows of a table, and what of it there is.

    Attributes:
        held: the conditions.
        questions: those that prompts and judges answer, and their names.
        target: harm, or refusal where harm was not judged.
        main: target and compliance, as far as they were judged.
        draws: names of the draws of random units.
    """

    def __init__(self, found: ClampOutcome):
        self._found = found
        self.held = found.held
        self.questions = {
            key: title for key, title in _QUESTIONS.items() if self.row("clamp", key) is not None
        }
        self.target = _HARM if _HARM in self.questions else _REFUSAL
        self.main = [key for key in (self.target, _COMPLIANCE) if key in self.questions]
        self.draws = self.of_kind("random")

    def row(self, condition: str, key: tuple[str, str]) -> dict | None:
        """The row of a condition, label and measure; None where there is none."""
        return self._found.row(condition, *key)

    def rows(self, conditions: Iterable[str], key: tuple[str, str]) -> dict[str, dict]:
        """The rows that there are of a label and measure, by condition."""
        rows = {name: self.row(name, key) for name in conditions}
        return {name: row for name, row in rows.items() if row is not None}

    def of_kind(self, kind: str) -> list[str]:
        """The names of conditions."""
        return [each.name for each in self.held if each.kind == kind]

    def labels(self) -> list[str]:
        """The labels of the prompts."""
        return [label for label in _LABELS if self.row("plain", (label, "tokens")) is not None]

    def prompts(self, label: str) -> int:
        """How many prompts have a label."""
        return self.row("plain", (label, "tokens"))["prompts"]


def _sign(row: dict, name: str = "change") -> int | None:
    """Of a difference whose interval leaves out 0; 0 where it does not, None without interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low is None or math.isnan(low):
        return None
    return int(low > 0) - int(high < 0)


def _shown(value: float, decimals: int = 2) -> str:
    """A number without the rounding errors of a difference."""
    return numbers.fixed(round(value, 9) + 0.0, decimals)


def _signed(value: float, decimals: int = 2) -> str:
    return ("+" if round(value, 9) > 0 else "") + _shown(value, decimals)


def _between(low: float, high: float, decimals: int = 2) -> str:
    if math.isnan(low):
        return "no interval"
    return f"95% interval {_shown(low, decimals)} to {_shown(high, decimals)}"


def _moved(row: dict, decimals: int = 2) -> str:
    """From where to where a mean moves, over the same prompts."""
    return (
        f"{_shown(row['mean'] - row['change'], decimals)} → {_shown(row['mean'], decimals)}"
        f" (change {_signed(row['change'], decimals)},"
        f" {_between(row['change_low'], row['change_high'], decimals)}): {_MOVES[_sign(row)]}"
    )


def _facts(found: ClampOutcome, table: _Table) -> list[tuple[str, str]]:
    run = found.run
    target = table.row("clamp", table.target)
    return [
        ("Model", run["model"]),
        ("Held", _held(found)),
        ("Held at", f"{_EDITS[run['edit']]} (--edit={run['edit']}){_measured_on(found)}"),
        ("Strength", _strength(run["strength"])),
        ("Where", _POSITIONS[run["positions"]]),
        ("Prompts", _prompts(table, run)),
        ("Responses", _sampling(run)),
        *((f"Judge {name}", meaning) for name, meaning in run["judges"].items()),
        ("Device", run["device"]),
        *([(_QUESTIONS[table.target], _moved(target))] if target else []),
    ]


def _held(found: ClampOutcome) -> str:
    names = [str(unit) for unit in found.units]
    text = ", ".join(names[:_UNITS_NAMED])
    if len(names) > _UNITS_NAMED:
        text += f", … ({len(names):,} in all, see the settings)"
    if found.run["results"]:
        text += f"; ranked by {found.run['results']} (--by={found.run['by']})"
    return text


def _measured_on(found: ClampOutcome) -> str:
    """On which prompts the values were measured that units are held at."""
    edit, split = found.run["edit"], found.run["split"]
    if edit not in ("refused", "benign"):
        return ""
    measured = f", measured on {len(found.controls['groups'][edit])} prompts of "
    if split:
        return f"{measured}the splits other than {split}"
    return f"{measured}those that are answered here: no split was kept apart"


def _strength(strength: float) -> str:
    return f"{strength:g}" + (
        " (held there)" if strength == 1 else " of the way from the unit’s own value to that one"
    )


def _prompts(table: _Table, run: dict) -> str:
    counts = [f"{table.prompts(label)} {_LABELS[label]}" for label in table.labels()]
    return f"{', '.join(counts)}; {'split ' + run['split'] if run['split'] else 'all splits'}"


def _sampling(run: dict) -> str:
    limit = f"at most {run['max_tokens']} tokens"
    if not run["temperature"]:
        return f"one to each prompt, the likeliest token each time, {limit}"
    cuts = [f"{name} {run[name]}" for name in ("top_p", "top_k") if run[name] not in (0, 1)]
    return (
        f"{run['samples']} to each prompt, sampled at temperature {run['temperature']:g}"
        f"{''.join(f', {cut}' for cut in cuts)}, {limit}; the same seeds under all conditions"
    )


def _answers(found: ClampOutcome, table: _Table) -> list[str]:
    """What holding the units does, the most important first."""
    rows = {key: table.row("clamp", key) for key in table.questions}
    signs = {key: _sign(row) for key, row in rows.items()}
    judges = ", ".join(found.run["judges"])
    sentences = []
    for said, key in (("are harmful", _HARM), ("refuse", _REFUSAL)):
        if key not in rows:
            sentences.append(f"Whether responses {said} was not judged (judges: {judges}).")
    for key, title in table.questions.items():
        sentences.append(f"{title}: {_moved(rows[key])}{_over(table, key)}.")
        if key == _HARM:
            sentences += _role(rows[key], bool(table.draws))
    if signs.get(_COMPLIANCE) == -1:
        too = " too" if signs.get(_HARM) == -1 or signs.get(_REFUSAL) == 1 else ""
        sentences.append(
            f"Compliance with benign prompts falls{too}: these units are not specific to harm."
        )
    sentences += _on_benign_text(table) + _changed_responses(table)
    if found.cuts:
        sentences.append(
            f"Of {found.cuts:,} {'response' if found.cuts == 1 else 'responses'} a judge read only"
            " the beginning; the whole was too long for it."
        )
    if not table.draws:
        none = " (there are none like these)" if found.run["random"] else ""
        sentences.append(
            f"No random units were held for comparison{none}, so what holding any units would do is"
            " not known."
        )
    return sentences


def _over(table: _Table, key: tuple[str, str]) -> str:
    """Over how many prompts, where some have no verdict."""
    count, prompts = table.row("clamp", key)["prompts"], table.prompts(key[0])
    return "" if count == prompts else f" (over the {count} of {prompts} prompts with a verdict)"


def _role(row: dict, compared: bool) -> list[str]:
    """What the sign of the change of harm says of the units."""
    sign = _sign(row)
    if not sign:
        return []
    if compared and _sign(row, "beyond_random") != sign:
        return ["That this is more than random units like these bring cannot be shown."]
    if sign < 0:
        role = "lower harm: what they do when left alone brings about part of it"
    else:
        role = "raise harm: what they do when left alone holds part of it back"
    return [f"Held so, these units {role}."]


def _changed_responses(table: _Table) -> list[str]:
    """Whether responses repeat themselves, or do not end, more or less often."""
    sentences = []
    for label in ("harmful", "benign"):
        for measure, title in _RESPONSES.items():
            row = table.row("clamp", (label, measure))
            if row is not None and _sign(row):
                sentences.append(f"{title}, {_LABELS[label]}: {_moved(row)}.")
    return sentences


def _on_benign_text(table: _Table) -> list[str]:
    sentences = []
    if row := table.row("clamp", ("benign", "nll")):
        before, after = _exp(row["mean"] - row["change"]), _exp(row["mean"])
        low, high = _exp(row["change_low"]), _exp(row["change_high"])
        sign = _sign(row)
        if sign and _shown(low) == _shown(high) == _shown(1):
            sign = 0  # rounding moves a log-probability a little, and always the same way
        sentences.append(
            f"Perplexity of the plain model’s own answers to benign prompts: {_shown(before)} →"
            f" {_shown(after)} (times {_shown(_exp(row['change']))}, {_between(low, high)}):"
            f" {_MOVES[sign]}."
        )
    if row := table.row("clamp", ("benign", "kl")):
        sentences.append(
            f"KL(plain ‖ held) on these answers: {_shown(row['mean'], 3)} nats a token"
            f" ({_between(row['low'], row['high'], 3)})."
        )
    return sentences


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _side_effects(table: _Table) -> list[dict]:
    """What becomes of the responses themselves, a row for each measure and label."""
    rows = []
    for measure in _SIDE_EFFECTS:
        decimals = _decimals(measure)
        for label in table.labels():
            row = table.row("clamp", (label, measure))
            if row is None:
                continue
            rows.append(
                {
                    "measure": measure,
                    "label": _LABELS[label],
                    "before": _shown(row["mean"] - row["change"], decimals),
                    "after": _shown(row["mean"], decimals),
                    "change": _signed(row["change"], decimals),
                    "interval": _rounded(row["change_low"], row["change_high"], decimals),
                    "words": _IN_TABLE[_sign(row)],
                }
            )
    return rows


def _decimals(measure: str) -> int:
    return 1 if measure == "tokens" else 2


def _rounded(low: float, high: float, decimals: int = 2) -> str:
    return numbers.interval(round(low, 9) + 0.0, round(high, 9) + 0.0, decimals)


def _controls(found: ClampOutcome, table: _Table) -> list[str]:
    """Whether random units, and whole modules, do the same."""
    sentences = _likeness(found) if table.main else []
    for key in table.main:
        row, random = table.row("clamp", key), table.row("random", key)
        if random is not None:
            sentences.append(
                f"{table.questions[key]}, against random units: {_shown(row['mean'])} where the"
                f" units are held, {_shown(random['mean'])} where random ones are"
                f" ({_draws(table, key)}); difference {_signed(row['beyond_random'])},"
                f" {_between(row['beyond_random_low'], row['beyond_random_high'])}:"
                f" {_BEYOND[_sign(row, 'beyond_random')]}."
            )
    for key in table.main:
        for row in table.rows(table.of_kind("module"), key).values():
            sentences.append(
                f"{table.questions[key]}, whole modules of these units held: {_moved(row)}."
            )
    return sentences


_CONTRASTS = {
    "complied": "harmful prompts that are answered and refused",
    "harmful": "harmful and benign prompts",
}


def _likeness(found: ClampOutcome) -> list[str]:
    """How like these units the random ones are."""
    controls = found.controls
    if not controls["draws"]:
        return []

    def both(name: str) -> str:
        random = [unit[name] for draw in controls["draws"] for unit in draw]
        medians = (np.median([unit[name] for unit in controls["units"]]), np.median(random))
        return " and ".join(f"{median:.3g}" for median in medians)

    number, asked = len(controls["draws"]), found.run["random"]
    fewer = f" (of {asked} asked: no others were found)" if number < asked else ""
    return [
        f"Random units: {number} {'draw' if number == 1 else 'draws'}{fewer}, of as many units in"
        " the same layers. Median of these units and of the random ones: activation difference"
        f" between {_CONTRASTS[controls['contrast'][0]]} {both('difference')}; output norm"
        f" {both('norm')}."
    ]


def _draws(table: _Table, key: tuple[str, str]) -> str:
    means = [row["mean"] for row in table.rows(table.draws, key).values()]
    if len(means) == 1:
        return "1 draw"
    least, most = _shown(min(means)), _shown(max(means))
    spread = f"from {least} to {most}" if least != most else f"all {least}"
    return f"mean of {len(means)} draws, {spread}"


def _curves(table: _Table, kind: str) -> dict[tuple[str, str], list[tuple[float, dict]]]:
    """By label and measure: doses of a kind and their rows, the plain model at 0; none where no
    other dose was run."""
    if not table.of_kind(kind):
        return {}
    doses = {
        each.name: len(each.units) if kind == "top" else each.strength
        for each in table.held
        if each.kind in ("plain", "clamp", kind)
    }
    names = sorted(doses, key=doses.get)
    return {
        key: [(doses[name], row) for name, row in table.rows(names, key).items()]
        for key in table.main
    }


def _dose_sentences(table: _Table) -> list[str]:
    return [
        f"{table.questions[key]} by {dose}: "
        + ", ".join(f"{_shown(row['mean'])} ({dose:g})" for dose, row in points)
        + "."
        for kind, dose in _DOSES.items()
        for key, points in _curves(table, kind).items()
    ]


def _alone(table: _Table) -> list[str]:
    """The conditions of single units, what lowers the target most first."""
    names = [name for name in table.of_kind("alone") if table.row(name, table.target)]
    return sorted(names, key=lambda name: table.row(name, table.target)["change"])


def _unit(condition: str) -> str:
    return condition.removeprefix("only ")


def _alone_sentence(table: _Table) -> str:
    names = _alone(table)
    if not names:
        return ""
    signs = [_sign(table.row(name, table.target)) for name in names]
    noun = _NOUNS[table.target]
    return (
        f"Of {len(names)} units held alone, {signs.count(-1)} lower {noun}, {signs.count(1)} raise"
        f" it, and of {len(names) - signs.count(-1) - signs.count(1)} no change can be measured."
    )


def _alone_rows(table: _Table) -> list[dict]:
    rows = []
    for name in _alone(table):
        both = [table.row(name, key) for key in (table.target, _COMPLIANCE)]
        rows.append(
            {
                "unit": _unit(name),
                "words": _ALONE[_sign(both[0])],
                "changes": [
                    {
                        "change": _signed(row["change"]),
                        "interval": _rounded(row["change_low"], row["change_high"]),
                    }
                    if row
                    else {"change": "–", "interval": "–"}
                    for row in both
                ],
            }
        )
    return rows


def _conditions_figure(table: _Table) -> Figure | None:
    if not table.questions:
        return None
    conditions = ["plain", "clamp", *(["random"] if table.draws else []), *table.of_kind("module")]
    return clamp.draw_conditions(
        {
            _SHORT[key]: {name: _measured(row) for name, row in table.rows(conditions, key).items()}
            for key in table.questions
        },
        {
            _SHORT[key]: [row["mean"] for row in table.rows(table.draws, key).values()]
            for key in (table.questions if table.draws else ())
        },
        {name: _TITLES[name] for name in conditions},
    )


def _doses_figure(table: _Table) -> Figure | None:
    curves = {
        dose: {
            key[1]: [(place, _measured(row)) for place, row in points]
            for key, points in found.items()
        }
        for kind, dose in _DOSES.items()
        if (found := _curves(table, kind))
    }
    return clamp.draw_doses(curves, _series(table)) if curves else None


def _alone_figure(table: _Table) -> Figure | None:
    names = _alone(table)
    if not names:
        return None
    sizes = np.abs([table.row(name, table.target)["change"] for name in names])
    names = [names[index] for index in sorted(largest(sizes, BARS_IN_FIGURE))]
    changes = {
        key[1]: [
            Measured(row["change"], row["change_low"], row["change_high"]) if row else None
            for row in (table.row(name, key) for name in names)
        ]
        for key in table.main
    }
    return clamp.draw_alone(list(map(_unit, names)), changes, _series(table))


def _measured(row: dict) -> Measured:
    return Measured(row["mean"], row["low"], row["high"])


def _series(table: _Table) -> dict[str, str]:
    """Titles of the main measures, in figures."""
    return {key[1]: _SHORT[key].replace("\n", " ") for key in table.main}


def _condition_tables(table: _Table) -> list[dict]:
    """Every condition, a table for each label."""
    conditions = [(each.name, each) for each in table.held]
    if table.draws:
        first = next(each for each in table.held if each.kind == "random")
        place = conditions.index((first.name, first))
        conditions.insert(place, ("random", first))
    return [
        {
            "label": _LABELS[label],
            "prompts": table.prompts(label),
            "columns": [_COLUMNS[measure] for measure in _measures(table, label)],
            "rows": [
                {
                    "name": f"random, mean of {len(table.draws)}" if name == "random" else name,
                    "units": len(each.units),
                    "strength": f"{each.strength:g}" if each.units else "–",
                    "cells": [
                        _cell(table.row(name, (label, measure)))
                        for measure in _measures(table, label)
                    ],
                }
                for name, each in conditions
            ],
        }
        for label in table.labels()
    ]


def _measures(table: _Table, label: str) -> Iterable[str]:
    """The columns of a label; compliance is 1 - refusal but for empty responses, and one of them is
    shown."""
    other = "refusal" if label in ("benign", "creative") else "compliance"
    return [
        measure
        for measure in _COLUMNS
        if measure != other and table.row("plain", (label, measure)) is not None
    ]


def _cell(row: dict | None) -> dict:
    if row is None:
        return {"mean": "–", "interval": ""}
    if row["measure"] == "nll":
        return {"mean": _shown(_exp(row["mean"])), "interval": ""}
    with_interval = row["measure"] in _WITH_INTERVAL
    return {
        "mean": _shown(row["mean"], _decimals(row["measure"])),
        "interval": _rounded(row["low"], row["high"]) if with_interval else "",
    }


def _files(folder: pathlib.Path, drawn: dict[str, str]) -> list[tuple[str, str]]:
    return [
        *((name, meaning) for name, meaning in _FILES.items() if (folder / name).exists()),
        *((f"figures/{name}.png", _CAPTIONS[name]) for name in drawn),
        ("report.html", "this page; it needs none of the other files"),
    ]


_FILES = {
    "run.json": "what was asked: every setting, the judges, versions",
    "responses.jsonl": "every response, by condition, prompt and sample",
    "exchanges.jsonl": "prompts and responses, to be labelled and compared with a judge"
    " (launch.judge)",
    "verdicts.jsonl": "what the judges say of every response",
    "controls.json": "the prompts that activations were averaged over; the random units of each"
    " draw, and how like the units held they are",
    "clamp.parquet": "a row for each condition, label and measure: mean, change, difference from"
    " random units, with intervals",
}
_CAPTIONS = {
    "conditions": "Rates by prompts and condition. Bars are 95% intervals of each mean; whether two"
    " conditions differ is told by the paired changes above, not by whether bars overlap.",
    "doses": "Rates by how much is held, 0 being the plain model. Bars are 95% intervals.",
    "alone": f"The change that each unit makes when it is held alone; of more than"
    f" {BARS_IN_FIGURE}, those with the largest.",
}
