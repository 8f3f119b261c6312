"""Sets of prompts: published ones and jaxmed's own, and the pairs that are made of them."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from jaxmed import data, results
from jaxmed.data import DataError
from models.errors import InputError

LABELS = ("harmful", "benign", "creative", "overrefusal")

COUNTERFACTUALS = ("given", "matched", "length")  # ways to find them


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


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """How a published set of prompts is recognised and read.

    Attributes:
        name: the source of its prompts.
        columns: those by which it is recognised; all must be there, in any order.
        fields: where each field of jaxmed's own form is found: a column, or a function of the row
            that gives None for a field that is not there.
        label: of all its prompts; empty where a field or the file's name says it.
        default_label: of all its prompts, unless one is given for the file.
        label_by_file: words in the names of its files that tell the label.
        only: whether it has no other columns than those, and one of these words in its file's name:
            for columns that are too few to tell it from jaxmed's own form.
    """

    name: str
    columns: tuple[str, ...]
    fields: Mapping[str, str | Callable[[dict], object]]
    label: str = ""
    default_label: str = ""
    label_by_file: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: bool = False

    def claims(self, path: pathlib.Path, columns: list[str], label: str | None) -> bool:
        """Whether a file of these columns is one of this set's; a label may be given for it."""
        if not self.only:
            return set(self.columns) <= set(columns)
        return (
            set(self.columns) == set(columns)
            and bool(self.words(path))
            and label in (None, *self.label_by_file.values())
        )

    def words(self, path: pathlib.Path) -> list[str]:
        """Those of `label_by_file` that the file's name has."""
        return [word for word in self.label_by_file if word in path.name.lower()]


def _after_context(row: dict):
    """A HarmBench behaviour behind its context, as HarmBench's own attacks put it."""
    context, behavior = row.get("ContextString"), row.get("Behavior")
    return f"{context}\n\n---\n\n{behavior}" if context and behavior else behavior


def _kind_of_behavior(row: dict):
    """What a HarmBench behaviour is about, and whether it is standard, contextual or copyright."""
    category, functional = row.get("SemanticCategory"), row.get("FunctionalCategory")
    return f"{category} ({functional})" if category and functional else category or functional


def _with_input(row: dict):
    """An Alpaca instruction, and what it is about."""
    instruction, about = row.get("instruction"), row.get("input")
    return f"{instruction}\n\n{about}" if about and instruction else instruction


def _label_of_type(row: dict):
    """XSTest's safe prompts only look harmful; those that contrast with them are."""
    if not isinstance(row.get("type"), str):
        return None
    return "harmful" if row["type"].startswith("contrast_") else "overrefusal"


def _number_in_xstest(row: dict):
    return row.get("id", row.get("id_v2"))


# To read another set, add it here.
SETS = (
    PromptSet(  # Zou et al. 2023; llm-attacks/llm-attacks, data/advbench/harmful_behaviors.csv
        "advbench",
        ("goal", "target"),
        {"prompt": "goal", "harmful_response": "target"},
        label="harmful",
    ),
    PromptSet(  # Mazeika et al. 2024; centerforaisafety/HarmBench, data/behavior_datasets
        "harmbench",
        ("Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID"),
        {"id": "BehaviorID", "prompt": _after_context, "category": _kind_of_behavior},
        label="harmful",
    ),
    PromptSet(  # Chao et al. 2024; JailbreakBench/JBB-Behaviors, harmful- and benign-behaviors.csv
        "jailbreakbench",
        ("Index", "Goal", "Target", "Behavior", "Category", "Source"),
        {
            "id": "Index",
            "prompt": "Goal",
            "harmful_response": "Target",
            "category": "Category",
            "match": "Behavior",
        },
        label_by_file={"harmful": "harmful", "benign": "benign"},
    ),
    PromptSet(  # Souly et al. 2024; alexandrasouly/strongreject, strongreject_dataset.csv
        "strongreject",
        ("category", "source", "forbidden_prompt"),
        {"prompt": "forbidden_prompt", "category": "category"},
        label="harmful",
    ),
    PromptSet(  # Röttger et al. 2024; paul-rottger/xstest, versions 1 and 2
        "xstest",
        ("prompt", "type", "focus"),
        {
            "id": _number_in_xstest,
            "prompt": "prompt",
            "label": _label_of_type,
            "category": "type",
        },
    ),
    PromptSet(  # Cui et al. 2024; bench-llm/or-bench: or-bench-80k, -hard-1k, -toxic
        "or-bench",
        ("prompt", "category"),
        {"prompt": "prompt", "category": "category"},
        label_by_file={"80k": "overrefusal", "hard": "overrefusal", "toxic": "harmful"},
        only=True,
    ),
    # Taori et al. 2023; tatsu-lab/stanford_alpaca, alpaca_data.json. The harmful and the harmless
    # splits of Arditi et al. 2024 (refusal_direction, dataset/splits) look alike.
    PromptSet(
        "alpaca",
        ("instruction",),
        {"prompt": _with_input, "category": "category"},
        default_label="benign",
    ),
)

