"""The effects of every layer, module, head, token position and neuron of a checkpoint.

python -m launch.mediate --model=DIR_OR_HUB_ID --pairs=FILE --out=DIR
"""

from jaxmed.report import mediation
from jaxmed.runs import mediate
from jaxmed.runs.mediate import MediateSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(
        flags.of(MediateSettings),
        lambda settings: mediation.closing_lines(mediate.run(settings)),
    )


if __name__ == "__main__":
    main()
