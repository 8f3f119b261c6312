"""Prompt pairs: what is asked of the model."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jinja2

from models.errors import InputError

SPLITS = ("A", "B", "C")


class DataError(InputError):
    """Something is wrong with a file of pairs or prompts; the message names the file and line."""


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


# Fields of text, and those that may give its token ids instead.
PROMPTS = {"prompt": "prompt_ids", "counterfactual": "counterfactual_ids"}
ANSWERS = {"harmful_response": "harmful_ids", "safe_response": "safe_ids"}
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
    path = existing_file(path)
    return collect(
        path,
        json_lines(path),
        lambda fields, place, where: _pair(fields, where, tokenizer, chat),
        "pairs",
        on_bad,
    )


def existing_file(path) -> pathlib.Path:
    """The path, of a file that is there; `DataError` if it is not."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}")
    return path


def collect(
    path: pathlib.Path,
    rows: Iterable[tuple[int, dict | DataError]],
    make: Callable,
    what: str,
    on_bad: Callable[[DataError], None] | None,
) -> list:
    """Makes an object with an `id` of every row of a file.

    Args:
        path: the file.
        rows: the line that each row begins at, and its fields, or why they cannot be read. A field
            that is None is as good as absent.
        make: called with the fields, the row's place in the file, from 1, and "file:line"; makes
            the object or raises.
        what: name of what is made, for messages.
        on_bad: told of a bad row, which is then left out; by default a bad row is an error.

    Raises:
        DataError: a bad row, an id that was used before, or nothing is left.
    """
    made, used = [], {}
    for place, (number, fields) in enumerate(rows, start=1):
        where = f"{path}:{number}"
        try:
            if isinstance(fields, DataError):
                raise fields
            fields = {name: value for name, value in fields.items() if value is not None}
            one = make(fields, place, where)
            if one.id in used:
                raise DataError(f"{where}: id '{one.id}' was used before, by {used[one.id]}")
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        used[one.id] = where
        made.append(one)
    if not made:
        raise DataError(f"{path}: holds no {what}")
    return made


