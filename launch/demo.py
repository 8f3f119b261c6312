"""Trains a model with a planted answer, finds it as in any checkpoint, scores every method, and
holds what was found while the model answers.

python -m launch.demo
"""

from jaxmed.runs import demo
from jaxmed.runs.demo import DemoSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(flags.of(DemoSettings), demo.run)


if __name__ == "__main__":
    main()
