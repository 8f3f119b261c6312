r"""Holds units still while a model answers: does harm fall, and does the rest stay?

python -m launch.clamp --model=DIR_OR_HUB_ID --results=DIR --top=K --prompts=FILE --judge=NAME \
    --out=DIR
"""

from jaxmed.report import clamp as report
from jaxmed.runs import clamp
from jaxmed.runs.clamp import ClampSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(
        flags.of(ClampSettings), lambda settings: report.closing_lines(clamp.run(settings))
    )


if __name__ == "__main__":
    main()
