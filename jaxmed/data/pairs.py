"""Prompt pairs: what is asked of the model."""

import dataclasses
import functools
from collections.abc import Callable

from jaxmed.data import chat as chat_lib
from jaxmed.data import splits
from jaxmed.data import tokens as tokens_lib
from jaxmed.data.tokens import ANSWERS, PROMPTS
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
        base: the base prompt's name, which several pairs share where it has several
            counterfactuals; the pair's own id unless given.
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
    base: str = ""

    def __post_init__(self):
        if not self.base:
            object.__setattr__(self, "base", self.id)


_PLAIN_FIELDS = ("label", "category", "source", "split", "base")
_SPANS = ("prompt_span", "counterfactual_span")


def read(
    path, tokenizer=None, *, chat: bool = False, on_bad: Callable[[DataError], None] | None = None
) -> list[Pair]:
    """Reads pairs from a JSONL file, one object a line.

    Args:
        path: the file.
        tokenizer: a Hugging Face tokenizer; not needed where the file gives token ids.
        chat: wrap a prompt that is text in the tokenizer's chat template as one user message.
            A prompt given as chat messages always goes through the template; text does not unless
            asked, and is tokenised with the tokenizer's special tokens.
        on_bad: told of a bad line, which is then left out; by default a bad line is an error.

    Raises:
        DataError: a line that is no JSON object, lacks a field or has a bad one, with its number.
    """
    path = reading.existing_file(path)
    return reading.collect(
        path,
        reading.json_lines(path),
        lambda fields, place, where: _pair(fields, where, tokenizer, chat),
        "pairs",
        on_bad,
    )


def _pair(fields: dict, where: str, tokenizer, chat: bool) -> Pair:
    identity = str(fields.get("id", where.rpartition(":")[2]))
    as_prompt = functools.partial(
        tokens_lib.prompt_tokens, where=where, tokenizer=tokenizer, chat=chat
    )
    as_answer = functools.partial(tokens_lib.answer_tokens, where=where, tokenizer=tokenizer)
    tokens = {
        ids: _tokens(fields, text, ids, where, as_prompt if text in PROMPTS else as_answer)
        for text, ids in (PROMPTS | ANSWERS).items()
    }
    for text, ids in PROMPTS.items():
        if not tokens[ids]:
            given = text in fields or ids in fields
            what = f"an empty {text}" if given else f"no {text}"
            raise DataError(f"{where}: pair '{identity}' has {what} (field '{text}' or '{ids}')")
    plain = {name: str(fields[name]) for name in _PLAIN_FIELDS if name in fields}
    plain["split"] = splits.split_of(plain.get("split"), plain.get("base", identity), where)
    spans = {name: _span(fields[name], name, where) for name in _SPANS if name in fields}
    return Pair(
        id=identity,
        where=where,
        prompt_text=chat_lib.as_text(fields.get("prompt")),
        counterfactual_text=chat_lib.as_text(fields.get("counterfactual")),
        is_chat=chat or isinstance(fields.get("prompt"), list),
        **tokens,
        **plain,
        **spans,
    )


def _tokens(fields: dict, text_name: str, ids_name: str, where: str, tokenise) -> tuple[int, ...]:
    """Token ids of one field, given as ids or as text; empty where the line has neither."""
    tokens_lib.check_one_given(fields, text_name, ids_name, where)
    if ids_name in fields:
        return tokens_lib.token_ids(fields[ids_name], ids_name, where)
    return tokenise(fields[text_name], text_name) if text_name in fields else ()


def _span(value, name: str, where: str) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(i) is int for i in value)
        or not 0 <= value[0] < value[1]
    ):
        raise DataError(f"{where}: '{name}' must be [start, stop] with 0 <= start < stop")
    return tuple(value)
