"""A model answers prompts, a judge judges the answers, and pairs for launch.mediate are made.

python -m launch.respond --model=DIR_OR_HUB_ID --prompts=FILE --judge=NAME --out=DIR
"""

import dataclasses

from jaxmed.report import respond as respond_lib
from jaxmed.runs import respond
from jaxmed.runs.respond import Settings
from launch import program, settings

settings.define(
    respond,
    *(field.name for field in dataclasses.fields(Settings) if field.name != "show_text"),
    samples=8,
    temperature=1.0,
)


def main() -> None:
    """Runs what the flags ask for."""
    found = respond.run(Settings(**settings.given()))
    print("\n".join(respond_lib.closing_lines(found)))


if __name__ == "__main__":
    program.start(main)
