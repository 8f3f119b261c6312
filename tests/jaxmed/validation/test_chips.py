"""Programs compiled for TPUs that are not there (`make tpu`)."""

import functools
import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import pytest

from jaxmed.question.sites import GRANULARITIES
from jaxmed.runs import benchmark
from jaxmed.runs.benchmark import BenchmarkSettings
from jaxmed.validation import chips, presets
from jaxmed.validation.chips import Asked
from jaxmed.validation.programs import Carried, Program
from models.errors import InputError
from models.products import PRECISIONS
from tests import tiny

TOPOLOGIES = ("v5e:2x2", "v6e:2x4")
# Products of bfloat16 operands that the matrix unit makes for one of a difference with a weight
# that is stored as bfloat16. float32 is XLA's HIGHEST, which cuts the difference alone: it sees
# that the weight was widened. So split3 is that too, and split2 is HIGH.
PASSES = {"float32": 3, "split3": 3, "split2": 2, "bfloat16": 1}


@functools.cache
def compiler(topology: str) -> chips.Compiler:
    return chips.Compiler(chips.chip(topology))


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"takes libtpu: pip install 'jaxmed\[tpu\]'"):
        chips.chip("v5e:2x2")


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:3x3", "v9:2x2", "a chip"])
def test_a_topology_that_does_not_exist_is_refused_by_name(topology):
    with pytest.raises(InputError, match=f"compile_for={topology}: not a topology that libtpu"):
        chips.chip(topology)


@pytest.mark.tpu
def test_weights_that_do_not_fit_a_chip_are_refused():
    preset = presets.PRESETS["llama-3.1-8b"]
    asked = Asked("llama-3.1-8b", preset.config, tokens=64, memory_gb=10)
    with pytest.raises(InputError, match="take 14.96 GiB, which leaves nothing on one chip"):
        chips.measure(asked, compiler("v5e:2x2"), "bfloat16")


@pytest.mark.tpu
def test_batches_are_those_that_a_run_takes_of_a_part_of_the_layers():
    preset = presets.PRESETS["llama-3.1-8b"]
    asked = Asked("llama-3.1-8b", preset.config, preset.tokens)
    chip = chips.chip("v6e:2x4", (8, 1))
    (carry,) = (of for of in chips.recorded(asked, chip, "split2").programs if of.name == "carry")
    # 14,336 neurons of eight layers for each chip, of which eight large batches would be too few.
    assert carry.carried == Carried(batches=8, rows=1024, positions=1, prefix=64)


@pytest.mark.tpu
def test_a_program_that_does_not_fit_is_told_and_not_counted():
    large = jax.ShapeDtypeStruct((2**33,), jnp.float32)
    program = Program("large", "", "", lambda x: x + 1, (large,), donated=())
    compiled, text = compiler("v5e:2x2")(program)
    assert "RESOURCE_EXHAUSTED" in compiled.error and text is None
    assert compiled.bytes == compiled.cycles == 0


@pytest.mark.tpu
def test_the_program_tells_and_writes_what_it_finds_from_a_config_alone(tmp_path):
    tiny.save(tmp_path / "model", dtype="bfloat16")
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    told, file = [], tmp_path / "figures.json"
    settings = BenchmarkSettings(
        compile_for=("v5e:2x2",),
        model=str(tmp_path / "model"),
        matmul_precision=("bfloat16",),
        only_neurons=True,
        rows=8,
        json=str(file),
    )
    benchmark.run(settings, told.append)
    (figures,) = json.loads(file.read_text())
    assert figures["kind"] == "TPU v5 lite" and figures["precision"] == "bfloat16"
    assert [half["name"] for half in figures["halves"]] == ["attention", "MLP"]
    names = [program["name"] for program in figures["programs"]]
    assert names == [line.split()[0] for line in told[2 : 2 + len(names)]]
    assert told[-2].startswith("| v5e:2x2 | bfloat16 | 8 x 8 |")


