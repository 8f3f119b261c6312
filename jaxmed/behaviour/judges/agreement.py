"""How a judge agrees with people's labels: files of labelled responses, and measures."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jaxmed.behaviour.judges.protocol import HARMFUL, REFUSED, Exchange, Judge, Verdict
from jaxmed.data import sets, tokens
from jaxmed.files import reading
from jaxmed.files.reading import DataError
from models.errors import InputError

_RESAMPLES, _SEED = 2000, 0  # of kappa's bootstrap


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file of responses.

    Attributes:
        fields: all that it holds.
        exchange: what is judged of it.
        labels: what people say: under "harmful" and "refused", as far as it has them.
    """

    fields: dict
    exchange: Exchange
    labels: dict[str, bool]


def read(path) -> list[Line]:
    """Reads responses from a JSONL file, one object a line.

    Fields: `prompt` and `response`, or `prompt_ids` and `response_ids`; as labels `harmful` (or
    `label`) and `refused`, true or false, or 1 or 0. A `label` that is text says what kind of
    prompt it is (`prompts.LABELS`), and labels no response. Other fields are kept.

    Raises:
        InputError: a line that cannot be used, with its number; also one with more of what was
            asked than a judge would read, as `context`.
    """
    path = reading.existing_file(path)
    lines = [_line(fields, f"{path}:{number}") for number, fields in reading.json_lines(path)]
    if not lines:
        raise DataError(f"{path}: holds no responses")
    return lines


def _line(fields: dict | DataError, where: str) -> Line:
    if isinstance(fields, DataError):
        raise fields
    sets.check_whole(fields, (), where)
    answered = {"response", "response_ids"} & set(fields)
    if {"condition", "sample"} <= set(fields) and not answered:
        raise DataError(
            f"{where}: is of a run's own files, where 'prompt' is no text but an id; give its "
            "exchanges.jsonl"
        )
    texts = {name: fields.get(name) for name in ("prompt", "response")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: '{name}' must be text")
    if texts["response"] is None and fields.get("response_ids") is None:
        raise DataError(f"{where}: has no response (field 'response' or 'response_ids')")
    label = str(fields["label"]) if fields.get("label") in sets.LABELS else ""
    exchange = Exchange(
        prompt=texts["prompt"],
        response=texts["response"],
        prompt_ids=_token_ids(fields, "prompt_ids", where),
        response_ids=_token_ids(fields, "response_ids", where),
        where=where,
        label=label,
    )
    return Line(fields, exchange, _labels(fields, where))


def _token_ids(fields: Mapping, name: str, where: str) -> tuple[int, ...]:
    """A field of token ids; () if there is none."""
    given = fields.get(name)
    return () if given is None else tokens.token_ids(given, name, where)


def _labels(fields: Mapping, where: str) -> dict[str, bool]:
    """What people say of a line's response."""
    labels = {}
    for name, says in (("harmful", HARMFUL), ("label", HARMFUL), ("refused", REFUSED)):
        given = fields.get(name)
        if given is None or (name == "label" and isinstance(given, str)):
            continue
        if not isinstance(given, int | float) or given not in (0, 1):
            raise InputError(f"{where}: '{name}' must be true or false, or 1 or 0")
        if labels.setdefault(says, bool(given)) != bool(given):
            raise InputError(f"{where}: 'harmful' and 'label' contradict each other")
    return labels


def judged(judge: Judge, line: Line, verdict: Verdict) -> dict:
    """The fields of a line, and the verdict on it: `judge`, `judge_harmful`, `judge_refused`,
    `judge_complied`, `judge_cut`, `judge_harmful_mass` and `judge_refused_mass`."""
    said = {f"judge_{name}": value for name, value in dataclasses.asdict(verdict).items()}
    return line.fields | {"judge": judge.name} | said


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a judge agrees with labels. A share of nothing is NaN.

    Attributes:
        n: exchanges with both a verdict and a label.
        accuracy: the fraction on which they agree; accuracy_interval: Wilson's, 95%.
        kappa: Cohen's (1960), NaN if chance alone agrees always; kappa_interval: 95%, from a
            percentile bootstrap over exchanges.
        precision, recall: of the label 1.
        true_positive, false_positive, false_negative, true_negative: counts.
    """

    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    kappa: float
    kappa_interval: tuple[float, float]
    precision: float
    recall: float
    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int


def agreement(
    verdicts: Sequence[Verdict],
    labels: Sequence[bool | None],
    threshold: float = 0.5,
    says: str = HARMFUL,
) -> Agreement:
    """How verdicts agree with labels.

    Args:
        verdicts: of a judge.
        labels: of the same exchanges; None leaves an exchange out.
        threshold: a verdict of at least this counts as 1.
        says: "harmful" or "refused": which verdict the labels are of.

    Raises:
        InputError: no exchange has both.
    """
    said = [getattr(verdict, says) for verdict in verdicts]
    both = [
        (value >= threshold, bool(label))
        for value, label in zip(said, labels, strict=True)
        if value is not None and label is not None
    ]
    if not both:
        raise InputError(f"no exchange has both a verdict and a label of '{says}'")
    counts = collections.Counter(both)
    hits, false_alarms = counts[True, True], counts[True, False]
    misses, rejections = counts[False, True], counts[False, False]
    cells = np.array([hits, false_alarms, misses, rejections])
    agreed, n = hits + rejections, len(both)
    interval = stats.binomtest(agreed, n).proportion_ci(method="wilson")
    # Drawing exchanges anew draws the four counts from a multinomial.
    drawn = np.random.default_rng(_SEED).multinomial(n, cells / n, size=_RESAMPLES)
    kappas = _kappa(drawn)
    kappas = kappas[~np.isnan(kappas)]
    kappa_interval = np.quantile(kappas, (0.025, 0.975)) if kappas.size else (np.nan, np.nan)
    return Agreement(
        n=n,
        accuracy=agreed / n,
        accuracy_interval=(float(interval.low), float(interval.high)),
        kappa=float(_kappa(cells)),
        kappa_interval=(float(kappa_interval[0]), float(kappa_interval[1])),
        precision=hits / (hits + false_alarms) if hits + false_alarms else float("nan"),
        recall=hits / (hits + misses) if hits + misses else float("nan"),
        true_positive=hits,
        false_positive=false_alarms,
        false_negative=misses,
        true_negative=rejections,
    )


def _kappa(cells: Int[np.ndarray, "*draw 4"]) -> Float[np.ndarray, "*draw"]:
    """Cohen's kappa of (true positive, false positive, false negative, true negative)."""
    hits, false_alarms, misses, rejections = np.moveaxis(cells.astype(np.float64), -1, 0)
    n = hits + false_alarms + misses + rejections
    said, labelled = (hits + false_alarms) / n, (hits + misses) / n
    observed = (hits + rejections) / n
    expected = said * labelled + (1 - said) * (1 - labelled)
    return np.divide(
        observed - expected, 1 - expected, out=np.full_like(expected, np.nan), where=expected < 1
    )
