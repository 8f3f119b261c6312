"""A model answers prompts, a judge judges the answers, and pairs for launch.mediate are made.

python -m launch.respond --model=DIR_OR_HUB_ID --prompts=FILE --judge=NAME --out=DIR
"""

from jaxmed.report import respond as report
from jaxmed.runs import respond
from jaxmed.runs.respond import RespondSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(
        flags.of(RespondSettings), lambda settings: report.closing_lines(respond.run(settings))
    )


if __name__ == "__main__":
    main()
