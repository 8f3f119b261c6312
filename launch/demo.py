"""Trains a model with a planted answer, finds the answer as in any checkpoint, and scores it.

python -m launch.demo
"""

from absl import flags

from jaxmed import report, sweep
from launch import program
from models import organisms

_OUT = flags.DEFINE_string(
    "out", "out/demo", "Folder for the results; an earlier demo is replaced."
)
_ORGANISM = flags.DEFINE_string(
    "organism", "out/organisms/late-mlp", "Folder that the trained model is kept in."
)
_SEED = flags.DEFINE_integer("seed", 0, "Where the answer is planted, and the model's weights.")

_CONTRAST = "unlock"


def main() -> None:
    """Builds the organism, runs every granularity on it, and prints the score."""
    organism = organisms.build(_ORGANISM.value, seed=_SEED.value)
    results = sweep.run(
        sweep.Settings(
            model=str(organism.folder),
            pairs=str(organism.pairs(_CONTRAST)),
            out=_OUT.value,
            # Detectors read the middle of the prompt: at the last token they have no effect.
            positions="prompt",
            joint_size=len(organism.truth["contrasts"][_CONTRAST]["neurons"]),
            overwrite=True,
            # The organism's language is abstract; there is nothing to hide.
            show_text=True,
        )
    )
    print("\n".join(report.closing_lines(results)))
    print("\n".join(report.score_lines(results)))


if __name__ == "__main__":
    program.start(main)
