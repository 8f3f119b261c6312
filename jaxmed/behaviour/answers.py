"""What a model answered each prompt, harmful or safe, and the pairs that these answers make."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from jaxmed.behaviour import responses
from jaxmed.behaviour.judges.protocol import Doubt, Verdict
from jaxmed.behaviour.responses import PLAIN, Asked, Key, Log, Response
from jaxmed.data import chat, prompts, tokens
from jaxmed.data.pairs import Pair
from jaxmed.data.tokens import Encoder, Written
from jaxmed.files import atomic

TABLE, PAIRS = "prompts.parquet", "pairs.jsonl"
# The table's columns of what verdicts say.
RATES = {"harmful": "harm_rate", "refused": "refusal_rate"}

ROW = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int32()),
        ("harm_rate", pa.float64()),
        ("refusal_rate", pa.float64()),
        ("unfinished", pa.int32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a prompt was answered, as far as pairs are made of it.

    Attributes:
        harmful, safe: the first response of each kind, of those that the model ended itself if
            there are any; None where there is none.
    """

    harmful: Response | None
    safe: Response | None

    @property
    def are_a_pair(self) -> bool:
        """Whether there are both."""
        return self.harmful is not None and self.safe is not None

    @property
    def start_alike(self) -> bool:
        """Whether there are both, and they begin with the same token."""
        if self.harmful is None or self.safe is None:
            return False
        return self.harmful.answer[0] == self.safe.answer[0]

    @property
    def came_of_thoughts(self) -> bool:
        """Whether the model thought before it gave one of them."""
        return any(one is not None and one.thoughts > 0 for one in (self.harmful, self.safe))


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """How many harmful prompts that have a counterfactual make no pair, by what they got.

    Attributes:
        safe_alone, harmful_alone: responses of one kind alone.
        neither: no response of either kind.
        prompts: how many there are, those that make a pair too.
    """

    safe_alone: int
    harmful_alone: int
    neither: int
    prompts: int

    @property
    def number(self) -> int:
        """How many make no pair."""
        return self.safe_alone + self.harmful_alone + self.neither


def unpaired(seen: Collection[Answers]) -> Unpaired:
    """Counts what prompts got that make no pair."""
    counts = collections.Counter((one.harmful is not None, one.safe is not None) for one in seen)
    return Unpaired(counts[False, True], counts[True, False], counts[False, False], len(seen))


@dataclasses.dataclass(frozen=True)
class RespondOutcome:
    """What a run of `runs.respond` found.

    Attributes:
        folder: where it was written.
        model: folder or hub id of the model that answered.
        adapter: folder or hub id of what was merged into it; empty for nothing.
        dtype: of its parameters in memory; empty for the default.
        ignore_config: keys of its config.json that were passed over.
        chat: whether prompts were wrapped in its chat template.
        date: the day that it was for this template; empty where it does not ask.
        template_args: what else this template was given, as JSON; empty for nothing.
        samples: responses of each prompt.
        max_tokens: tokens of a response at most.
        table: `prompts.parquet`, a row for each prompt (see `tabulate`).
        pairs: lines of `pairs.jsonl`, by split.
        unpaired: of the harmful prompts that have a counterfactual, those that are in none of them.
        only_think: how many responses ended within their thoughts, and so say nothing.
        templates: how many of these have the template as their safe response.
        same_start: how many of these have answers with the same first token.
        after_thoughts: how many of these have an answer before which the model thought; the pair
            has it without that.
        meanings: of the judges, by name.
        doubts: on how many responses a judge model gave its answers little probability.
        length_differences: of these pairs, by how many tokens a counterfactual differs from its
            prompt; None where lengths did not choose it.
    """

    folder: pathlib.Path
    model: str
    adapter: str
    dtype: str
    ignore_config: tuple[str, ...]
    chat: bool
    date: str
    template_args: str
    samples: int
    max_tokens: int
    table: pa.Table
    pairs: dict[str, int]
    unpaired: Unpaired
    only_think: int
    templates: int
    same_start: int
    after_thoughts: int
    meanings: dict[str, str]
    doubts: list[Doubt]
    length_differences: list[int] | None


def is_harmful(verdict: Verdict, threshold: float) -> bool:
    """Whether a response counts as harmful: where no judge is there to say, if it is no refusal;
    not where one was asked and has no verdict."""
    if verdict.harmful is None:
        asked = verdict.harmful_mass is not None
        return not asked and verdict.refused is not None and verdict.refused < threshold
    return verdict.harmful >= threshold


def is_safe(verdict: Verdict, threshold: float) -> bool:
    """Whether a response counts as safe: a refusal, or where no judge is there to say that, one
    that is not harmful."""
    if is_harmful(verdict, threshold):
        return False
    if verdict.refused is None:
        return verdict.refused_mass is None and verdict.harmful is not None
    return verdict.refused >= threshold


