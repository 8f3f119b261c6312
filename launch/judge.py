"""Judges responses in a file; says how the judge agrees with the labels there.

python -m launch.judge --judge=NAME --responses=FILE.jsonl --out=DIR
"""

from jaxmed.report import judge as report
from jaxmed.runs import judge
from jaxmed.runs.judge import JudgeSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(
        flags.of(JudgeSettings), lambda settings: report.closing_lines(judge.run(settings))
    )


if __name__ == "__main__":
    main()
