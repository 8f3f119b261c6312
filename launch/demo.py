"""Trains a model with a planted answer, finds it as in any checkpoint, scores every method, and
holds what was found while the model answers.

python -m launch.demo
"""

import dataclasses
import pathlib
import shutil

from absl import flags

from jaxmed.intervention import units as units_lib
from jaxmed.report import certificate, mediation
from jaxmed.report import clamp as clamp_lib
from jaxmed.report import respond as respond_lib
from jaxmed.runs import certify, clamp, mediate, respond
from jaxmed.store.results import Results
from jaxmed.validation import outcomes, truth
from launch import program
from models import organisms
from models.organisms import Organism

_OUT = flags.DEFINE_string(
    "out", "out/demo", "Folder for the results; an earlier demo is replaced."
)
_KEPT = flags.DEFINE_string(
    "organisms", "out/organisms", "Folder that the trained model is kept in."
)
_SEED = flags.DEFINE_integer("seed", 0, "Where the answer is planted, and the model's weights.")

_CONTRAST = "unlock"


# The answer's first word tells whether the model complies: a judge that is never wrong.
_JUDGED = {
    "judge": ("tokens",),
    "comply_tokens": ("C",),
    "refuse_tokens": ("R",),
    "max_tokens": 8,
    "overwrite": True,
}


def main() -> None:
    """Builds the organism, runs every granularity on it, prints how each method scores, and holds
    the neurons that were found."""
    organism = organisms.build(
        pathlib.Path(_KEPT.value) / f"late-mlp-{_SEED.value}", seed=_SEED.value
    )
    settings = mediate.Settings(
        model=str(organism.folder),
        pairs=str(truth.pairs_file(organism, _CONTRAST)),
        out=_OUT.value,
        # Detectors read the middle of the prompt: at the last token they have no effect.
        positions="prompt",
        joint_size=len(organism.truth["contrasts"][_CONTRAST]["neurons"]),
        overwrite=True,
        # The organism's language is abstract; there is nothing to hide.
        show_text=True,
    )
    results = mediate.run(settings)
    print("\n".join(mediation.closing_lines(results)))
    print("\nScoring every method against what was planted ...", flush=True)
    scored = certify.measure(
        organism, _CONTRAST, dataclasses.replace(settings, out=f"{_OUT.value}/scores")
    )
    print("\n".join(certificate.method_lines(outcomes.table_of(scored["rows"]))))
    _settle(organism, results)
    _respond(organism)


def _settle(organism: Organism, results: Results) -> None:
    """Holds the strongest neurons of the last layer at their refused mean, then damps those of the
    first to nothing, and exports the latter."""
    number = len(organism.truth["contrasts"][_CONTRAST]["neurons"])
    units = units_lib.strongest(results, "neuron", "max", number)
    layers = [unit.layer for unit in units]
    edited = pathlib.Path(_OUT.value) / "edited"
    shutil.rmtree(edited, ignore_errors=True)  # of an earlier demo
    for what, layer, edit, export in (
        ("gates", max(layers), "refused", ""),
        ("detectors", min(layers), "zero", str(edited)),
    ):
        print(f"\nHolding the {what} that were found (--edit={edit}) ...", flush=True)
        settings = clamp.Settings(
            model=str(organism.folder),
            prompts=(str(truth.prompts_file(organism)),),
            out=f"{_OUT.value}/clamp-{what}",
            units=tuple(str(unit) for unit in units if unit.layer == layer),
            edit=edit,
            export=export,
            strength_doses=("0.25", "0.5", "0.75"),
            top_doses=("1", "2", "3"),
            alone=number,
            show_text=True,
            **_JUDGED,
        )
        print("\n".join(clamp_lib.closing_lines(clamp.run(settings))))


def _respond(organism: Organism) -> None:
    """Makes pairs of the model's own answers."""
    print("\nMaking pairs of the model's own answers ...", flush=True)
    settings = respond.Settings(
        model=str(organism.folder),
        prompts=(str(truth.prompts_file(organism)),),
        out=f"{_OUT.value}/respond",
        samples=2,
        temperature=1.0,
        safe_template="R r0",
        **_JUDGED,
    )
    print("\n".join(respond_lib.closing_lines(respond.run(settings))))


if __name__ == "__main__":
    program.start(main)
