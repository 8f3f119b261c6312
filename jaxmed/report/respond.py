"""What a run of `runs.respond` prints at its end."""

import shlex

import numpy as np

from jaxmed.analysis import statistics
from jaxmed.behaviour.answers import PAIRS, RATES, TABLE, RespondOutcome
from jaxmed.data import sets


def closing_lines(found: RespondOutcome) -> list[str]:
    """What a run prints at its end: rates, pairs, and where they are."""
    rows = found.table.to_pylist()
    lines = [f"Judge {name}: {meaning}" for name, meaning in found.meanings.items()]
    for label in sets.LABELS:
        own = [row for row in rows if row["label"] == label]
        if own:
            rates = [_rate(name, [row[name] for row in own]) for name in RATES.values()]
            lines.append(
                f"{label}: {len(own)} prompts, {found.samples} responses each; "
                + "; ".join(filter(None, rates))
            )
    unfinished = sum(row["unfinished"] for row in rows)
    lines.append(
        f"Ended by --max_tokens={found.max_tokens} and not by the model: {unfinished} of "
        f"{found.samples * len(rows)} responses"
    )
    if any(row["harm_rate"] is None for row in rows if row["label"] == "harmful"):
        lines.append("No judge says what is harmful: a response that is no refusal counts as such")
    if found.table["refusal_rate"].null_count:
        lines.append("No judge says what refuses: a response that is not harmful counts as safe")
    return lines + _pair_lines(found)


def _rate(name: str, values: list[float | None]) -> str:
    """A mean over prompts with its interval; empty where no judge says."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return ""
    mean, low, high = statistics.rate_interval(known)
    return f"{name.replace('_', ' ')} {mean:.3f} [{low:.3f}, {high:.3f}]"


def _pair_lines(found: RespondOutcome) -> list[str]:
    path = found.folder / PAIRS
    splits = ", ".join(f"{number} in split {split}" for split, number in found.pairs.items())
    counted = f"Pairs: {path} ({sum(found.pairs.values())}: {splits}"
    if found.templates:
        counted += f"; {found.templates} of them with --safe_template as the safe response"
    lines = [
        f"Prompts: {found.folder / TABLE} ({found.table.num_rows}); responses and verdicts are in "
        "the same folder",
        f"{counted})",
    ]
    command = ["python", "-m", "launch.mediate", f"--model={found.model}", f"--pairs={path}"]
    if found.chat:
        command.append("--chat")
    if split := next((split for split in "AB" if found.pairs[split]), None):
        command.append(f"--split={split}")
        lines.append(
            f"The command finds units by split {split} alone; the prompts of the others are left "
            "to test them, by launch.clamp"
        )
    else:
        lines.append(
            "All pairs are in split C, whose prompts launch.clamp tests by default: give it "
            "others, or another --split"
        )
    if found.same_start:
        lines.append(
            f"In {found.same_start} of the pairs both answers begin with the same token, of which "
            "--metric=logit_diff says nothing: the command reads whole responses"
        )
        command.append("--metric=response_logprob_diff")
    command.append(f"--out={found.folder / 'mediate'}")
    return [*lines, shlex.join(command)]