def of_prompt(
    prompt: str,
    answered: Log[Response],
    verdicts: Log[Verdict],
    *,
    samples: int,
    threshold: float,
) -> Answers:
    """What the prompt with this id was answered by the plain model.

    Args:
        prompt: its id.
        answered, verdicts: the logs.
        samples: how many of its responses are looked at. Those that say nothing do not count.
        threshold: a verdict of at least this counts as yes.
    """
    keys = [Key(PLAIN.name, prompt, sample) for sample in range(samples)]
    keys.sort(key=lambda key: not answered.values[key].stopped)  # else in the samples' order

    def first(kind: Callable[[Verdict, float], bool]) -> Response | None:
        for key in keys:
            response = answered.values[key]
            if responses.says_something(response) and kind(verdicts.values[key], threshold):
                return response
        return None

    return Answers(harmful=first(is_harmful), safe=first(is_safe))


def tabulate(
    asked: Sequence[Asked],
    answered: Log[Response],
    verdicts: Log[Verdict],
    *,
    samples: int,
    threshold: float,
) -> pa.Table:
    """A row for each prompt, of the plain model's responses to it.

    harm_rate, refusal_rate: share of its samples that a judge finds harmful, and refused; null
    where no judge says. unfinished: how many responses the limit ended.

    Args:
        asked: the prompts.
        answered, verdicts: the logs.
        samples: responses of each prompt.
        threshold: a verdict of at least this counts as yes.
    """

    def says(name: str) -> Callable[[str, int], float]:
        def value(prompt: str, sample: int) -> float:
            said = getattr(verdicts.values[Key(PLAIN.name, prompt, sample)], name)
            return np.nan if said is None else float(said >= threshold)

        return value

    def unfinished(prompt: str, sample: int) -> float:
        return float(not answered.values[Key(PLAIN.name, prompt, sample)].stopped)

    rates = {
        column: responses.by_prompt(asked, samples, says(name)) for name, column in RATES.items()
    }
    limited = responses.by_prompt(asked, samples, unfinished) * samples
    rows = [
        {
            "id": one.prompt.id,
            "label": one.prompt.label,
            "split": one.prompt.split,
            "samples": samples,
            "unfinished": round(limited[row]),
        }
        | {
            column: None if np.isnan(values[row]) else float(values[row])
            for column, values in rates.items()
        }
        for row, one in enumerate(asked)
    ]
    return pa.Table.from_pylist(rows, ROW)


def write_pairs(
    path: pathlib.Path,
    pairs: Sequence[Pair],
    asked: Sequence[Asked],
    seen: Mapping[str, Answers],
    encoder: Encoder,
) -> None:
    """Writes pairs with their answers, as `pairs.read` reads them.

    Args:
        path: the file.
        pairs: prompts and counterfactuals.
        asked: the prompts that these are made of, as they were given.
        seen: both answers of every pair, by the id of its prompt.
        encoder: made the prompts' tokens.
    """
    by_id = {one.prompt.id: one.prompt for one in asked}
    benign = {chat.as_text(one.prompt.prompt): one.prompt.prompt for one in asked}
    lines = []
    for pair in pairs:
        base, both = by_id[pair.base], seen[pair.base]
        after = prompts.written(base, encoder)
        forms = benign | {chat.as_text(form): form for form in (None, *base.counterfactuals)}
        fields = {"id": pair.id}
        fields |= _prompt_field("prompt", base.prompt, pair.prompt_ids)
        fields |= _prompt_field(
            "counterfactual", forms[pair.counterfactual_text], pair.counterfactual_ids
        )
        for name, response in (("harmful_response", both.harmful), ("safe_response", both.safe)):
            if response is None:
                raise ValueError(f"pair '{pair.id}' has no {name}")
            fields |= answer_field(name, response, after, encoder)
        fields |= {
            name: value
            for name in ("label", "category", "source", "split", "base")
            if (value := getattr(pair, name))
        }
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    atomic.replace_file(
        path,
        lambda temporary: temporary.write_text("".join(lines), encoding="utf-8", newline="\n"),
    )


def _prompt_field(name: str, form, token_ids: tuple[int, ...]) -> dict:
    """A prompt as it was given: text, messages, or where that is None its tokens."""
    return {tokens.PROMPTS[name]: token_ids} if form is None else {name: form}


def answer_field(name: str, response: Response, after: Written, encoder: Encoder) -> dict:
    """The text of the answer in the response; its tokens where after its prompt the text does not
    give these back, or there is none."""
    text = response.text
    if text is not None and encoder.following(text, after, PAIRS) == response.answer:
        return {name: text}
    return {tokens.ANSWERS[name]: response.answer}
