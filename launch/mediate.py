"""The effects of every layer, module, head, token position and neuron of a checkpoint.

python -m launch.mediate --model=DIR_OR_HUB_ID --pairs=FILE --out=DIR
"""

from collections.abc import Iterable

from jaxmed.report import mediation
from jaxmed.runs import mediate
from jaxmed.runs.mediate import MediateSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for, or tells what it would take."""

    def run(settings: MediateSettings) -> Iterable[str]:
        if settings.dry_run:
            return mediate.dry_run(settings)
        return mediation.closing_lines(mediate.run(settings))

    program.start(flags.of(MediateSettings), run)


if __name__ == "__main__":
    main()
