"""Runs every method on models with a planted answer, and scores what it finds.

python -m launch.certify --seeds=5 --out=out/certify
"""

from absl import flags

from jaxmed.report import certificate
from jaxmed.runs import certify, mediate
from jaxmed.runs.mediate import Settings
from launch import program, settings
from models import organisms
from models.errors import InputError

_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "How many of each organism; their seeds count from 0.", lower_bound=1
)
_ORGANISM = flags.DEFINE_list(
    "organism", list(organisms.RECIPES), f"Which: any of {', '.join(organisms.RECIPES)}."
)
_KEPT = flags.DEFINE_string(
    "organisms", "out/organisms", "Folder that the trained models are kept in; half a minute each."
)
_OUT = flags.DEFINE_string(
    "out",
    "out/certify",
    "Folder for the results; what was scored there is not run again. Tables and figures hold the "
    "organisms and seeds that the last command asked for.",
)
# How the methods are run. Detectors read the middle of the prompt: at the last token they have no
# effect. What is found should be no larger than what was planted, up to seven neurons.
settings.define(
    mediate,
    *("positions", "align"),
    *("screen", "screen_audit", "screen_steps", "joint_size", "joint_share", "joint_pairs"),
    *("dtype", "matmul_precision", "memory_gb", "overwrite"),
    positions="prompt",
    joint_size=14,
)


def main() -> None:
    """Certifies, prints the tables, and says where the files are."""
    if unknown := sorted(set(_ORGANISM.value) - set(organisms.RECIPES)):
        raise InputError(
            f"--organism={','.join(unknown)}: not one of {', '.join(organisms.RECIPES)}"
        )
    found = certify.certify(
        Settings(model="", pairs="", out=_OUT.value, **settings.given()),
        names=_ORGANISM.value,
        seeds=range(_SEEDS.value),
        kept=_KEPT.value,
    )
    print("\n".join(certificate.lines(found)))


if __name__ == "__main__":
    program.start(main)
