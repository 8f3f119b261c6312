"""Writes the report of a results folder again.

python -m launch.report --results=DIR
"""

from absl import flags

from jaxmed.report import mediation
from jaxmed.runs import mediate
from launch import program

_RESULTS = flags.DEFINE_string("results", None, "Folder that a run has written.", required=True)
_SHOW_TEXT = flags.DEFINE_bool(
    "show_text", False, "Show prompts, escaped; the run's file of pairs must still be there."
)


def main() -> None:
    """Writes summary, figures and report.html."""
    results = mediate.report_again(_RESULTS.value, _SHOW_TEXT.value)
    print("\n".join(mediation.closing_lines(results)))


if __name__ == "__main__":
    program.start(main)
