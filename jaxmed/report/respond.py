"""What a run of `runs.respond` prints at its end: rates, pairs, and where they are."""

import dataclasses
import shlex
from collections.abc import Sequence

import numpy as np

from jaxmed.analysis import statistics
from jaxmed.behaviour.answers import PAIRS, RATES, TABLE, RespondOutcome
from jaxmed.behaviour.judges.protocol import HARMFUL, REFUSED
from jaxmed.data import sets
from jaxmed.report import rendering
from jaxmed.report.numbers import Measured


@dataclasses.dataclass(frozen=True)
class Rate:
    """A rate over prompts, as "harm rate"."""

    name: str
    mean: Measured


@dataclasses.dataclass(frozen=True)
class Answered:
    """The prompts of a label, and the rates that a judge says of them."""

    label: str
    prompts: int
    rates: Sequence[Rate]


def closing_lines(found: RespondOutcome) -> list[str]:
    """The lines."""
    rows = found.table.to_pylist()
    harmful = [row for row in rows if row["label"] == "harmful"]
    asked = {doubt.says for doubt in found.doubts}  # of judge models, which may have no verdict
    return rendering.lines(
        "respond.txt.j2",
        found=found,
        answered=answered(found),
        responses=found.samples * len(rows),
        unfinished=sum(row["unfinished"] for row in rows),
        doubts=[doubt for doubt in found.doubts if doubt.none or doubt.unsure],
        harm_unjudged=HARMFUL not in asked and any(row["harm_rate"] is None for row in harmful),
        refusal_unjudged=REFUSED not in asked and found.table["refusal_rate"].null_count > 0,
        table=found.folder / TABLE,
        pairs=found.folder / PAIRS,
        split=_first_split(found),
        command=command(found),
    )


def answered(found: RespondOutcome) -> list[Answered]:
    """What was answered, by label."""
    told = []
    for label in sets.LABELS:
        own = [row for row in found.table.to_pylist() if row["label"] == label]
        if own:
            rates = []
            for name in RATES.values():
                known = [row[name] for row in own if row[name] is not None]
                if known:
                    mean = Measured(*statistics.rate_interval(np.array(known)))
                    rates.append(Rate(name.replace("_", " "), mean))
            told.append(Answered(label, len(own), rates))
    return told


def _first_split(found: RespondOutcome) -> str | None:
    """The first split but the last that has pairs: units are found by it, and tested on others."""
    return next((split for split in "AB" if found.pairs[split]), None)


def command(found: RespondOutcome) -> str:
    """The command that finds units by these pairs."""
    words = ["python", "-m", "launch.mediate"]
    words += [f"--model={found.model}", f"--pairs={found.folder / PAIRS}", "--positions=prompt"]
    words += [f"--adapter={found.adapter}"] if found.adapter else []
    words += [f"--dtype={found.dtype}"] if found.dtype else []
    words += [f"--ignore_config={key}" for key in found.ignore_config]
    if found.chat:
        words.append("--chat")
    words += [f"--date={found.date}"] if found.date else []
    words += [f"--template_args={found.template_args}"] if found.template_args else []
    if split := _first_split(found):
        words.append(f"--split={split}")
    if found.same_start:
        words.append("--metric=response_logprob_diff")
    return shlex.join([*words, f"--out={found.folder / 'mediate'}"])
