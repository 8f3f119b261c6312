"""Writes the report of a results folder again.

python -m launch.report --results=DIR
"""

from jaxmed.report import mediation
from jaxmed.runs import report
from jaxmed.runs.report import ReportSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(
        flags.of(ReportSettings),
        lambda settings: mediation.closing_lines(report.run(settings)),
        computes=False,
    )


if __name__ == "__main__":
    main()
