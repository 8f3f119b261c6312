"""Prompt pairs: what is asked of the model."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import jinja2

from models.errors import InputError

SPLITS = ("A", "B", "C")


class DataError(InputError):
    """Something is wrong with a file of pairs; the message names the file and line."""


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
        label, category, source, split: as in the file; the split is A, B or C.
        where: file and line that it was read from, for messages.
        prompt_text, counterfactual_text: what was tokenised; None for tokenised pairs.
        is_chat: whether the prompt went through the tokenizer's chat template.
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


_TEXT_FIELDS = {
    "prompt": "prompt_ids",
    "counterfactual": "counterfactual_ids",
    "harmful_response": "harmful_ids",
    "safe_response": "safe_ids",
}
_PLAIN_FIELDS = ("label", "category", "source", "split")
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
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    pairs, lines = [], {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            pair = _parse(line, where, tokenizer, chat)
            if pair.id in lines:
                raise DataError(f"{where}: id '{pair.id}' was used before, by {lines[pair.id]}")
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        lines[pair.id] = where
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: holds no pairs")
    return pairs


def _parse(line: bytes, where: str, tokenizer, chat: bool) -> Pair:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        json.dumps(fields, ensure_ascii=False).encode()  # fails where an escape is no character
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise DataError(f"{where}: not to be read as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected one JSON object a line, found {type(fields).__name__}")
    fields = {name: value for name, value in fields.items() if value is not None}
    identity = str(fields.get("id", where.rpartition(":")[2]))
    tokens = {
        ids: _tokens(fields, text, ids, where, tokenizer, chat)
        for text, ids in _TEXT_FIELDS.items()
    }
    for text, ids in (("prompt", "prompt_ids"), ("counterfactual", "counterfactual_ids")):
        if not tokens[ids]:
            given = text in fields or ids in fields
            what = f"an empty {text}" if given else f"no {text}"
            raise DataError(f"{where}: pair '{identity}' has {what} (field '{text}' or '{ids}')")
    plain = {name: str(fields[name]) for name in _PLAIN_FIELDS if name in fields}
    plain.setdefault("split", _split(identity))
    if plain["split"] not in SPLITS:
        raise DataError(f"{where}: split is '{plain['split']}', not one of {', '.join(SPLITS)}")
    spans = {name: _span(fields[name], name, where) for name in _SPANS if name in fields}
    return Pair(
        id=identity,
        where=where,
        prompt_text=_as_text(fields.get("prompt")),
        counterfactual_text=_as_text(fields.get("counterfactual")),
        is_chat=chat or isinstance(fields.get("prompt"), list),
        **tokens,
        **plain,
        **spans,
    )


def _tokens(fields, text_name, ids_name, where, tokenizer, chat) -> tuple[int, ...]:
    """Token ids of one field, given as ids or as text; empty where the line has neither."""
    ids, text = fields.get(ids_name), fields.get(text_name)
    if ids is not None:
        if text is not None:
            raise DataError(f"{where}: both '{text_name}' and '{ids_name}' are given; keep one")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{where}: '{ids_name}' must be a list of token ids (integers >= 0)")
        return tuple(ids)
    if text is None:
        return ()
    if tokenizer is None:
        raise DataError(
            f"{where}: '{text_name}' is text, but the checkpoint has no tokenizer; "
            f"give '{ids_name}' instead"
        )
    is_prompt = ids_name in ("prompt_ids", "counterfactual_ids")
    if is_prompt and text in ("", []):
        return ()  # of which the tokenizer would make a BOS, and the template a conversation
    if isinstance(text, str) and not (is_prompt and chat):
        return tuple(tokenizer(text, add_special_tokens=is_prompt)["input_ids"])
    if not is_prompt:
        raise DataError(f"{where}: '{text_name}' must be text")
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
        for m in messages
    ):
        raise DataError(
            f"{where}: '{text_name}' must be text or a list of messages with 'role' and 'content', "
            "both text"
        )
    if not tokenizer.chat_template:
        raise DataError(f"{where}: '{text_name}' is a chat, but the tokenizer has no chat template")
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except jinja2.TemplateError as error:  # many templates refuse a system role, or two in a row
        raise DataError(
            f"{where}: the tokenizer's chat template refuses '{text_name}': {error}"
        ) from None
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _split(identity: str) -> str:
    """The split of a pair that names none: a hash of its id, so that it never moves."""
    return SPLITS[hashlib.sha256(identity.encode()).digest()[0] % len(SPLITS)]


def _span(value, name: str, where: str) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(i) is int for i in value)
        or not 0 <= value[0] < value[1]
    ):
        raise DataError(f"{where}: '{name}' must be [start, stop] with 0 <= start < stop")
    return tuple(value)


def _as_text(prompt) -> str | None:
    return prompt if prompt is None or isinstance(prompt, str) else json.dumps(prompt)
