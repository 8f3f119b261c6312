"""What is read off a compiled program's text; how TPUs' own texts read is in `test_chips.py`."""

import pathlib

import pytest

from jaxmed.validation.compiled import Array, Exchange, Text

# As the TPU compiler writes it, cut down: a loop over layers, and in it one over batches that
# multiplies, beside one of two turns.
TEXT = (pathlib.Path(__file__).parent / "compiled.hlo").read_text()


def text(precision: str = "highest,highest") -> Text:
    return Text(TEXT.replace("PRECISION", precision))


def test_cycles_are_told_by_loop():
    program = text().program
    (layers,) = program.loops
    assert (program.own_cycles, layers.own_cycles, layers.turns) == (9, 100, None)
    batch, other = layers.loops
    assert (batch.turns, batch.turn_cycles) == (None, 750)
    assert (other.turns, other.turn_cycles) == (2, 5)
    assert program.turn_cycles == 9 + 100 + 750 + 2 * 5


def test_cycles_are_told_by_scope():
    of = text()
    (layers,) = of.program.loops
    assert of.cycles_in(layers.loops[0], "attend") == 700
    assert of.cycles_in(layers.loops[0], "feed") == 0


def test_cycles_of_products_are_those_of_what_multiplies():
    assert text().product_cycles == 700


@pytest.mark.parametrize(
    "precision, passes", [("default,default", 1), ("high,high", 2), ("highest,highest", 3)]
)
def test_a_product_with_a_bfloat16_operand_takes_a_pass_for_each_part_of_the_other(
    precision, passes
):
    (product,) = text(precision).products
    assert product.operands == (Array("f32", (16, 8)), Array("bf16", (8, 32)))
    assert (product.passes, product.multiplications) == (passes, 16 * 8 * 32)


@pytest.mark.parametrize(
    "dtype, precision, passes",
    [("f32", "high,high", 3), ("f32", "highest,highest", 6), ("bf16", "highest,highest", 1)],
)
def test_products_of_like_operands(dtype, precision, passes):
    """Two of float32 are both cut; of two of bfloat16 neither is."""
    both = TEXT.replace("PRECISION", precision)
    for place in ("%param_1 = bf16[8,32]", "%wide = f32[16,8]"):
        name, _, shape = place.partition(" = ")
        both = both.replace(place, f"{name} = {dtype}{shape[shape.index('[') :]}")
    (product,) = Text(both).products
    assert product.passes == passes


def test_passes_count_reads_and_writes_of_arrays_in_memory():
    """Written once, read once though it is named twice, written again; a bitcast does neither."""
    of = text()
    batch, _ = of.program.loops[0].loops
    assert of.touched(batch, {16 * 32}) == 3
    assert of.touched(batch, {16 * 8}) == 1
    assert of.touched(batch, {7}) == 0


def test_what_is_inside_a_fusion_is_not_in_memory():
    arrays = list(text().in_memory())
    assert Array("bf16", (8, 32)) in arrays
    assert arrays.count(Array("f32", (16, 32))) == 2
    of = text()
    assert {"fused_product", "renamed"} == of.fused


def test_what_devices_exchange_is_told_by_kind_and_loop():
    """What is gathered is counted, not what each had; once, where it is begun and later ended."""
    assert not text().exchanges
    gathers = """
  %begun = (bf16[1,4,32]{2,1,0}, bf16[1,8,32]{2,1,0}) all-gather-start(%slice), dimensions={1}
  %ended = bf16[1,8,32]{2,1,0} all-gather-done(%begun)
  %other = u16[8,16]{1,0:T(8,128)} all-gather(%slice), dimensions={0}
"""
    bound = "\n  %pmin.1 = (s32[]{:T(128)}, pred[3]{0}) all-reduce(%a.1, %a.1), to_apply=%renamed"
    exchanging = Text(
        TEXT.replace("\n  %slice =", f"{gathers}  %slice =").replace(
            "\n  %copy.2", f"{bound}\n  %copy.2"
        )
    )
    assert exchanging.exchanges == (
        Exchange("all-reduce", loops=0, number=1, bytes=4 + 3),
        Exchange("all-gather", loops=1, number=2, bytes=2 * 8 * 32 + 2 * 8 * 16),
    )
    assert [of.name for of in exchanging.collectives] == ["ended", "other", "pmin.1"]


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="this is not a compiled program"):
        Text("module @jit_carry {}")