@pytest.mark.tpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_all_programs_compile(family, topology):
    """Of all granularities, and of screening, joint sets, generation and judging."""
    asked = Asked(
        model=family,
        config=tiny.config(family, dtype="bfloat16"),
        tokens=20,
        granularities=GRANULARITIES,
        rows=8,
        whole=True,
    )
    for precision in PRECISIONS:
        began = time.perf_counter()
        figures = chips.measure(asked, compiler(topology), precision)
        seconds = time.perf_counter() - began
        count = len(figures.programs)
        print(f"\n{topology}, {family}, {precision}: {count} programs, {seconds:.0f} s")
        assert not [program for program in figures.programs if program.error]
        names = {program.name for program in figures.programs}
        assert names >= {"capture", "frame", "enter", "enter_directions", "carry", "read_changes"}
        assert names >= {"unit_slopes", "fill", "advance"}
        assert [half.name for half in figures.halves] == (
            ["block"] if family == "gpt_neox" else ["attention", "MLP"]
        )
        assert 0 < figures.fraction < 1
        # What a compiler names after no half, as a copy, is in the whole alone.
        assert all(half.cycles > 0 and half.product_cycles > 0 for half in figures.halves)
        assert figures.passes > 0


@pytest.mark.tpu
@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_chips_that_share_the_work_exchange_weights_alone(mesh):
    """Nothing where each has all of them; else they are gathered, and single numbers reduced."""
    began = time.perf_counter()
    config = tiny.config("gemma2", dtype="bfloat16")
    chip = chips.chip("v5e:2x4", mesh)
    asked = Asked("gemma2", config, tokens=20, granularities=("head",), rows=8, whole=True)
    compile_for, exchanged = chips.Compiler(chip), {}
    for program in chips.recorded(asked, chip, "split2").programs:
        compiled, text = compile_for(program)
        assert text is not None, compiled.error
        for operation in text.collectives:
            kind = operation.collective
            if kind == "all-reduce" and operation.arrays[0].shape:
                # How the compiler gathers what is small: each chip adds its part to zeros.
                assert all("dynamic-update-slice" in name for name in operation.operands), (
                    operation.text
                )
                kind = "all-gather"
            exchanged.setdefault(kind, set()).add(program.name)
    print(f"\n{chip.topology}, {mesh}: {time.perf_counter() - began:.0f} s, {exchanged}")
    if mesh[1] == 1:
        assert not exchanged
        return
    assert exchanged.keys() == {"all-gather", "all-reduce"}
    gathering = {"capture", "enter", "carry", "read_changes", "unit_slopes", "fill", "advance"}
    assert exchanged["all-gather"] >= gathering


@pytest.mark.tpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_take_the_passes_of_their_precision(precision, topology):
    """In the compiled program, and in the cycles that the compiler expects of it where the matrix
    unit is what takes the time: v6e's is faster than the memory at this size."""
    width, inner, rows = 256, 1024, 256
    config = tiny.config(dtype="bfloat16", hidden_size=width, intermediate_size=inner)
    asked = Asked("wide", config, tokens=20)
    carried = Carried(batches=8, rows=rows, positions=1, prefix=32)
    program = chips.of_products(asked, carried, precision)["feed"]
    text = _text(program, topology)
    passes = sum(product.passes * product.multiplications for product in text.products)
    assert passes == PASSES[precision] * 3 * rows * width * inner
    if topology.startswith("v6e"):
        return
    one_pass = _text(chips.of_products(asked, carried, "bfloat16")["feed"], topology)
    assert round(text.product_cycles / one_pass.product_cycles) == PASSES[precision]


@pytest.mark.tpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_float32_copy_of_a_weight_is_in_memory(precision, topology):
    """Neither of all layers' nor of one's, of a checkpoint in bfloat16."""
    config = tiny.config(
        dtype="bfloat16", hidden_size=104, intermediate_size=352, num_kv_heads=2, head_dim=40
    )
    asked = Asked("wide", config, tokens=20, rows=8)
    record = chips.recorded(asked, compiler(topology).chip, precision)
    (carry,) = (program for program in record.programs if program.name == "carry")
    matrices = [shape for shape in carry.arguments if shape.dtype == "uint16" and shape.ndim == 3]
    sizes = {shape.size for shape in matrices} | {shape.size // 3 for shape in matrices}
    assert len(matrices) == 7 and len(sizes) == 6
    arrays = list(_text(carry, topology).in_memory())
    assert any(array.dtype == "bf16" and array.size in sizes for array in arrays)
    assert not [array for array in arrays if array.dtype == "f32" and array.size in sizes]


def _text(program, topology):
    compiled, text = compiler(topology)(program)
    assert text is not None, compiled.error
    return text
