"""Prompt pairs: what is asked of the model."""

import dataclasses
import datetime
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jaxmed.data import sets, splits
from jaxmed.data.chat import as_text
from jaxmed.data.tokens import (
    ANSWERS,
    PROMPTS,
    Encoder,
    Written,
    check_one_given,
    token_ids,
)
from jaxmed.files import reading
from jaxmed.files.reading import DataError


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base prompt, its counterfactual, and the two answers.

    Attributes:
        id: name of the pair, unique in its file.
        prompt_ids: tokens of the base prompt x, the one whose run complies.
        counterfactual_ids: tokens of the source prompt x'.
        harmful_ids, safe_ids: tokens of the harmful and of the safe answer; may be empty.
        prompt_span, counterfactual_span: [start, stop) of the tokens that correspond, for
            alignment by span.
        label, category, source, split: as in the file; the split is A, B or C, and where the file
            gives none a hash of the base's name.
        where: file and line that it was read from, for messages.
        prompt_text, counterfactual_text: what was tokenised; None for tokenised pairs.
        is_chat: whether the prompt went through the tokenizer's chat template.
        base_id: name of the base prompt, which several pairs share where it has several
            counterfactuals; empty for the pair's own id.
        written: the base prompt as answers follow it; None where only its tokens are known.
    """

    id: str
    prompt_ids: tuple[int, ...]
    counterfactual_ids: tuple[int, ...]
    harmful_ids: tuple[int, ...] = ()
    safe_ids: tuple[int, ...] = ()
    prompt_span: tuple[int, int] | None = None
    counterfactual_span: tuple[int, int] | None = None
    label: str = ""
    category: str = ""
    source: str = ""
    split: str = ""
    where: str = "pair"
    prompt_text: str | None = None
    counterfactual_text: str | None = None
    is_chat: bool = False
    base_id: str = ""
    written: Written | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def base(self) -> str:
        """The base prompt's name, `base_id` or `id`: pairs that share it are not independent."""
        return self.base_id or self.id


def read(
    path: str | os.PathLike,
    tokenizer=None,
    *,
    chat: bool = False,
    date: datetime.date | None = None,
    template_args: Mapping[str, Any] | None = None,
    on_bad: Callable[[DataError], None] | None = None,
) -> list[Pair]:
    """Reads pairs from a JSONL file, one object a line.

    What there is to tell of their tokens is told as warnings (see `tokens.Remark`), and so are
    fields that look misspelt.

    Args:
        path: the file.
        tokenizer: a Hugging Face tokenizer; not needed where the file gives token ids.
        chat, date, template_args: as `tokens.Encoder` takes them.
        on_bad: told of a bad line, which is then left out; by default a bad line is an error.

    Raises:
        DataError: a line that is no JSON object, lacks a field or has a bad one, with its number.
    """
    encoder = Encoder(tokenizer, chat=chat, date=date, template_args=template_args)
    told: list[str] = []
    pairs = read_encoded(path, encoder, on_bad=on_bad, say=told.append)
    for line in (*told, *encoder.told):
        warnings.warn(line, stacklevel=2)
    return pairs


def read_encoded(
    path: str | os.PathLike,
    encoder: Encoder,
    *,
    on_bad: Callable[[DataError], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Pair]:
    """Reads pairs as `read` does, with what the encoder has to tell of them left to it; `say` is
    told of fields that look misspelt."""
    path = reading.existing_file(path)
    return reading.collect(
        path,
        reading.json_lines(path),
        lambda fields, place, where: _pair(fields, where, encoder),
        what="pairs",
        known=_FIELDS,
        on_bad=on_bad,
        say=say,
    )


# What a line may have, each text with what may stand in its place.
_FIELDS = (
    *(PROMPTS | ANSWERS).items(),
    *((name,) for name in ("id", "base", "label", "category", "source", "split")),
    *((name,) for name in ("prompt_span", "counterfactual_span")),
)


def _pair(fields: dict, where: str, encoder: Encoder) -> Pair:
    sets.check_whole(fields, (), where)
    identity = str(fields.get("id", where.rpartition(":")[2]))
    given = {}
    for text, ids in (PROMPTS | ANSWERS).items():
        check_one_given(fields, text, ids, where)
        if ids in fields:
            given[ids] = token_ids(fields[ids], ids, where)
    prompts = {
        text: encoder.prompt(fields[text], text, where)
        if text in fields
        else Written(given.get(ids, ()))
        for text, ids in PROMPTS.items()
    }
    answers = {name: fields[name] for name in ANSWERS if name in fields}
    tokens = {PROMPTS[text]: written.ids for text, written in prompts.items()}
    for text, ids in PROMPTS.items():
        if not tokens[ids]:
            is_there = text in fields or ids in fields
            what = f"an empty {text}" if is_there else f"no {text}"
            raise DataError(f"{where}: pair '{identity}' has {what} (field '{text}' or '{ids}')")
    tokens |= {ids: given.get(ids, ()) for ids in ANSWERS.values()}
    found = encoder.both_answers(answers, where, *prompts.values())
    tokens |= {ANSWERS[name]: answer for name, answer in found.items()}
    split = str(fields["split"]) if "split" in fields else None
    base_id = str(fields.get("base", identity))
    return Pair(
        id=identity,
        prompt_span=_span(fields, "prompt_span", where),
        counterfactual_span=_span(fields, "counterfactual_span", where),
        split=splits.split_of(split, base_id, where),
        where=where,
        prompt_text=as_text(fields.get("prompt")),
        counterfactual_text=as_text(fields.get("counterfactual")),
        is_chat=encoder.chat or isinstance(fields.get("prompt"), list),
        label=str(fields.get("label", "")),
        category=str(fields.get("category", "")),
        source=str(fields.get("source", "")),
        base_id=base_id or identity,
        written=prompts["prompt"],
        **tokens,
    )


def _span(fields: dict, name: str, where: str) -> tuple[int, int] | None:
    """The field's span; None where the line has none."""
    value = fields.get(name)
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(i) is int for i in value)
        or not 0 <= value[0] < value[1]
    ):
        raise DataError(f"{where}: '{name}' must be [start, stop] with 0 <= start < stop")
    return value[0], value[1]
