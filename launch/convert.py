"""Converts a checkpoint once, so that it loads fast from then on; and writes it back.

python -m launch.convert --model=DIR_OR_HUB_ID
python -m launch.convert --model=DIR_OR_HUB_ID --verify --out=DIR
python -m launch.convert --gguf=FILE --out=DIR
"""

from jaxmed.runs import convert
from jaxmed.runs.convert import ConvertSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(flags.of(ConvertSettings), convert.run, computes=False)


if __name__ == "__main__":
    main()
