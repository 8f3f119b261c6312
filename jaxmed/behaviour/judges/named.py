"""Judges by name, as programs are given them."""

from collections.abc import Collection, Sequence

import models
from jaxmed.behaviour.judges import templates
from jaxmed.behaviour.judges.model import JudgeModel
from jaxmed.behaviour.judges.protocol import Judge
from jaxmed.behaviour.judges.rules import FirstTokens, RefusalPhrases
from jaxmed.behaviour.judges.templates import JUDGES, Template
from jaxmed.engine import rates
from models import checkpoint
from models.errors import InputError

# Judges that are no model of their own.
WITHOUT_MODEL = (RefusalPhrases.name, FirstTokens.name)
NAMES = (*WITHOUT_MODEL, *JUDGES)


def judge(
    name: str,
    *,
    template=None,
    model="",
    cut: bool = False,
    comply: Sequence[int] = (),
    refuse: Sequence[int] = (),
    ignore_config: Collection[str] = (),
) -> Judge:
    """The judge of that name.

    Args:
        name: "phrases", "tokens", one of `JUDGES`, or a JSON file with a template
            (`read_template`).
        template: file with the judge's text as it is published (`with_text`), for those of `JUDGES`
            that lack theirs, and no others.
        model: of a judge model, the folder or hub id of its checkpoint; by default the template's
            own hub id.
        cut: of a judge model, as `JudgeModel` takes it.
        comply, refuse: token ids, for "tokens".
        ignore_config: of a judge model, as `models.load` takes it.

    Raises:
        InputError: there is no such judge, its text is missing or not to be used, or its checkpoint
            cannot be used as it.
    """
    asked = _template(name, template, model)
    if name == RefusalPhrases.name:
        return RefusalPhrases()
    if asked is None:
        return FirstTokens(tuple(comply), tuple(refuse))
    model = model or asked.hub_id
    folder = checkpoint.resolve(model)
    decoder, tokenizer = models.load(folder, ignore_config=ignore_config)
    decoder = decoder.at_precision(rates.exact_precision(decoder))
    return JudgeModel(asked, decoder, tokenizer, checkpoint=str(model), folder=folder, cut=cut)


def _template(name: str, template, model) -> Template | None:
    """How a judge model is asked; None for a judge without one.

    Args:
        name, template, model: as in `judge`.

    Raises:
        InputError: as `judge`, save for what the checkpoint holds.
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
    if name in WITHOUT_MODEL:
        return None
    asked = JUDGES[name] if name in JUDGES else templates.read_template(name)
    asked = asked if template is None else templates.with_text(asked, template)
    asked.require_text()
    if not (model or asked.hub_id):
        raise InputError(
            f"judge '{asked.name}': give its checkpoint, a folder or hub id (docs/judges.md "
            "says which)"
        )
    return asked


def name_and_checkpoint(given: str) -> tuple[str, str]:
    """What NAME=CHECKPOINT says; "" for the judge's own checkpoint. Files of templates, and
    checkpoints, may have a = in their names.

    Raises:
        InputError: the checkpoint is empty, or of a judge that runs no model.
    """
    if given.endswith(".json"):
        return given, ""
    name, equals, folder = given.partition(".json=" if ".json=" in given else "=")
    name += equals.removesuffix("=")
    if equals and not folder:
        raise InputError(f"judge '{given}': names no checkpoint after the =")
    if equals and name in WITHOUT_MODEL:
        raise InputError(f"judge '{given}': {name} runs no model: leave ={folder} out")
    return name, folder


def template_files(given: Sequence[str], judges: Sequence[str]) -> dict[str, str]:
    """The file of each judge's text, as NAME=FILE says.

    Args:
        given: NAME=FILE of each.
        judges: the judges that are asked for, each as `name_and_checkpoint` reads it.

    Raises:
        InputError: one names no file, or a judge that is not asked for.
    """
    known = {name_and_checkpoint(judge)[0] for judge in judges}
    found = {}
    for each in given:
        name, _, file = each.partition("=")
        if not file:
            raise InputError(f"judge_template '{each}': must be NAME=FILE")
        if name not in known:
            raise InputError(f"judge_template '{each}': no judge {name} is asked for")
        found[name] = file
    return found


def check(given: Sequence[str], template_files_given: Sequence[str] = ()) -> None:
    """Raises `InputError` where `read` would, save for what checkpoints hold: none is loaded.

    Args:
        given, template_files_given: as in `read`.
    """
    texts = template_files(template_files_given, given)
    for name, model in map(name_and_checkpoint, given):
        _template(name, texts.get(name), model)


def read(
    given: Sequence[str],
    template_files_given: Sequence[str] = (),
    *,
    cut: bool = False,
    comply: Sequence[int] = (),
    refuse: Sequence[int] = (),
    ignore_config: Collection[str] = (),
) -> list[Judge]:
    """Judges by what programs are given of each: NAME, or NAME=CHECKPOINT.

    Args:
        given: of each judge.
        template_files_given: NAME=FILE, the published texts of those that lack theirs.
        cut, comply, refuse, ignore_config: as `judge` takes them.

    Raises:
        InputError: one is unknown, or its text or checkpoint cannot be used.
    """
    texts = template_files(template_files_given, given)
    found = []
    for each in given:
        name, model = name_and_checkpoint(each)
        found.append(
            judge(
                name,
                template=texts.get(name),
                model=model,
                cut=cut,
                comply=comply,
                refuse=refuse,
                ignore_config=ignore_config,
            )
        )
    return found
