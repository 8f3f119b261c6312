"""Sets of prompts: published ones and jaxmed's own, and the pairs that are made of them."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

from jaxmed.data import splits, tokens
from jaxmed.data.chat import as_text, check_messages
from jaxmed.data.sets import (
    LABELS,
    after_context,
    check_whole,
    label_by_file,
    recognised,
    translated,
)
from jaxmed.data.tokens import Encoder, Written
from jaxmed.files import atomic, reading
from jaxmed.files.reading import DataError
from jaxmed.files.tables import READERS


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, and what its file says of it.

    Attributes:
        id: its name, unique in its file.
        prompt: text, or a tuple of chat messages; None where only token ids are given.
        label: one of `LABELS`.
        split: A, B or C. Where the file gives none it is a hash: for prompts that correspond to
            others of source and match, so that these share a split; for others of published sets
            of the text, whatever its letter case and white space, so that a prompt that is in
            several sets does one job; else of the id.
        prompt_ids: its tokens where the file gives these instead, for checkpoints without a
            tokenizer; else empty.
        category: the kind of harm, in the words of the set; of HarmBench's behaviours also whether
            they are standard, contextual or copyright.
        source: name of the set.
        counterfactuals: prompts that the file gives to be contrasted with this one, each text or a
            tuple of chat messages.
        counterfactual_ids: the tokens of each, where the file gives these instead.
        harmful_response, safe_response: answers, or what these begin with; empty if not given.
        harmful_ids, safe_ids: their tokens, where the file gives these instead.
        match: what a harmful and a benign prompt of the same source have in common that correspond
            to each other; empty if none does.
        where: file and line that it was read from, for messages; two prompts that differ in
            nothing else are equal.
    """

    id: str
    prompt: str | tuple[dict, ...] | None
    label: str
    split: str
    prompt_ids: tuple[int, ...] = ()
    category: str = ""
    source: str = ""
    counterfactuals: tuple[str | tuple[dict, ...], ...] = ()
    counterfactual_ids: tuple[tuple[int, ...], ...] = ()
    harmful_response: str = ""
    safe_response: str = ""
    harmful_ids: tuple[int, ...] = ()
    safe_ids: tuple[int, ...] = ()
    match: str = ""
    where: str = dataclasses.field(default="prompt", compare=False)


_TEXTS = ("category", "source", "match")
# What a row of jaxmed's own form may have, each text with what may stand in its place.
_FIELDS = (
    *(tokens.PROMPTS | tokens.ANSWERS).items(),
    *((name,) for name in ("id", "label", "context", "split", *_TEXTS)),
)