_TEXTS = ("category", "source", "match")
_SHOWN = 30  # characters of a column's name, in an error


def read(
    path,
    *,
    label: str | None = None,
    source: str | None = None,
    on_bad: Callable[[DataError], None] | None = None,
) -> list[Prompt]:
    """Reads a set of prompts, which is recognised by its columns.

    The file is CSV, JSON (a list of objects), JSONL or parquet, by the end of its name. It is one
    of `SETS`, or jaxmed's own form: `id`, `prompt` (text or chat messages) or `prompt_ids`,
    `label`, and as far as they are there `category`, `source`, `split`, `match`, `counterfactual`
    or `counterfactual_ids` (one, or a list of several), `harmful_response` or `harmful_ids`,
    `safe_response` or `safe_ids`; other fields are passed over. In CSV, token ids are JSON lists.

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

    Raises:
        DataError: a bad row, with its line (in parquet its row); a file that cannot be read, or
            whose columns are of no known set.
    """
    if label is not None and label not in LABELS:
        raise DataError(f"label is '{label}', not one of {', '.join(LABELS)}")
    path = data.existing_file(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: its name must end in one of {', '.join(_READERS)}")
    rows = list(reader(path))
    columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    labels = [row["label"] for _, row in rows if isinstance(row, dict) and "label" in row]
    known = _recognised(path, columns, labels, label) if columns else None
    kind = ""
    if known and known.label_by_file:
        label, kind = _label_by_file(path, known, label)

    def make(row: dict, place: int, where: str) -> Prompt:
        if known:
            row = _translated(row, known, label)
            named = (source or known.name, kind or row.get("label"), row.get("id", place))
            row["id"] = "-".join(map(str, named))
        elif source is not None:
            row["id"] = f"{source}-{row.get('id', place)}"
        return _prompt({"id": place} | row, label, source, where, by_text=known is not None)

    return data.collect(path, rows, make, "prompts", on_bad)


def write(path, prompts: list[Prompt]) -> None:
    """Writes prompts in jaxmed's own form, as JSONL; `read` gives them back as they are."""
    lines = [json.dumps(_fields(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    results.replace_file(
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


def tokens_of(prompt: Prompt, tokenizer=None, *, chat: bool = False) -> tuple[int, ...]:
    """The prompt's tokens: its own, or its text's.

    Args:
        prompt: the prompt.
        tokenizer: a Hugging Face tokenizer; not needed where the prompt has token ids.
        chat: wrap a prompt that is text in the tokenizer's chat template, as in `data.read`.

    Raises:
        DataError: it is text, and the tokenizer is missing or its template refuses it.
    """
    return _prompt_tokens(prompt, "prompt", tokenizer, chat)


def all_counterfactual_tokens(
    prompt: Prompt, tokenizer=None, *, chat: bool = False
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each counterfactual that the file gives, in its order.

    Args:
        prompt, tokenizer, chat: as in `tokens_of`.

    Raises:
        DataError: it gives none; or as `tokens_of`.
    """
    given = _given(prompt)
    if not given:
        raise DataError(f"{prompt.where}: prompt '{prompt.id}' has no counterfactual")
    return tuple(_prompt_tokens(one, "counterfactual", tokenizer, chat) for one in given)


def pair_up(
    prompts: list[Prompt],
    how: str,
    tokenizer=None,
    *,
    chat: bool = False,
    count: int = 1,
    seed: int = 0,
    on_bad: Callable[[DataError], None] | None = None,
) -> list[data.Pair]:
    """Makes pairs of prompts and counterfactuals.

    Args:
        prompts: of one set or several, with ids that differ from each other.
        how: where counterfactuals are found. "given": those that the file gives, all of them.
            "matched": benign prompts with the same source and match. "length": benign prompts with
            as many tokens, the chat template's included. For the last two the prompts are those
            that are labelled harmful, and a counterfactual is of the same split, so that no prompt
            does two jobs.
        tokenizer, chat: as in `data.read`.
        count: how many counterfactuals a prompt has at most, for "matched" and "length".
        seed: of the choice where there are more; it does not depend on the order of the prompts.
        on_bad: told of a prompt that cannot be used or has no counterfactual, which is then left
            out; by default it is an error.

    Returns:
        The pairs in the prompts' order, with ids "ID/1", "ID/2", ..., where ID is the base prompt's
        and the pairs' `base`. They have the base prompt's label, category, source, split and
        answers.

    Raises:
        DataError: as above, and where nothing can be paired.
        InputError: `how` or `count` is not as above.
    """
    if how not in COUNTERFACTUALS:
        raise InputError(f"counterfactuals are {', '.join(COUNTERFACTUALS)}, not '{how}'")
    if count < 1:
        raise InputError(f"a prompt needs at least 1 counterfactual, not {count}")
    _check_ids_differ(prompts)
    read_tokens = functools.partial(tokens_of, tokenizer=tokenizer, chat=chat)
    if how == "given":
        bases = [one for one in prompts if one.label == "harmful" or _given(one)]
        find = _given
    else:
        bases = [one for one in prompts if one.label == "harmful"]
        find = _finder(prompts, how, read_tokens, count, seed, on_bad)
    pairs = []
    for base in bases:
        try:
            pairs += _pairs(base, find(base), how, tokenizer, chat)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
    if not pairs:
        raise DataError(f"not one of {len(prompts)} prompts has a counterfactual ('{how}')")
    return pairs


def _recognised(
    path: pathlib.Path, columns: list[str], labels: list, label: str | None
) -> PromptSet | None:
    """The set that a file is of; None for jaxmed's own form.

    Args:
        path: the file.
        columns: of its rows.
        labels: what its rows have as label.
        label: given for all of them.
    """
    known = next((known for known in SETS if known.claims(path, columns, label)), None)
    if {"prompt", "prompt_ids"} & set(columns):
        says_label = any(one in LABELS for one in labels)  # XSTest has labels of its own
        elsewhere = known is None or "prompt" not in known.columns
        if says_label or (elsewhere and label):
            return None
        if known is None:
            if "label" in columns:
                return None  # each of whose rows is told what its label lacks
            raise DataError(_no_label(path, columns))
    if known is not None:
        return known
    sets = "; ".join(f"{known.name} ({', '.join(known.columns)})" for known in SETS)
    # In a file without a header, these are a prompt.
    shown = ", ".join(map(_shortened, columns))
    raise DataError(
        f"{path}: its columns ({shown}) are of no known set of prompts. Known are {sets}; and "
        "jaxmed's own form, which has 'prompt' or 'prompt_ids', and a 'label' unless one is given "
        "for the whole file"
    )


def _shortened(column: str) -> str:
    return column if len(column) <= _SHOWN else column[:_SHOWN] + "..."


def _no_label(path: pathlib.Path, columns: list[str]) -> str:
    alike = [known for known in SETS if known.only and set(known.columns) == set(columns)]
    return (
        f"{path}: is of no known set of prompts, and says no label: give one of "
        f"{', '.join(LABELS)} for the whole file (--prompts=LABEL=FILE), or in a column 'label'"
    ) + "".join(
        f"; files of {known.name} have {' or '.join(known.label_by_file)} in their names"
        for known in alike
    )


def _label_by_file(path: pathlib.Path, known: PromptSet, asked: str | None) -> tuple[str, str]:
    """The label that is asked for, or that the file's name tells; and the word that tells it, or
    the label where the name does not."""
    labels, words = set(known.label_by_file.values()), known.words(path)
    found = {asked} & labels if asked else {known.label_by_file[word] for word in words}
    if len(found) != 1:
        raise DataError(
            f"{path}: {known.name} has files of the same columns for different labels, and neither "
            f"the name ({', '.join(known.label_by_file)}) nor the label that is given says which "
            f"this is: give {' or '.join(sorted(labels))}"
        )
    (label,) = found
    return label, next((word for word in words if known.label_by_file[word] == label), label)


def _translated(row: dict, known: PromptSet, label: str | None) -> dict:
    """The row of a published set in jaxmed's own form."""
    fields = {"source": known.name, "label": known.label or label or known.default_label or None}
    for name, place in known.fields.items():
        fields[name] = place(row) if callable(place) else row.get(place)
    if fields["label"] != "harmful":
        fields.pop("harmful_response", None)  # JailbreakBench's benign prompts have targets too
    return {name: value for name, value in fields.items() if value is not None}


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
    asked = {
        "prompt": _conversation(fields["prompt"], "prompt", where) if "prompt" in fields else None,
        "prompt_ids": _ids(fields, "prompt_ids", where),
    }
    data.check_one_given(fields, "prompt", "prompt_ids", where)
    if not any(asked.values()):
        raise DataError(f"{where}: prompt '{identity}' has no prompt, or an empty one")
    if texts.get("match"):
        split_key = f"{texts.get('source', '')} {texts['match']}"
    else:
        split_key = data.normalised(data.as_text(asked["prompt"])) if by_text else identity
    return Prompt(
        id=identity,
        label=_label(fields, label, where),
        split=data.split_of(fields.get("split"), split_key, where),
        where=where,
        **asked,
        **texts,
        **_counterfactuals(fields, where),
        **_answers(fields, where),
    )


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
    data.check_messages(value, name, where)
    return tuple(value)


def _ids(fields: dict, name: str, where: str) -> tuple[int, ...]:
    return data.token_ids(fields[name], name, where) if name in fields else ()


def _counterfactuals(fields: dict, where: str) -> dict[str, tuple]:
    """Each of the file's counterfactuals, of which it gives one or a list."""
    data.check_one_given(fields, "counterfactual", "counterfactual_ids", where)
    given = {"counterfactuals": (), "counterfactual_ids": ()}
    if "counterfactual" in fields:
        value = fields["counterfactual"]
        is_one = not isinstance(value, list) or all(isinstance(item, dict) for item in value)
        given["counterfactuals"] = tuple(
            _conversation(item, "counterfactual", where) for item in ([value] if is_one else value)
        )
    if "counterfactual_ids" in fields:
        value = fields["counterfactual_ids"]
        is_one = not isinstance(value, list) or not any(isinstance(item, list) for item in value)
        given["counterfactual_ids"] = tuple(
            data.token_ids(item, "counterfactual_ids", where)
            for item in ([value] if is_one else value)
        )
    if not all(all(several) for several in given.values()):
        raise DataError(f"{where}: an empty counterfactual")
    return given


def _answers(fields: dict, where: str) -> dict[str, str | tuple[int, ...]]:
    answers = {}
    for name, ids in data.ANSWERS.items():
        data.check_one_given(fields, name, ids, where)
        answers |= {name: fields.get(name, ""), ids: _ids(fields, ids, where)}
        if not isinstance(answers[name], str):
            raise DataError(f"{where}: '{name}' must be text")
    return answers


def _fields(prompt: Prompt) -> dict:
    """The prompt in jaxmed's own form, without what is empty."""
    fields = {name: value for name, value in vars(prompt).items() if value and name != "where"}
    for name in ("counterfactuals", "counterfactual_ids"):
        several = fields.pop(name, ())
        if several:
            one = several[0] if len(several) == 1 else several
            fields[name.replace("counterfactuals", "counterfactual")] = one
    return fields


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The rows of a CSV file by its header; an empty cell is None."""
    # Bytes that are no UTF-8 become half surrogates, which condemn their row and no other.
    decoded = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = csv.reader(io.StringIO(decoded, newline=""), strict=True)
    header = None
    while True:
        number = lines.line_num + 1
        try:
            cells = next(lines, None)
            if cells is None:
                return
            if header is not None and cells:
                yield number, _csv_row(header, cells, f"{path}:{number}")
            elif cells:
                header = _csv_header(cells, f"{path}:{number}")
        except csv.Error as error:
            problem = DataError(f"{path}:{number}: not CSV ({error})")
            if header is None:
                raise problem from None
            yield number, problem


def _csv_header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(set(header)) != len(header):
        raise DataError(f"{where}: the header names a column twice")
    return header


def _csv_row(header: list[str], cells: list[str], where: str) -> dict | DataError:
    if len(cells) != len(header):
        return DataError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return DataError(f"{where}: not UTF-8 text")
    row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    try:
        for name in row:
            if name.endswith("_ids") and row[name]:
                row[name] = data.parse_json(row[name].encode(), where)
    except DataError as error:
        return error
    return row


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The objects of a JSON list, by the lines that they begin at."""
    encoded = path.read_bytes()
    if not isinstance(data.parse_json(encoded, f"{path}"), list):
        raise DataError(f"{path}: expected a list of JSON objects (one a line is .jsonl)")
    content = encoded.decode("utf-8-sig")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, seen, place = 1, 0, between.match(content, content.index("[") + 1).end()
    while content[place] != "]":
        line, seen = line + content.count("\n", seen, place), place
        value, end = decoder.raw_decode(content, place)
        place = between.match(content, end).end()
        try:
            yield line, data.json_object(value, f"{path}:{line}")
        except DataError as error:
            yield line, error


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | DataError]]:
    """The rows of a parquet file, counted from 1."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file, or damaged ({error})") from None
    columns = {name: table[name] for name in table.column_names}
    for index in range(table.num_rows):
        try:
            yield index + 1, {name: column[index].as_py() for name, column in columns.items()}
        except UnicodeDecodeError:
            yield index + 1, DataError(f"{path}:{index + 1}: not UTF-8 text")


_READERS = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": data.json_lines,
    ".parquet": _parquet_rows,
}


def _check_ids_differ(prompts: list[Prompt]) -> None:
    places = {}
    for prompt in prompts:
        if prompt.id in places:
            raise DataError(
                f"{prompt.where}: id '{prompt.id}' was used before, by {places[prompt.id]}; read "
                "one of the sets under another source"
            )
        places[prompt.id] = prompt.where


def _given(prompt: Prompt) -> list[Prompt]:
    """The file's counterfactuals of a prompt, as prompts."""
    texts = [{"prompt": one, "prompt_ids": ()} for one in prompt.counterfactuals]
    ids = [{"prompt": None, "prompt_ids": one} for one in prompt.counterfactual_ids]
    return [dataclasses.replace(prompt, **one) for one in texts + ids]


def _finder(prompts, how: str, read_tokens, count: int, seed: int, on_bad):
    """A function that gives the benign counterfactuals of a prompt."""
    benign = [prompt for prompt in prompts if prompt.label == "benign"]
    if not benign:
        raise DataError(
            f"counterfactuals are to be benign prompts ('{how}'), but none of the "
            f"{len(prompts)} prompts is benign: read a set of these too"
        )

    def key(prompt: Prompt) -> tuple | None:
        """What a prompt has in common with its counterfactuals; None if it can have none."""
        if how == "length":
            return prompt.split, len(read_tokens(prompt))
        return (prompt.split, prompt.source, prompt.match) if prompt.match else None

    by_key = {}
    for prompt in benign:
        try:
            by_key.setdefault(key(prompt), []).append(prompt)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)

    def find(base: Prompt) -> list[Prompt]:
        wanted = key(base)
        candidates = by_key.get(wanted, []) if wanted else []
        return sorted(candidates, key=functools.partial(_draw, seed, base.id))[:count]

    return find


def _draw(seed: int, base_id: str, prompt: Prompt) -> bytes:
    """A random number of a prompt, which no other prompt has a part in."""
    return hashlib.sha256(json.dumps([seed, base_id, prompt.id]).encode()).digest()


_NOT_FOUND = {
    "given": "its file gives no counterfactual",
    "matched": "there is no benign prompt of the same source, match and split",
    "length": "there is no benign prompt of as many tokens in the same split",
}


def _pairs(base: Prompt, counterfactuals: list[Prompt], how: str, tokenizer, chat: bool):
    """The pairs of one base prompt."""
    if not counterfactuals:
        raise DataError(f"{base.where}: prompt '{base.id}' cannot be paired: {_NOT_FOUND[how]}")
    answers = {
        ids: _answer_tokens(base, name, ids, tokenizer) for name, ids in data.ANSWERS.items()
    }
    lender = "counterfactual" if how == "given" else "prompt"
    return [
        data.Pair(
            id=f"{base.id}/{number}",
            prompt_ids=tokens_of(base, tokenizer, chat=chat),
            counterfactual_ids=_prompt_tokens(counterfactual, lender, tokenizer, chat),
            label=base.label,
            category=base.category,
            source=base.source,
            split=base.split,
            where=base.where,
            prompt_text=data.as_text(base.prompt),
            counterfactual_text=data.as_text(counterfactual.prompt),
            is_chat=chat or isinstance(base.prompt, tuple),
            base=base.id,
            **answers,
        )
        for number, counterfactual in enumerate(counterfactuals, start=1)
    ]


def _prompt_tokens(prompt: Prompt, field: str, tokenizer, chat: bool) -> tuple[int, ...]:
    if prompt.prompt_ids:
        return prompt.prompt_ids
    return data.prompt_tokens(prompt.prompt, field, prompt.where, tokenizer, chat=chat)


def _answer_tokens(prompt: Prompt, name: str, ids_name: str, tokenizer) -> tuple[int, ...]:
    answer, ids = getattr(prompt, name), getattr(prompt, ids_name)
    return data.answer_tokens(answer, name, prompt.where, tokenizer) if answer else ids
