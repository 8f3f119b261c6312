"""The effects of every layer, module, head, token position and neuron of a checkpoint.

python -m launch.mediate --model=DIR_OR_HUB_ID --pairs=FILE --out=DIR
"""

import dataclasses

from jaxmed.report import mediation
from jaxmed.runs import mediate
from jaxmed.runs.mediate import Settings
from launch import program, settings

settings.define(mediate, *(field.name for field in dataclasses.fields(Settings)))


def main() -> None:
    """Runs what the flags ask for."""
    results = mediate.run(Settings(**settings.given()))
    print("\n".join(mediation.closing_lines(results)))


if __name__ == "__main__":
    program.start(main)