def json_lines(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The number and the fields of each line of a JSONL file; blank lines are passed over."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield number, json_object(parse_json(line, where), where)
            except DataError as error:
                yield number, error


def parse_json(encoded: bytes, where: str):
    """The value of UTF-8 JSON; `DataError`, beginning with `where`, if it is not."""
    try:
        return json.loads(encoded.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise DataError(f"{where}: not to be read as JSON ({error})") from None


def json_object(value, where: str) -> dict:
    """The fields of a JSON object; `DataError` if it is none, or has text that is no text."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: has half of a surrogate pair, which is no character") from None
    return value


def _pair(fields: dict, where: str, tokenizer, chat: bool) -> Pair:
    identity = str(fields.get("id", where.rpartition(":")[2]))
    as_prompt = functools.partial(prompt_tokens, where=where, tokenizer=tokenizer, chat=chat)
    as_answer = functools.partial(answer_tokens, where=where, tokenizer=tokenizer)
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
    plain["split"] = split_of(plain.get("split"), plain.get("base", identity), where)
    spans = {name: _span(fields[name], name, where) for name in _SPANS if name in fields}
    return Pair(
        id=identity,
        where=where,
        prompt_text=as_text(fields.get("prompt")),
        counterfactual_text=as_text(fields.get("counterfactual")),
        is_chat=chat or isinstance(fields.get("prompt"), list),
        **tokens,
        **plain,
        **spans,
    )


def _tokens(fields: dict, text_name: str, ids_name: str, where: str, tokenise) -> tuple[int, ...]:
    """Token ids of one field, given as ids or as text; empty where the line has neither."""
    check_one_given(fields, text_name, ids_name, where)
    if ids_name in fields:
        return token_ids(fields[ids_name], ids_name, where)
    return tokenise(fields[text_name], text_name) if text_name in fields else ()


def check_one_given(fields: dict, text_name: str, ids_name: str, where: str) -> None:
    """Raises `DataError` where the fields have both a text and its token ids."""
    if text_name in fields and ids_name in fields:
        raise DataError(f"{where}: both '{text_name}' and '{ids_name}' are given; keep one")


def token_ids(value, name: str, where: str) -> tuple[int, ...]:
    """Token ids that a field gives; `DataError` unless it is a list of integers from 0."""
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise DataError(f"{where}: '{name}' must be a list of token ids (integers >= 0)")
    return tuple(value)


def answer_tokens(text, name: str, where: str, tokenizer) -> tuple[int, ...]:
    """Tokens of an answer: of text as it stands, without special tokens.

    Args:
        text: the field's value.
        name: the field's, for messages; so `where`.
        where: file and line.
        tokenizer: a Hugging Face tokenizer, or None.

    Raises:
        DataError: it is no text, or there is no tokenizer.
    """
    _check_tokenizer(tokenizer, name, ANSWERS[name], where)
    if not isinstance(text, str):
        raise DataError(f"{where}: '{name}' must be text")
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_tokens(text, name: str, where: str, tokenizer, *, chat: bool) -> tuple[int, ...]:
    """Tokens of a prompt: of text, or of chat messages through the chat template.

    Args:
        text: text, or a list or tuple of messages.
        name: of the field, for messages; so `where`.
        where: file and line.
        tokenizer: a Hugging Face tokenizer, or None.
        chat: text is one user message; without it, it gets the tokenizer's special tokens.

    Returns:
        Token ids; none of an empty prompt.

    Raises:
        DataError: it is neither text nor messages, there is no tokenizer, or its template cannot
            write them, or drops or alters what the user says.
    """
    _check_tokenizer(tokenizer, name, PROMPTS[name], where)
    if not text and isinstance(text, (str, list, tuple)):
        return ()  # of which the tokenizer would make a BOS, and the template a conversation
    if isinstance(text, str) and not chat:
        return tuple(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    check_messages(messages, name, where)
    asked = [message["content"] for message in messages if message["role"] == "user"]
    rendered = chat_text(tokenizer, messages, asked, what=f"'{name}'", where=where)
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])


# Many templates refuse a system role, or two messages in a row, by a TemplateError; the others come
# of operations on what is not there.
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
)


def chat_text(
    tokenizer,
    messages: Sequence[dict],
    needed: Sequence[str],
    *,
    what: str,
    where: str,
    owner: str = "the tokenizer",
) -> str:
    """Messages as a chat template writes them, up to where the answer begins.

    Templates of models that also read images may render contents only as lists of parts: where they
    lose those that are text, they get lists.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: each with `role` and `content`, both text.
        needed: contents that must be there one after the other, but for white space at their ends,
            which many templates strip.
        what: what the messages are, for errors; so `where`, and `owner`, who has the template.

    Raises:
        DataError: there is no template, it fails, or it drops or alters what is needed.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{where}: {what} cannot be shown as a chat: {owner} has no chat template")
    problems = []
    for as_content in (str, lambda text: [{"type": "text", "text": text}]):
        given = [message | {"content": as_content(message["content"])} for message in messages]
        try:
            rendered = tokenizer.apply_chat_template(
                given, add_generation_prompt=True, tokenize=False
            )
        except _TEMPLATE_ERRORS as error:
            problems.append(f"refuses {what}: {error}")
            continue
        # Where a template for text gets a list, it writes brackets and all.
        as_list = as_content is not str and any(str(m["content"]) in rendered for m in given)
        if _has_in_order(rendered, needed) and not as_list:
            return rendered
        problems.append(f"drops or alters {what}")
    raise DataError(f"{where}: the chat template of {owner} {problems[0]}")


def _has_in_order(rendered: str, texts: Iterable[str]) -> bool:
    end = 0
    for text in map(str.strip, texts):
        start = rendered.find(text, end)
        if start < 0:
            return False
        end = start + len(text)
    return True


def check_messages(value, name: str, where: str) -> None:
    """Raises `DataError` unless the value of a field is a list of chat messages."""
    if not are_messages(value):
        raise DataError(
            f"{where}: '{name}' must be text or a list of messages with 'role' and 'content', "
            "both text"
        )


def are_messages(value) -> bool:
    """Whether it is a list or tuple of objects with `role` and `content`, both text."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
        for m in value
    )


def _check_tokenizer(tokenizer, text_name: str, ids_name: str, where: str) -> None:
    if tokenizer is None:
        raise DataError(
            f"{where}: '{text_name}' is text, but the checkpoint has no tokenizer; "
            f"give '{ids_name}' instead"
        )


def split_of(given: str | None, key: str, where: str) -> str:
    """The split that a file gives, or else a hash of the key, so that it never moves.

    Raises:
        DataError: what the file gives is no split.
    """
    if given is None:
        return SPLITS[hashlib.sha256(key.encode()).digest()[0] % len(SPLITS)]
    if given not in SPLITS:
        raise DataError(f"{where}: split is '{given}', not one of {', '.join(SPLITS)}")
    return given


def _span(value, name: str, where: str) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(i) is int for i in value)
        or not 0 <= value[0] < value[1]
    ):
        raise DataError(f"{where}: '{name}' must be [start, stop] with 0 <= start < stop")
    return tuple(value)


def normalised(text: str) -> str:
    """The text without what does not make another prompt of it: white space and letter case."""
    return " ".join(text.split()).casefold()


def fingerprints(text: str | None, tokens: tuple[int, ...]) -> set[str]:
    """Hashes that two prompts share if they are the same, whatever their ids: that of the tokens,
    and that of what `as_text` shows, but for white space and letter case."""
    contents = [list(tokens)] + ([] if text is None else [normalised(text)])
    return {hashlib.sha256(json.dumps(one).encode()).hexdigest()[:32] for one in contents}


def as_text(prompt) -> str | None:
    """A prompt as it is shown: text as it stands, messages as JSON; None for no prompt."""
    return prompt if prompt is None or isinstance(prompt, str) else json.dumps(prompt)
