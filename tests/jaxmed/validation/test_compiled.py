"""What is read off a compiled program's text; how TPUs' own texts read is in `test_chips.py`."""

import pytest

from jaxmed.validation.compiled import Array, Text

# As the TPU compiler writes it, cut down: a loop over layers, and in it one over batches that
# multiplies, beside one of two turns.
TEXT = """\
HloModule jit_carry, is_scheduled=true

%fused_product (param_0: f32[16,8], param_1: bf16[8,32]) -> f32[16,32] {
  %param_0 = f32[16,8]{1,0:T(8,128)} parameter(0)
  %wide = f32[16,8]{1,0:T(8,128)} fusion(%param_0), kind=kLoop, calls=%renamed
  %param_1 = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = f32[16,32]{1,0:T(8,128)} convolution(%wide, %param_1), dim_labels=bf_io->bf, operand_precision={PRECISION}
}

%renamed (param_0.1: f32[16,8]) -> f32[16,8] {
  ROOT %bitcast.9 = f32[16,8]{1,0:T(8,128)} bitcast(%param_0.1)
}

%batch (arg.1: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %arg.1 = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}, /*index=2*/bf16[8,32]{1,0}) parameter(0)
  %rows = f32[16,8]{1,0:T(8,128)S(1)} get-tuple-element(%arg.1), index=1
  %weight = bf16[8,32]{1,0} get-tuple-element(%arg.1), index=2
  %scores = f32[16,32]{1,0} fusion(%rows, %weight), kind=kOutput, calls=%fused_product, metadata={op_name="jit(carry)/while/body/attend/while/body/dot_general" stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"700"}}
  %half = (f32[16,32]{1,0}, pred[16]{0}) fusion(%scores, %scores), kind=kLoop, calls=%renamed, backend_config={"window_config":{"estimated_cycles":"50"}}
  %same = f32[32,16]{1,0} bitcast(%scores)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) tuple(%rows, %rows)
}

%twice (arg.2: (s32[])) -> (s32[]) {
  %arg.2 = (s32[]) parameter(0)
  %copy.1 = f32[4]{0} copy(%arg.2), backend_config={"window_config":{"estimated_cycles":"5"}}
  ROOT %tuple.2 = (s32[]) tuple(%arg.2)
}

%layer (arg.3: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %arg.3 = (s32[], f32[16,8]{1,0}) parameter(0)
  %slice = bf16[8,32]{1,0} dynamic-slice(%arg.3), backend_config={"window_config":{"estimated_cycles":"100"}}
  %while.1 = (s32[], f32[16,8]{1,0}) while(%arg.3), condition=%less, body=%batch, metadata={op_name="jit(carry)/while/body/attend/while" stack_frame_id=2}
  ROOT %while.2 = (s32[]) while(%arg.3), condition=%less, body=%twice, metadata={op_name="jit(carry)/while/body/other/while"}, backend_config={"known_trip_count":{"n":"2"}}
}

ENTRY %main.1 (a.1: f32[16,8]) -> f32[16,8] {
  %a.1 = f32[16,8]{1,0} parameter(0)
  %copy.2 = f32[16,8]{1,0} copy(%a.1), backend_config={"window_config":{"estimated_cycles":"9"}}
  ROOT %while.3 = (s32[], f32[16,8]{1,0}) while(%copy.2), condition=%less, body=%layer, metadata={op_name="jit(carry)/while"}
}
"""


def text(precision: str = "highest,highest") -> Text:
    return Text(TEXT.replace("PRECISION", precision))


def test_cycles_are_told_by_loop():
    program = text().program
    (layers,) = program.loops
    assert (program.own_cycles, layers.own_cycles, layers.turns) == (9, 100, None)
    (attend,) = program.find("attend")
    assert (attend.turns, attend.turn_cycles) == (None, 750)
    (other,) = layers.find("other")
    assert (other.turns, other.turn_cycles) == (2, 5)
    assert program.turn_cycles == 9 + 100 + 750 + 2 * 5
    assert not list(program.find("feed"))


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
        both = both.replace(place, f"{name} = {dtype}{shape[shape.index('['):]}")
    (product,) = Text(both).products
    assert product.passes == passes


def test_passes_count_reads_and_writes_of_arrays_in_memory():
    """Written once, read once though it is named twice, written again; a bitcast does neither."""
    of = text()
    (attend,) = of.program.find("attend")
    assert of.touched(attend, {16 * 32}) == 3
    assert of.touched(attend, {16 * 8}) == 1
    assert of.touched(attend, {7}) == 0


def test_what_is_inside_a_fusion_is_not_in_memory():
    arrays = list(text().in_memory())
    assert Array("bf16", (8, 32)) in arrays
    assert arrays.count(Array("f32", (16, 32))) == 2
    of = text()
    assert {"fused_product", "renamed"} == of.fused


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="this is not a compiled program"):
        Text("module @jit_carry {}")
