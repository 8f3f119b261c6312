"""The whole method on a model with a planted answer: it is found as in any checkpoint, every method
is scored, and what was found is held while the model answers."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterable

from jaxmed.intervention.units import strongest
from jaxmed.report import certificate, mediation
from jaxmed.report import clamp as clamp_report
from jaxmed.report import respond as respond_report
from jaxmed.runs import certify, clamp, mediate, respond, sweep
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.clamp import ClampSettings
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.respond import RespondSettings
from jaxmed.runs.settings import setting
from jaxmed.store.results import Results
from jaxmed.validation import outcomes, truth
from models import organisms
from models.organisms import Organism

_CONTRAST = "unlock"
_EDITED = "edited"


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Where the demo writes, and which model it is of."""

    out: str = setting(
        help="Folder for the results; an earlier demo is replaced.", default="out/demo", path=True
    )
    organisms: str = setting(
        help="Folder that the trained model is kept in.", default="out/organisms", path=True
    )
    seed: int = setting(help="Where the answer is planted, and the model's weights.", default=0)


# The answer's first word tells whether the model complies: a judge that is never wrong.
_JUDGED = {
    "judge": ("tokens",),
    "comply_tokens": ("C",),
    "refuse_tokens": ("R",),
    "max_tokens": 8,
    "overwrite": True,
}


def run(settings: DemoSettings, say: Callable[[str], None] = sweep.tell) -> None:
    """Builds the organism, runs every granularity on it, says how each method scores, and holds
    the neurons that were found.

    Args:
        settings: what is asked.
        say: told each line.

    Raises:
        InputError: a folder cannot be used.
    """
    settings_lib.check(settings)
    folder = pathlib.Path(settings.organisms) / f"late-mlp-{settings.seed}"
    organism = organisms.build(folder, seed=settings.seed)
    asked = MediateSettings(
        model=str(organism.folder),
        pairs=str(truth.pairs_file(organism, _CONTRAST)),
        out=settings.out,
        # Detectors read the middle of the prompt: at the last token they have no effect.
        positions="prompt",
        joint_size=_planted(organism),
        overwrite=True,
        process=0,
        processes=1,
        # The organism's language is abstract; there is nothing to hide.
        show_text=True,
    )
    results = mediate.run(asked)
    _say_all(mediation.closing_lines(results), say)
    say("\nScoring every method against what was planted ...")
    scored = certify.measure(
        organism, _CONTRAST, dataclasses.replace(asked, out=f"{settings.out}/scores")
    )
    _say_all(certificate.method_lines(outcomes.table_of(scored["rows"])), say)
    _settle(settings, organism, results, say)
    _respond(settings, organism, say)
    _say_all(_where(settings, organism), say)


def _where(settings: DemoSettings, organism: Organism) -> list[str]:
    """Where that is which the other programs can be tried on."""
    return [
        "\nTo go on by yourself:",
        f"Model:   {organism.folder}",
        f"Pairs:   {truth.pairs_file(organism, _CONTRAST)} (for launch.mediate)",
        f"Prompts: {truth.prompts_file(organism)} (for launch.respond and launch.clamp)",
        f"Edited:  {pathlib.Path(settings.out) / _EDITED}, the model whose detectors write nothing",
    ]


def _planted(organism: Organism) -> int:
    """How many neurons were planted."""
    return len(organism.truth["contrasts"][_CONTRAST]["neurons"])


def _say_all(lines: Iterable[str], say: Callable[[str], None]) -> None:
    for line in lines:
        say(line)


def _settle(
    settings: DemoSettings, organism: Organism, results: Results, say: Callable[[str], None]
) -> None:
    """Holds the strongest neurons of the last layer at their refused mean, then damps those of the
    first to nothing, and exports the latter."""
    number = _planted(organism)
    units = strongest(results, "neuron", "max", number)
    layers = [unit.layer for unit in units]
    edited = pathlib.Path(settings.out) / _EDITED
    shutil.rmtree(edited, ignore_errors=True)  # of an earlier demo
    for what, layer, edit, export in (
        ("gates", max(layers), "refused", ""),
        ("detectors", min(layers), "zero", str(edited)),
    ):
        say(f"\nHolding the {what} that were found (--edit={edit}) ...")
        asked = ClampSettings(
            model=str(organism.folder),
            prompts=(str(truth.prompts_file(organism)),),
            out=f"{settings.out}/clamp-{what}",
            units=tuple(str(unit) for unit in units if unit.layer == layer),
            edit=edit,
            export=export,
            strength_doses=("0.25", "0.5", "0.75"),
            top_doses=("1", "2", "3"),
            alone=number,
            show_text=True,
            **_JUDGED,
        )
        _say_all(clamp_report.closing_lines(clamp.run(asked)), say)


def _respond(settings: DemoSettings, organism: Organism, say: Callable[[str], None]) -> None:
    """Makes pairs of the model's own answers."""
    say("\nMaking pairs of the model's own answers ...")
    asked = RespondSettings(
        model=str(organism.folder),
        prompts=(str(truth.prompts_file(organism)),),
        out=f"{settings.out}/respond",
        samples=2,
        temperature=1.0,
        safe_template="R r0",
        **_JUDGED,
    )
    _say_all(respond_report.closing_lines(respond.run(asked)), say)
