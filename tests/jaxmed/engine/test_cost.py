"""What is computed for what is needed: spans, runs, operations."""

import dataclasses

import numpy as np
import pytest

from jaxmed.engine import blocks, cost, plan
from jaxmed.engine.cost import Devices
from jaxmed.question import metrics
from jaxmed.question.positions import Positions
from jaxmed.question.question import Question
from jaxmed.validation import presets
from models.config import Rotary
from tests import tiny
from tests.jaxmed.scans import UNEQUAL, pair

LOGIT, RESPONSE = metrics.LogitDifference(), metrics.ResponseLogprobDifference()
# The shape of SmolLM2-135M.
SMALL = presets.llama(
    dtype="float32",
    vocab_size=49152,
    tie_embeddings=True,
    rotary=Rotary(kind="default", theta=10000.0),
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
)


@pytest.mark.parametrize(
    "config, granularity, most, lengths",
    [
        (SMALL, "neuron", 1.125, 56),
        (SMALL, "layer", 2, 15),
        (tiny.config("llama", max_positions=512), "neuron", 2, 10),
    ],
)
def test_spans_are_little_longer_than_what_is_needed(config, granularity, most, lengths):
    """Less where more operations are saved: what is saved has to be worth compiling for."""
    question = Question(LOGIT, Positions.PROMPT)
    found = {}
    for length in range(3, 513):
        asked = pair(length, length)
        (term,) = cost.runs(config, asked, question)
        (work,) = plan.plan(config, asked, term, question, [granularity], False)
        assert np.all(work.needed == length)
        assert work.start == 0
        found[length] = work.size
    assert all(length <= size <= most * length for length, size in found.items() if length > 4)
    # Those of one and two positions are not among these.
    assert len(set(found.values())) == lengths - 2


def test_the_prompt_is_computed_with_little_padding():
    """65 tokens are one more than a power of two."""
    question = Question(LOGIT, Positions.PROMPT)
    asked, names = pair(65, 65), ["layer", "module", "head", "neuron"]
    made = blocks.blocks(
        *(SMALL, np.float32, [asked], question, names), chosen=[{}], memory=2**34, platform="cpu"
    )
    done = blocks.operations_done(SMALL, [asked], question, made, chosen=[{}])
    assert 1 <= done / cost.operations(SMALL, asked, question, names) <= 1.15


def test_operations_are_those_of_the_blocks_that_follow():
    """Of a neuron of the first of two blocks, at the last position of a prompt of 8."""
    config = tiny.config("llama", num_layers=2)
    chosen = {"neuron": np.zeros((2, 40), bool)}
    chosen["neuron"][0, 3] = True
    width, inner, heads, keys = 24, 40, 32, 16
    block = width * (2 * heads + 2 * keys) + 3 * width * inner
    scores = 2 * heads * (7 + 2)
    needed = cost.operations(config, pair(8, 8), Question(LOGIT), ["neuron"], chosen)
    assert needed == 2 * 2 * (block + scores + 2 * width)
    # Of three positions only keys and values are needed at two.
    asked = Question(LOGIT, Positions.PROMPT)
    needed = cost.operations(config, pair(3, 3), asked, ["neuron"], chosen)
    at_all = 2 * width * keys
    assert needed == 2 * 2 * (block + 2 * heads * 6 + 2 * at_all + 2 * width)


def test_responses_share_a_run_where_that_is_less_work():
    def runs(length, positions, config=SMALL):
        return cost.runs(config, pair(64, 64, length, length), Question(RESPONSE, positions))

    assert len(runs(20, Positions.PROMPT)) == 1
    assert len(runs(20, Positions.RESPONSE)) == 2
    # Scores between long responses are more than the prompt.
    assert len(runs(1000, Positions.LAST)) == 2
    shared, apart = (
        sum(
            np.sum(cost.needed_operations(SMALL, work, term))
            for term in terms
            for work in plan.plan(
                SMALL, asked, term, Question(RESPONSE, Positions.PROMPT), ["neuron"], False
            )
        )
        for asked in [pair(65, 65, 20, 20)]
        for terms in (
            cost.runs(SMALL, asked, Question(RESPONSE, Positions.PROMPT)),
            cost.runs(SMALL, asked, Question(RESPONSE, Positions.RESPONSE)),
        )
    )
    assert shared <= 0.7 * apart


def test_padding_of_a_span_takes_positions_before_it():
    """Eleven positions are edited, and none is before the span of sixteen."""
    question = Question(LOGIT, Positions.PROMPT)
    config = dataclasses.replace(tiny.config("llama"), max_positions=512)
    (term,) = cost.runs(config, UNEQUAL, question)
    work = plan.plan(config, UNEQUAL, term, question, ["head"], False)[0]
    assert (work.start, work.size, work.needed[0]) == (0, 16, 11)


def test_each_of_several_devices_has_as_many_rows_and_its_own_memory():
    """But on a CPU, whose devices share it."""
    asked = pair(12, 12)

    def rows(platform, devices, memory):
        (block,) = blocks.blocks(
            *(SMALL, np.float32, [asked], Question(LOGIT, Positions.LAST), ["neuron"]),
            chosen=[{}],
            memory=memory,
            platform=platform,
            devices=devices,
        )
        (sizes,) = block.batches
        return sizes.rows

    # A list that fills eight devices as it fills one.
    one = rows("cpu", Devices(), 2**31)
    assert rows("cpu", Devices(8), 8 * 2**31) == 8 * one
    assert rows("cpu", Devices(8), 2**30) < 8 * one
    # Where the weights are in parts there is room for a layer of them less.
    assert rows("cpu", Devices(8, 4), 2**30) <= rows("cpu", Devices(8), 2**30)
    assert rows("cpu", Devices(6, 2), 2**31) % 6 == 0


def test_what_is_held_beside_each_unit_leaves_room_for_fewer():
    question = Question(LOGIT, Positions.LAST)
    (term,) = cost.runs(SMALL, pair(12, 12), question)
    (work,) = plan.plan(SMALL, pair(12, 12), term, question, ["neuron"], False)
    given = SMALL, np.float32, work, term, 2**30, "cpu"
    plain = cost.batching(*given)
    held = cost.batching(*given, beside=2**24)  # of 8 batches, 128 MiB for each row
    assert 1 <= held.rows <= 8 < plain.rows


def test_a_tpu_has_a_layer_of_16_bit_weights_as_it_is_stored():
    """Not twice as wide, as it is elsewhere: of Llama 3.1 70B that is most of what is left beside
    the weights on each of eight chips of 32 GiB."""
    config = presets.with_layers(presets.PRESETS["llama-3.1-70b"].config, 8)

    def rows(platform, dtype, gib=12):
        (block,) = blocks.blocks(
            *(config, np.dtype(dtype), [presets.random_pair(config, 64)]),
            *(Question(LOGIT, Positions.LAST), ["neuron"]),
            chosen=[{}],
            memory=gib * 2**30,
            platform=platform,
            devices=Devices(8, 8),
        )
        (sizes,) = block.batches
        return sizes.rows // 8

    assert rows("gpu", "bfloat16") <= 1024 and rows("tpu", "bfloat16") >= 4096
    assert rows("tpu", "float16") == rows("tpu", "bfloat16")
    assert rows("tpu", "float32", gib=16) == rows("gpu", "float32", gib=16)
