"""Tables of speed, and of numerical error."""

from jaxmed.validation.benchmark import Figures, GenerationFigures
from jaxmed.validation.numerical_error import NumericalError


def table(figures: Figures) -> list[str]:
    """The figures for people."""
    rows = [
        ("model", f"{figures.preset}, {figures.layers} layers, {figures.dtype} products"),
        ("device", figures.device),
        ("neurons", f"{figures.neurons:,}, each patched alone, in batches of {figures.batch:,}"),
        ("compilation", f"{figures.compile_seconds:.1f} s"),
        ("one estimand of a pair", f"{figures.seconds:.3g} s (median)"),
        ("neurons per second", f"{figures.neurons_per_second:,.0f}"),
        ("operations needed", f"{figures.flops:.3g}"),
        ("this machine's products", f"{figures.matmul_flops_per_second:.3g} operations a second"),
        ("fraction reached", f"{figures.matmul_fraction:.3f}"),
        ("peak memory", f"{figures.peak_memory_bytes / 2**30:.2f} GiB"),
    ]
    if figures.speedup_screen is not None:
        rows.append(
            (
                "screened, both estimands",
                f"{figures.screen_seconds:.3g} s: x {figures.speedup_screen:.1f}",
            )
        )
    rows += [
        (
            baseline.what,
            f"{baseline.neurons_per_second:,.1f} a second: x {baseline.speedup:.2f}",
        )
        for baseline in figures.baselines.values()
    ]
    return _aligned(rows)


def generation_table(figures: GenerationFigures) -> list[str]:
    """The figures for people."""
    rows = [
        ("model", f"{figures.preset}, {figures.layers} layers, {figures.dtype}"),
        ("device", figures.device),
        (
            "generated",
            f"{figures.new_tokens} tokens to each of {figures.batch} prompts of "
            f"{figures.prompt_tokens}, greedily",
        ),
        ("tokens per second", f"{figures.tokens_per_second:,.1f} (median)"),
        (
            "with a hold on every neuron",
            f"{figures.held_tokens_per_second:,.1f}: {figures.hold_cost:+.1%} of the time",
        ),
        ("peak memory", f"{figures.peak_memory_bytes / 2**30:.2f} GiB"),
    ]
    rows += [
        (
            baseline.what,
            f"{baseline.tokens_per_second:,.1f} a second: x {baseline.speedup:.2f}, with the hold "
            f"x {baseline.held_speedup:.2f}",
        )
        for _, baseline in sorted(figures.baselines.items())
    ]
    return _aligned(rows)


def numerical_error_table(rows: list[NumericalError]) -> list[str]:
    """The rows for people."""
    heading = f"{'model':<10}{'effects by':<20}{'products':<10}{'':<6}{'Frobenius':>10}"
    lines = [f"{heading}{'median':>10}{'Spearman':>10}"]
    for row in rows:
        lines.append(
            f"{row.model:<10}{row.method:<20}{row.dtype:<10}{row.estimand:<6}"
            f"{row.frobenius:>10.1e}{row.median:>10.1e}{row.spearman:>10.5f}"
        )
    return lines


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]
