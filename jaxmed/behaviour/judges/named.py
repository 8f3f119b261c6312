"""Judges by name."""

import models
from jaxmed.behaviour.judges import templates
from jaxmed.behaviour.judges.model import JudgeModel
from jaxmed.behaviour.judges.protocol import Judge
from jaxmed.behaviour.judges.rules import FirstTokens, RefusalPhrases
from jaxmed.behaviour.judges.templates import JUDGES, require_text
from models import checkpoint as checkpoints
from models.errors import InputError

NAMES = (RefusalPhrases.name, FirstTokens.name, *JUDGES)


def named(name: str, *, template=None, **options) -> Judge:
    """The judge of that name.

    Args:
        name: "phrases", "tokens", one of `JUDGES`, or a JSON file with a template
            (`read_template`).
        template: file with the judge's text as it is published (`with_text`), for those of `JUDGES`
            that lack theirs, and no others.
        options: for "tokens" `comply` and `refuse`, token ids. For a judge model `model`, the
            folder or hub id of its checkpoint (by default the template's own hub id), and what
            `JudgeModel` takes.

    Raises:
        InputError: there is no such judge, its text is missing or not to be used, or its checkpoint
            cannot be used as it.
    """
    if name not in NAMES and not name.endswith(".json"):
        raise InputError(
            f"judge '{name}': not one of {', '.join(NAMES)}, and no .json file with a template"
        )
    lacking = [judge.name for judge in JUDGES.values() if judge.lacks_text]
    if template is not None and name not in lacking:
        raise InputError(
            f"judge '{name}': takes no text from a file, as {', '.join(lacking)} do: leave "
            f"{template} out"
        )
    if name == RefusalPhrases.name:
        return RefusalPhrases(**options)
    if name == FirstTokens.name:
        return FirstTokens(**options)
    asked = JUDGES[name] if name in JUDGES else templates.read_template(name)
    asked = asked if template is None else templates.with_text(asked, template)
    require_text(asked)
    checkpoint = options.pop("model", None) or asked.hub_id
    if not checkpoint:
        raise InputError(
            f"judge '{asked.name}': give its checkpoint, a folder or hub id (docs/judges.md "
            "says which)"
        )
    folder = checkpoints.resolve(checkpoint)
    decoder, tokenizer = models.load(folder)
    return JudgeModel(
        asked, decoder, tokenizer, checkpoint=str(checkpoint), folder=folder, **options
    )
