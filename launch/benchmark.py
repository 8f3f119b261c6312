"""How fast the engine is on this machine, against its matrix products and against other ways.

python -m launch.benchmark --preset=12x768 --against=hooks,prefix --json=FILE
python -m launch.benchmark --lists --preset=12x768
python -m launch.benchmark --generate --against=transformers
"""

from jaxmed.runs import benchmark
from jaxmed.runs.benchmark import BenchmarkSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for."""
    program.start(flags.of(BenchmarkSettings), benchmark.run)


if __name__ == "__main__":
    main()
