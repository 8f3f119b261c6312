"""Holds units still while a model answers: does harm fall, and does the rest stay?

python -m launch.clamp --model=DIR_OR_HUB_ID --results=DIR --top=K --prompts=FILE --judge=NAME \\
    --out=DIR
"""

import dataclasses

from jaxmed.report import clamp as clamp_lib
from jaxmed.runs import clamp
from jaxmed.runs.clamp import Settings
from launch import program, settings

settings.define(clamp, *(field.name for field in dataclasses.fields(Settings)))


def main() -> None:
    """Runs what the flags ask for."""
    found = clamp.run(Settings(**settings.given()))
    print("\n".join(clamp_lib.closing_lines(found)))


if __name__ == "__main__":
    program.start(main)
