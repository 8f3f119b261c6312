"""Published sets of prompts: how each is recognised by its columns, and read."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping

from jaxmed.files.reading import DataError

LABELS = ("harmful", "benign", "creative", "overrefusal")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """How a published set of prompts is recognised and read.

    Attributes:
        name: the source of its prompts.
        columns: those by which it is recognised; all must be there, in any order.
        fields: where each field of jaxmed's own form is found: a column, or a function of the row
            that gives None for a field that is not there.
        parts: the columns, of those that hold a part of what is asked (`check_whole`), that its
            prompts are made of.
        label: of all its prompts; empty where a field or the file's name says it.
        default_label: of all its prompts, unless one is given for the file.
        label_by_file: words in the names of its files that tell the label.
        only: whether it has no other columns than those, and one of these words in its file's name:
            for columns that are too few to tell it from jaxmed's own form.
    """

    name: str
    columns: tuple[str, ...]
    fields: Mapping[str, str | Callable[[dict], object]]
    parts: tuple[str, ...] = ()
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


def after_context(context: str, behavior: str) -> str:
    """A behaviour behind its context, as HarmBench's own attacks put it."""
    return f"{context}\n\n---\n\n{behavior}"


def _behavior_after_context(row: dict):
    context, behavior = row.get("ContextString"), row.get("Behavior")
    return after_context(context, behavior) if context and behavior else behavior


def _kind_of_behavior(row: dict):
    """What a HarmBench behaviour is about, and whether it is standard, contextual or copyright."""
    category, functional = row.get("SemanticCategory"), row.get("FunctionalCategory")
    return f"{category} ({functional})" if category and functional else category or functional


def _with(column: str) -> Callable[[dict], object]:
    """A function of a row: its instruction, and what it is about, which is in that column."""

    def with_about(row: dict):
        instruction, about = row.get("instruction"), row.get(column)
        return f"{instruction}\n\n{about}" if about and instruction else instruction

    return with_about


def _index_in_jailbreakbench(row: dict):
    """The index, whose column some of its files do not name."""
    return row.get("Index", row.get(""))


def _label_of_type(row: dict):
    """XSTest's safe prompts only look harmful; those that contrast with them are."""
    if not isinstance(row.get("type"), str):
        return None
    return "harmful" if row["type"].startswith("contrast_") else "overrefusal"


def _number_in_xstest(row: dict):
    return row.get("id", row.get("id_v2"))


def _contrast_in_xstest(row: dict):
    """The number of the safe prompt that a contrast shares its words with: 25 before its own."""
    number = re.search(r"[0-9]{1,9}$", str(_number_in_xstest(row)))
    if number is None or not isinstance(row.get("type"), str):
        return None
    return int(number[0]) - (25 if row["type"].startswith("contrast_") else 0)


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
        {"id": "BehaviorID", "prompt": _behavior_after_context, "category": _kind_of_behavior},
        parts=("ContextString",),
        label="harmful",
    ),
    PromptSet(  # Chao et al. 2024; JailbreakBench/JBB-Behaviors, harmful- and benign-behaviors.csv
        "jailbreakbench",
        ("Goal", "Target", "Behavior", "Category", "Source"),
        {
            "id": _index_in_jailbreakbench,
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
            "match": _contrast_in_xstest,
        },
    ),
    PromptSet(  # Cui et al. 2024; bench-llm/or-bench: or-bench-80k, -hard-1k, -toxic
        "or-bench",
        ("prompt", "category"),
        {"prompt": "prompt", "category": "category"},
        label_by_file={"80k": "overrefusal", "hard": "overrefusal", "toxic": "harmful"},
        only=True,
    ),
    PromptSet(  # Conover et al. 2023; databricks/databricks-dolly-15k
        "dolly",
        ("instruction", "context", "response", "category"),
        {"prompt": _with("context"), "category": "category"},
        parts=("context",),
        default_label="benign",
    ),
    # Taori et al. 2023; tatsu-lab/stanford_alpaca, alpaca_data.json. The harmful and the harmless
    # splits of Arditi et al. 2024 (refusal_direction, dataset/splits) look alike.
    PromptSet(
        "alpaca",
        ("instruction",),
        {"prompt": _with("input"), "category": "category"},
        parts=("input",),
        default_label="benign",
    ),
)
# Names of columns that hold a part of what is asked, in small letters.
_PARTS = (
    "context",
    "contextstring",
    "context_string",
    "input",
    "system",
    "system_prompt",
    "history",
    "conversation",
    "conversations",
    "messages",
    "image",
    "imagefilename",
)
_SHOWN = 30  # characters of a column's name, in an error


def check_whole(row: Mapping, read: tuple[str, ...], where: str) -> None:
    """Checks that nothing of what is asked would be left out in silence.

    Args:
        row: all columns of it; what is empty is as good as absent.
        read: columns that its prompt is made of.
        where: file and line, for messages.

    Raises:
        DataError: it has something in a column that is named as a part of what is asked.
    """
    for name, value in row.items():
        if value and name.lower() in _PARTS and name not in read:
            raise DataError(
                f"{where}: has '{name}', a part of what is asked that would be left out: put it "
                "into the prompt's text, or among its messages; or take the column away"
            )


def recognised(
    path: pathlib.Path, columns: list[str], labels: list, label: str | None
) -> PromptSet | None:
    """The set that a file is of; None for jaxmed's own form.

    Args:
        path: the file.
        columns: of its rows.
        labels: what its rows have as label.
        label: given for all of them.

    Raises:
        DataError: they are of no known set, or nothing says the label.
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
        f"{', '.join(LABELS)} for the whole file (label=LABEL, or LABEL=FILE for a program), or "
        "in a column 'label'"
    ) + "".join(
        f"; files of {known.name} have {' or '.join(known.label_by_file)} in their names"
        for known in alike
    )


def label_by_file(path: pathlib.Path, known: PromptSet, asked: str | None) -> tuple[str, str]:
    """The label that is asked for, or that the file's name tells; and the word that tells it, or
    the label where the name does not.

    Raises:
        DataError: neither tells it.
    """
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


def translated(row: dict, known: PromptSet, label: str | None) -> dict:
    """The row of a published set in jaxmed's own form."""
    fields = {"source": known.name, "label": known.label or label or known.default_label or None}
    for name, place in known.fields.items():
        fields[name] = place(row) if callable(place) else row.get(place)
    if fields["label"] != "harmful":
        fields.pop("harmful_response", None)  # JailbreakBench's benign prompts have targets too
    return {name: value for name, value in fields.items() if value is not None}
