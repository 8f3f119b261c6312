"""How fast a pair's short lists are: layers, modules, heads and tokens, which are few, and so are
bound by other things than neurons are."""

import dataclasses
import pathlib
from collections.abc import Callable

from jaxmed.engine import blocks, cost, memory, rates, scan
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.positions import Positions
from jaxmed.question.question import Question
from jaxmed.validation import kernels, presets, timing
from jaxmed.validation.kernels import Profile

# Tokens are edited one by one, whatever the positions: they are listed once.
LISTS = (
    *((name, Positions.LAST) for name in ("layer", "module", "head", "token")),
    *((name, Positions.PROMPT) for name in ("layer", "module", "head")),
)


@dataclasses.dataclass(frozen=True)
class ListSpeed:
    """How fast all units of one granularity are patched, alone, by both estimands.

    Attributes:
        granularity, positions: what is patched.
        first_seconds: of the first run, compilation of what no list before it had included.
        seconds: of a pair, both estimands and captures; median over the runs after the first.
        operations: floating-point operations that the algorithm needs for them.
        operations_done: those that the scan makes, with what it pads.
        operations_per_second: operations / seconds.
        profile: where the time of one more run goes; None where it was not asked for.
    """

    granularity: str
    positions: str
    first_seconds: float
    seconds: float
    operations: float
    operations_done: float
    operations_per_second: float
    profile: Profile | None = None


@dataclasses.dataclass(frozen=True)
class ListFigures:
    """The lists of one model in one precision, in the order in which they were run.

    Attributes:
        preset, device, dtype, precision, layers, peak_memory_bytes: as in `benchmark.Figures`.
        tokens: of both prompts.
        lists: of each granularity and positions.
    """

    preset: str
    device: str
    dtype: str
    precision: str
    layers: int
    tokens: int
    lists: tuple[ListSpeed, ...]
    peak_memory_bytes: int


def measure(
    preset: str,
    *,
    say: Callable[[str], None],
    dtype: str = "",
    precision: str = rates.AUTO,
    layers: int = 0,
    rounds: int = 5,
    memory_gb: float | None = None,
    profile: pathlib.Path | None = None,
) -> ListFigures:
    """Runs every list of `LISTS`. Arguments as of `benchmark.measure`; a folder for profiles gets
    one for each list."""
    config = presets.shape(preset, layers=layers, dtype=dtype)
    decoder = presets.decoder_at(config, precision, say)
    pair = presets.random_pair(config, presets.PRESETS[preset].tokens)
    left = memory.free(memory_gb)
    found = []
    for granularity, positions in LISTS:
        question = Question(LogitDifference(), positions)

        def run(question=question, granularity=granularity) -> None:
            scan.scan_pair(decoder, pair, question, [granularity], memory=left)

        made = scan.Scan(decoder, [pair], question, chosen=[{}]).blocks([granularity], left)
        first, median = timing.first_and_median(run, rounds)
        operations = cost.operations(config, pair, question, [granularity])
        done = blocks.operations_done(config, [pair], question, made, chosen=[{}])
        found.append(
            ListSpeed(
                granularity=granularity,
                positions=positions,
                first_seconds=first,
                seconds=median,
                operations=operations,
                operations_done=done,
                operations_per_second=operations / median,
                profile=kernels.profiled(
                    f"the {granularity} list at {positions}",
                    run,
                    profile / f"{granularity}-{positions}",
                )
                if profile
                else None,
            )
        )
        say(f"{granularity}s at {positions}: {median:.3g} s a pair, the first run {first:.3g} s")
    return ListFigures(
        preset=preset,
        device=timing.device(),
        dtype=config.dtype,
        precision=decoder.products.precision,
        layers=config.num_layers,
        tokens=len(pair.prompt_ids),
        lists=tuple(found),
        peak_memory_bytes=timing.peak_memory(),
    )
