"""The effects of every layer, module, head, token position and neuron of a checkpoint.

python -m launch.mediate --model=DIR_OR_HUB_ID --pairs=FILE --out=DIR
"""

from collections.abc import Iterator

from jaxmed.report import mediation
from jaxmed.runs import mediate, processes, sweep
from jaxmed.runs.mediate import MediateSettings
from launch import flags, program


def main() -> None:
    """Runs what the flags ask for, or tells what it would take."""
    program.start(flags.of(MediateSettings), _run)


def _run(settings: MediateSettings) -> Iterator[str]:
    if settings.dry_run:
        yield from mediate.dry_run(settings)
        return
    results = mediate.run(settings)
    if processes.this(settings.process, settings.processes).is_first:
        yield from mediation.closing_lines(results)
    sweep.check_failed(results)


if __name__ == "__main__":
    main()