def read(
    path: str | os.PathLike,
    *,
    label: str | None = None,
    source: str | None = None,
    on_bad: Callable[[DataError], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """Reads a set of prompts, which is recognised by its columns.

    The file is CSV, JSON (a list of objects), JSONL or parquet, by the end of its name. It is one
    of `SETS`, or jaxmed's own form: `id`, `prompt` (text or chat messages) or `prompt_ids`,
    `label`, and as far as they are there `context` (text that goes before a prompt that is text),
    `category`, `source`, `split`, `match`, `counterfactual` or `counterfactual_ids` (one, or a list
    of several), `harmful_response` or `harmful_ids`, `safe_response` or `safe_ids`; other fields
    are passed over, but for those that are named as a part of what is asked, which are refused. In
    CSV, token ids are JSON lists. Text is UTF-8, or UTF-16 with a byte-order mark.

    A file that has `prompt` (or `prompt_ids`) and says or gets a label is in jaxmed's own form,
    whatever columns of a published set, whose prompts are in another, it also has.

    Where the file gives no id it is the row's number, from 1. Ids of published sets have the source
    before it, and the label, or where the file's name tells that its word: `advbench-harmful-17`,
    `or-bench-80k-17`.

    Args:
        path: the file.
        label: one of `LABELS`, for a file that does not say it. One that says another is refused,
            save that it goes before the file's name, and before what Alpaca-like sets are by
            default (benign).
        source: a name for the set, instead of its own, that ids begin with.
        on_bad: told of a bad row, which is then left out; by default a bad row is an error.
        say: told of fields of jaxmed's own form that look misspelt.

    Raises:
        DataError: a bad row, with its line (in parquet its row); a file that cannot be read, or
            whose columns are of no known set.
    """
    if label is not None and label not in LABELS:
        raise DataError(f"label is '{label}', not one of {', '.join(LABELS)}")
    path = reading.existing_file(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: its name must end in one of {', '.join(READERS)}")
    rows = list(reader(path))
    columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    labels = [row["label"] for _, row in rows if isinstance(row, dict) and "label" in row]
    known = recognised(path, columns, labels, label) if columns else None
    kind = ""
    if known and known.label_by_file:
        label, kind = label_by_file(path, known, label)

    def make(row: dict, place: int, where: str) -> Prompt:
        check_whole(row, known.parts if known else ("context",), where)
        if known:
            row = translated(row, known, label)
            named = (source or known.name, kind or row.get("label"), row.get("id", place))
            row["id"] = "-".join(map(str, named))
        elif source is not None:
            row["id"] = f"{source}-{row.get('id', place)}"
        return _prompt({"id": place} | row, label, source, where, by_text=known is not None)

    fields = () if known else _FIELDS
    return reading.collect(path, rows, make, what="prompts", known=fields, on_bad=on_bad, say=say)


def write(path: str | os.PathLike, prompts: list[Prompt]) -> None:
    """Writes prompts in jaxmed's own form, as JSONL; `read` gives them back as they are."""
    lines = [json.dumps(_fields(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    atomic.replace_file(
        pathlib.Path(path),
        lambda temporary: temporary.write_text("".join(lines), encoding="utf-8", newline="\n"),
    )


def text(prompt: Prompt) -> str:
    """What the user asks, for a judge: the prompt's text, or its last message of a user.

    Raises:
        DataError: the prompt has only token ids, or no message of a user.
    """
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    asked = [message["content"] for message in prompt.prompt or () if message["role"] == "user"]
    if not asked:
        raise DataError(
            f"{prompt.where}: prompt '{prompt.id}' has no text of a user that could be judged"
        )
    return asked[-1]


def written(prompt: Prompt, encoder: Encoder | None = None, *, field: str = "prompt") -> Written:
    """The prompt as the model reads it: its own tokens, or its text's.

    Args:
        prompt: the prompt.
        encoder: makes tokens of text; not needed where the prompt has token ids.
        field: "prompt", or "counterfactual" of one that is, for messages.

    Raises:
        DataError: it is text, and the tokenizer is missing or its template refuses it.
    """
    if prompt.prompt_ids:
        return Written(prompt.prompt_ids)
    return (encoder or Encoder()).prompt(prompt.prompt, field, prompt.where)


def tokens_of(
    prompt: Prompt, encoder: Encoder | None = None, *, field: str = "prompt"
) -> tuple[int, ...]:
    """The tokens of `written`."""
    return written(prompt, encoder, field=field).ids


def all_counterfactual_tokens(
    prompt: Prompt, encoder: Encoder | None = None
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each counterfactual that the file gives, in its order.

    Args:
        prompt, encoder: as in `written`.

    Raises:
        DataError: it gives none; or as `tokens_of`.
    """
    given = counterfactuals_of(prompt)
    if not given:
        raise DataError(f"{prompt.where}: prompt '{prompt.id}' has no counterfactual")
    return tuple(tokens_of(one, encoder, field="counterfactual") for one in given)


def answers_of(prompt: Prompt, encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Tokens of the answers that the file gives, "harmful_ids" and "safe_ids"; empty if not given.

    Args:
        prompt, encoder: as in `written`.

    Raises:
        DataError: one is text, and there is no tokenizer.
    """
    after = written(prompt, encoder)
    return {
        ids: encoder.answer(answer, name, prompt.where, after)
        if (answer := getattr(prompt, name))
        else getattr(prompt, ids)
        for name, ids in tokens.ANSWERS.items()
    }


def counterfactuals_of(prompt: Prompt) -> list[Prompt]:
    """The counterfactuals that the file gives, as prompts that are else like this one."""
    texts = [{"prompt": one, "prompt_ids": ()} for one in prompt.counterfactuals]
    ids = [{"prompt": None, "prompt_ids": one} for one in prompt.counterfactual_ids]
    return [dataclasses.replace(prompt, **one) for one in texts + ids]


def _prompt(
    fields: dict, label: str | None, source: str | None, where: str, *, by_text: bool
) -> Prompt:
    """A prompt of the fields of jaxmed's own form.

    Args:
        fields: these, with an id.
        label, source: as in `read`.
        where: file and line.
        by_text: whether a hash of the text, and not of the id, says the split.
    """
    identity = str(fields["id"])
    texts = {name: str(fields[name]) for name in _TEXTS if name in fields}
    if source is not None:
        texts["source"] = source
    prompt = _conversation(fields["prompt"], "prompt", where) if "prompt" in fields else None
    prompt_ids = _ids(fields, "prompt_ids", where)
    tokens.check_one_given(fields, "prompt", "prompt_ids", where)
    if not (prompt or prompt_ids):
        raise DataError(f"{where}: prompt '{identity}' has no prompt, or an empty one")
    if fields.get("context"):
        prompt = _in_context(fields["context"], prompt, where)
    if texts.get("match"):
        split_key = f"{texts.get('source', '')} {texts['match']}"
    else:
        split_key = splits.normalised(as_text(prompt) or "") if by_text else identity
    counterfactuals, counterfactual_ids = _counterfactuals(fields, where)
    answers = {name: _answer(fields, name, ids, where) for name, ids in tokens.ANSWERS.items()}
    return Prompt(
        id=identity,
        prompt=prompt,
        prompt_ids=prompt_ids,
        label=_label(fields, label, where),
        split=splits.split_of(fields.get("split"), split_key, where),
        counterfactuals=counterfactuals,
        counterfactual_ids=counterfactual_ids,
        harmful_ids=_ids(fields, "harmful_ids", where),
        safe_ids=_ids(fields, "safe_ids", where),
        where=where,
        **texts,
        **answers,
    )


def _in_context(context, prompt: str | tuple[dict, ...] | None, where: str) -> str:
    """The prompt behind its context."""
    if not isinstance(context, str) or not isinstance(prompt, str):
        raise DataError(
            f"{where}: 'context' must be text that goes before a 'prompt' that is text; put it "
            "into the messages or tokens, or take the column away"
        )
    return after_context(context, prompt) if context.strip() else prompt


def _label(fields: dict, asked: str | None, where: str) -> str:
    label = fields.get("label", asked)
    if label is None:
        raise DataError(f"{where}: no label, which is one of {', '.join(LABELS)}")
    if label not in LABELS:
        raise DataError(f"{where}: label is '{label}', not one of {', '.join(LABELS)}")
    if asked is not None and label != asked:
        raise DataError(f"{where}: the prompt is {label}, but the file is said to be {asked}")
    return label


def _conversation(value, name: str, where: str) -> str | tuple[dict, ...]:
    """A prompt as it is kept; empty where there is nothing in it."""
    if isinstance(value, str):
        return value if value.strip() else ""
    check_messages(value, name, where)
    return tuple(value)


def _ids(fields: dict, name: str, where: str) -> tuple[int, ...]:
    return tokens.token_ids(fields[name], name, where) if name in fields else ()


def _counterfactuals(
    fields: dict, where: str
) -> tuple[tuple[str | tuple[dict, ...], ...], tuple[tuple[int, ...], ...]]:
    """The file's counterfactuals and the tokens of those that it gives as such, one or a list."""
    tokens.check_one_given(fields, "counterfactual", "counterfactual_ids", where)
    conversations, ids = (), ()
    if "counterfactual" in fields:
        value = fields["counterfactual"]
        is_one = not isinstance(value, list) or all(isinstance(item, dict) for item in value)
        conversations = tuple(
            _conversation(item, "counterfactual", where) for item in ([value] if is_one else value)
        )
    if "counterfactual_ids" in fields:
        value = fields["counterfactual_ids"]
        is_one = not isinstance(value, list) or not any(isinstance(item, list) for item in value)
        ids = tuple(
            tokens.token_ids(item, "counterfactual_ids", where)
            for item in ([value] if is_one else value)
        )
    if not (all(conversations) and all(ids)):
        raise DataError(f"{where}: an empty counterfactual")
    return conversations, ids


def _answer(fields: dict, name: str, ids_name: str, where: str) -> str:
    """The text of an answer; empty where the file has none, or has tokens instead."""
    tokens.check_one_given(fields, name, ids_name, where)
    answer = fields.get(name, "")
    if not isinstance(answer, str):
        raise DataError(f"{where}: '{name}' must be text")
    return answer


def _fields(prompt: Prompt) -> dict:
    """The prompt in jaxmed's own form, without what is empty."""
    fields = {name: value for name, value in vars(prompt).items() if value and name != "where"}
    for name in ("counterfactuals", "counterfactual_ids"):
        several = fields.pop(name, ())
        if several:
            one = several[0] if len(several) == 1 else several
            fields[name.replace("counterfactuals", "counterfactual")] = one
    return fields
