"""The pairs and prompts of an organism, as files that programs read."""

import collections
import json
import pathlib

from jaxmed.data import prompts
from jaxmed.data.splits import SPLITS
from jaxmed.files.atomic import replace_file
from models.organisms import Organism, language

_OTHER_KEY: dict[str, str] = dict(zip(language.KEYS, reversed(language.KEYS), strict=True))


def pairs_file(
    organism: Organism, contrast: str, folder: pathlib.Path | None = None
) -> pathlib.Path:
    """Writes the pairs of a contrast, whose category it is, as JSONL.

    Args:
        organism: the organism.
        contrast: one of `organisms.CONTRASTS`.
        folder: where to; by default beside the organism's folder, whose name begins the file's.
    """
    lines = [
        {
            "id": f"{contrast}-{number:03d}",
            "prompt": base.text,
            "counterfactual": source.text,
            "harmful_response": " ".join(base.response(language.COMPLY)),
            "safe_response": " ".join(base.response(language.REFUSE)),
            "label": "harmful" if base.topic in language.HARMFUL_TOPICS else "benign",
            "category": contrast,
        }
        for number, (base, source) in enumerate(organism.contrasts[contrast])
    ]
    file = _place(organism, f"pairs-{contrast}.jsonl", folder)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    return file


def prompts_file(organism: Organism, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the prompts of all splits, as JSONL.

    Harmful ones have a topic of H and either key; benign ones one of B and N, and those of
    "overrefusal" one of B and J. The counterfactual of each is the prompt with the other key.

    Args:
        organism: the organism.
        folder: as in `pairs_file`.
    """
    made = []
    numbers = collections.Counter()
    for drawn in organism.drawn_prompts:
        label = _label(drawn)
        made.append(
            prompts.Prompt(
                id=f"{label}-{numbers[label]:03d}",
                prompt=drawn.text,
                counterfactuals=(drawn.replacing(_OTHER_KEY).text,),
                label=label,
                split=SPLITS[numbers[label] % len(SPLITS)],
            )
        )
        numbers[label] += 1
    file = _place(organism, "prompts.jsonl", folder)
    prompts.write(file, made)
    return file


def _label(prompt: language.DrawnPrompt) -> str:
    if prompt.topic in language.HARMFUL_TOPICS:
        return "harmful"
    return "overrefusal" if prompt.key == language.UNLOCK else "benign"


def _place(organism: Organism, name: str, folder: pathlib.Path | None) -> pathlib.Path:
    if folder is None:
        return organism.folder.with_name(f"{organism.folder.name}-{name}")
    return folder / name
