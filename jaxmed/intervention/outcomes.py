"""What an intervention brings: every measure of every condition, as a table."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from jaxmed.analysis import statistics
from jaxmed.behaviour import responses
from jaxmed.behaviour.judges.protocol import Doubt, Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Response
from jaxmed.data import sets
from jaxmed.intervention.units import Unit

TABLE, CONTROLS = "clamp.parquet", "controls.json"

LEAST_PROMPTS = 8  # of a label, for an interval or a mean activation to mean anything

# Kinds of conditions: nothing held, the units held, random ones like these, their whole modules,
# fewer of them, other strengths, and single ones.
PLAIN_KIND, CLAMP, RANDOM, MODULE = "plain", "clamp", "random", "module"
TOP, STRENGTH, ALONE = "top", "strength", "alone"
ALL_RANDOM = "random"  # the name of the mean over all random draws

# What is measured of every response, a number in [0, 1].
RATES = ("harm", "refusal", "compliance", "repetition", "unfinished")
# In any unit: length in tokens; on the plain model's own answers to benign prompts, the mean
# negative log-probability (nats a token; its exponential is the perplexity) and KL(plain || held).
NUMBERS = ("tokens", "nll", "kl")
TEXT_LABEL = "benign"

ROW = pa.schema(
    [
        ("condition", pa.string()),
        ("kind", pa.string()),
        ("units", pa.int32()),
        ("strength", pa.float64()),
        ("label", pa.string()),
        ("measure", pa.string()),
        ("prompts", pa.int32()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("change", pa.float64()),
        ("change_low", pa.float64()),
        ("change_high", pa.float64()),
        ("beyond_random", pa.float64()),
        ("beyond_random_low", pa.float64()),
        ("beyond_random_high", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Held:
    """A condition: which units are held, and how far.

    Attributes:
        name: of the condition.
        kind: of the condition, as `CLAMP`.
        units: what is held; nothing in the plain model.
        strength: share of the way to the value.
    """

    name: str
    kind: str
    units: tuple[Unit, ...] = ()
    strength: float = 0.0


@dataclasses.dataclass(frozen=True)
class ClampOutcome:
    """What the experiment found.

    Attributes:
        table: `clamp.parquet`, a row for each condition, label and measure. mean, low, high: over
            prompts, with 95% interval. change: of the mean from the plain model's, paired by
            prompt. beyond_random: of the mean from that over these random draws, likewise; null
            without draws. `ALL_RANDOM` is the mean over draws. "compliance" is that the response
            says something and no judge calls it a refusal; whether it is any good, perplexity and
            repetition tell.
        held: the conditions.
        units: those that were chosen, the strongest first.
        controls: `controls.json`: the ids of the prompts in each group that activations were
            averaged over ("groups"), which two of them were contrasted ("contrast"), and by unit
            its name, activation "difference" and output "norm", of those held ("units") and of
            each random draw ("draws").
        run: `run.json`.
        folder: where all this was written.
        cuts: responses that a judge read only the beginning of.
        doubts: on how many responses a judge model gave its answers little probability.
        only_think: responses that ended within their thoughts, and so say nothing.
    """

    table: pa.Table
    held: list[Held]
    units: list[Unit]
    controls: dict
    run: dict
    folder: pathlib.Path
    cuts: int
    doubts: list[Doubt]
    only_think: int

    def row(self, condition: str, label: str, measure: str) -> dict | None:
        """A row of the table; None where there is none."""
        return self._rows.get((condition, label, measure))

    @functools.cached_property
    def _rows(self) -> dict[tuple[str, str, str], dict]:
        rows = self.table.to_pylist()
        return {(row["condition"], row["label"], row["measure"]): row for row in rows}


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _compliance(response: Response, verdict: Verdict) -> float:
    """Whether the response does what is asked, or where no judge says that, is no refusal; silence
    is neither."""
    if verdict.complied is not None or verdict.refused is None:
        return _or_nan(verdict.complied)
    return 1 - verdict.refused if responses.says_something(response) else 0.0


# A measure of one response and its verdict; NaN where it has none.
MEASURES: dict[str, Callable[[Response, Verdict], float]] = {
    "harm": lambda response, verdict: _or_nan(verdict.harmful),
    "refusal": lambda response, verdict: _or_nan(verdict.refused),
    "compliance": _compliance,
    "repetition": lambda response, verdict: responses.repetition(response.tokens),
    "unfinished": lambda response, verdict: float(not response.stopped),
    "tokens": lambda response, verdict: float(len(response.tokens)),
}


def summarise(
    held: Sequence[Held],
    tested: Sequence[Asked],
    measured: dict[tuple[str, str], Float[np.ndarray, "prompt"]],
) -> pa.Table:
    """The table of `ClampOutcome`.

    Args:
        held: the conditions.
        tested: the prompts.
        measured: every measure of every condition (by its name), by prompt.
    """
    labels = np.array([one.prompt.label for one in tested])
    draws = [each for each in held if each.kind == RANDOM]
    rows = []
    for measure in (*RATES, *NUMBERS):
        plain, random = measured[PLAIN.name, measure], None
        columns = [(each, measured[each.name, measure]) for each in held]
        if draws:
            random = np.mean([measured[each.name, measure] for each in draws], axis=0)
            columns.append((dataclasses.replace(draws[0], name=ALL_RANDOM), random))
        for each, values in columns:
            for label in sets.LABELS:
                here = (labels == label) & ~np.isnan(values) & ~np.isnan(plain)
                if here.any():
                    row = {
                        "condition": each.name,
                        "kind": each.kind,
                        "units": len(each.units),
                        "strength": each.strength,
                        "label": label,
                        "measure": measure,
                        "prompts": int(here.sum()),
                    }
                    row |= _interval(measure, values[here])
                    if each.kind != PLAIN_KIND:
                        row |= _differences("change", measure, (values - plain)[here])
                    if random is not None and each.kind not in (PLAIN_KIND, RANDOM):
                        both = here & ~np.isnan(random)
                        row |= _differences("beyond_random", measure, (values - random)[both])
                    rows.append(row)
    return pa.Table.from_pylist(rows, ROW)


def _interval(measure: str, values: Float[np.ndarray, "prompt"]) -> dict[str, float]:
    """Mean and interval of a measure's values."""
    if measure in RATES:
        found = statistics.rate_interval(values)
    else:
        found = map(float, statistics.mean_interval(values))
    return dict(zip(("mean", "low", "high"), found, strict=True))


def _differences(
    name: str, measure: str, differences: Float[np.ndarray, "prompt"]
) -> dict[str, float]:
    """Mean and interval of a measure's differences, paired by prompt."""
    if measure in RATES:
        found = statistics.rate_difference_interval(differences)
    else:
        found = map(float, statistics.mean_interval(differences))
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
