"""Tables of speed and of numerical error, on fabricated figures."""

import dataclasses

from jaxmed.report import benchmark
from jaxmed.validation import chips
from jaxmed.validation.benchmark import (
    BaselineGeneration,
    BaselineSpeed,
    Figures,
    GenerationFigures,
)
from jaxmed.validation.chips import CompiledProgram, Half
from jaxmed.validation.compiled import Exchange
from jaxmed.validation.kernels import Kernel, Profile, Share
from jaxmed.validation.lists import ListFigures, ListSpeed
from jaxmed.validation.numerical_error import NumericalError
from tests.jaxmed.report.told import check_golden

FIGURES = Figures(
    preset="small",
    device="1 x cpu",
    dtype="bfloat16",
    precision="split3",
    layers=3,
    neurons=12345,
    batch=1077,
    compile_seconds=3.21,
    seconds=12.345,
    neurons_per_second=1999.9,
    flops=1.23e12,
    product_flops=1e12,
    matmul_flops_per_second=3e11,
    matmul_fraction=0.61,
    peak_memory_bytes=2**31,
    error=7.9e-7,
)
GENERATION = GenerationFigures(
    preset="small",
    device="1 x cpu",
    dtype="float32",
    precision="split3",
    layers=3,
    batch=8,
    prompt_tokens=128,
    new_tokens=64,
    tokens_per_second=1234.5,
    held_tokens_per_second=1200.4,
    hold_cost=0.031,
    peak_memory_bytes=2**31,
)


COMPILED = chips.Figures(
    topology="v5e:2x2",
    kind="TPU v5 lite",
    mesh="1x1",
    model="small",
    layers=3,
    precision="bfloat16",
    tokens=64,
    batches=8,
    rows=2048,
    halves=(Half("attention", 1378567, 332288), Half("MLP", 2196461, 1630740)),
    layer_cycles=1255041,
    chunk_cycles=3853211,
    enter_cycles=3230273,
    read_cycles=443900,
    fraction=0.549,
    cycles_per_neuron=14316.3,
    passes=13,
    memory_bytes=5 * 2**29,
    programs=(
        CompiledProgram("carry", "8 x 2048 rows, 1 of 64 positions", 17.36, 12345678, 2**31, 2**28),
        CompiledProgram("decode", "plain", 1.2, error="RESOURCE_EXHAUSTED: too large"),
    ),
)


def timed(what, tokens_per_second):
    return BaselineGeneration(what, tokens_per_second, speedup=81.2, held_speedup=70.1)


def test_speed():
    compared = dataclasses.replace(
        FIGURES,
        baselines={"hooks": BaselineSpeed("transformers with hooks", 12.34, 81.2, error=4e-5)},
        screen_seconds=1.23,
        speedup_screen=9.87,
    )
    lines = benchmark.table(FIGURES)
    assert len(lines) == 11 and len({line.index("  ") for line in lines}) > 1
    assert not any("screened" in line or "hooks" in line for line in lines)
    check_golden("speed", [*lines, "", *benchmark.table(compared)])


PROFILE = Profile(
    what="both estimands of a pair",
    device="/device:GPU:0",
    seconds=0.5,
    busy_seconds=0.4,
    idle=0.2,
    kernels=(
        Kernel("carry", "attend/multiplied", "dot_general", "sm90_gemm" * 20, 1234, 0.3),
        Kernel("", "", "", "MemcpyD2H", 2, 0.1),
    ),
    scopes=(Share("carry attend/multiplied", 1234, 0.3), Share("", 2, 0.1)),
    waits=(Share("enter", 7, 0.1),),
)


def test_where_the_time_goes():
    lines = benchmark.table(dataclasses.replace(FIGURES, profile=PROFILE))
    whole = benchmark.table(FIGURES)
    assert lines[: len(whole)] == whole
    check_golden("kernels", lines[len(whole) :])


def test_speed_of_generation():
    baselines = {"b": timed("transformers' generate", 12.34), "a": timed("another", 1.0)}
    compared = dataclasses.replace(GENERATION, baselines=baselines)
    lines = benchmark.generation_table(compared)
    assert [line.partition("  ")[0] for line in lines[-2:]] == ["another", "transformers' generate"]
    check_golden("generation_speed", lines)


def test_speed_of_lists():
    figures = ListFigures(
        preset="small",
        device="1 x cpu",
        dtype="float32",
        precision="split3",
        layers=3,
        tokens=64,
        lists=(
            ListSpeed("layer", "last", 12.34, 0.01234, 1.234e9, 2e9, 1e11),
            ListSpeed("head", "prompt", 1.23, 123.4, 1.234e12, 1.3e12, 1e10),
        ),
        peak_memory_bytes=2**31,
    )
    check_golden("list_speed", benchmark.lists_table(figures))


def test_compiled_programs():
    parallel = dataclasses.replace(COMPILED, halves=(Half("block", 3000000, 2000000),), programs=())
    lines = benchmark.compiled_table([COMPILED, parallel])
    assert lines[3].endswith("does not compile: RESOURCE_EXHAUSTED: too large")
    assert len({line.count("|") for line in lines[-4:]}) == 1
    carry, _ = COMPILED.programs
    exchanges = Exchange("all-reduce", 0, 1, 4), Exchange("all-gather", 1, 7, 2**28)
    carry = dataclasses.replace(carry, exchanges=exchanges)
    on_mesh = dataclasses.replace(COMPILED, mesh="2x4", programs=(carry,))
    with_mesh = benchmark.compiled_table([COMPILED, parallel, on_mesh])
    assert len({line.count("|") for line in with_mesh[-4:]}) == 1
    check_golden("compiled", [*lines, "", *with_mesh[-6:]])


def test_numerical_error():
    rows = [
        NumericalError("random", "difference", "float32", "NIE", 1.234e-7, 2e-8, 0.9999999),
        NumericalError("random", "two runs", "bfloat16", "TIE", 0.0123, 0.5, 0.12345678),
    ]
    check_golden("numerical_error", benchmark.numerical_error_table(rows))
