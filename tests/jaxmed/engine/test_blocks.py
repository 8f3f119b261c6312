"""Pairs that go through the engine together, against the plain definition of each alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.engine import blocks, capture, cost, plan, propagate, runs, scan
from jaxmed.question import metrics
from jaxmed.question.positions import Edited, Positions
from jaxmed.question.question import Question
from models.errors import InputError
from models.sites import Site
from tests import tiny
from tests.jaxmed.engine import jaxprs
from tests.jaxmed.scans import (
    GRANULARITIES,
    UNEQUAL,
    compiled_without_optimising,
    define,
    largest,
    pair,
    some_directions,
    worst,
)

LOGIT, RESPONSE = metrics.LogitDifference(), metrics.ResponseLogprobDifference()
SHORT = ("layer", "module", "head", "token")
# Prompts of other lengths on either side, and responses of other lengths. Spans of the first two
# pairs are padded to one length.
PAIRS = [UNEQUAL, pair(11, 14, harmful=3, safe=2, seed=1), pair(5, 5, seed=2)]


def scanned(decoder, pairs, question, names, **options):
    """The effects of every pair."""
    return scan.scan_pairs(
        decoder, pairs, question, names, chosen=[{}] * len(pairs), memory=2**30, **options
    )


def blocks_of(decoder, pairs, question, names):
    """The blocks of such a scan."""
    return scan.Scan(decoder, pairs, question, chosen=[{}] * len(pairs)).blocks(names, 2**30)


@pytest.mark.parametrize(
    "family, metric, positions",
    [
        ("llama", RESPONSE, Positions.PROMPT),
        ("gemma2", LOGIT, Positions.LAST),
        ("gpt_neox", LOGIT, Positions.DIFFERING),
    ],
)
def test_every_pair_of_a_block_has_the_effects_of_the_plain_definition(
    family, metric, positions, tmp_path, monkeypatch
):
    # Batches of one size instead of two, which compiles half as much.
    monkeypatch.setattr(cost, "_FEW", 1)
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        names, question = GRANULARITIES, Question(metric, positions)
        if positions == Positions.LAST:
            given = some_directions(decoder.config, tmp_path)
            names, question = (*names, "direction"), Question(metric, directions=given)
        with compiled_without_optimising():
            found = scanned(decoder, PAIRS, question, names)
        for effects, of_pair in zip(found, PAIRS, strict=True):
            reference = define(decoder, of_pair, question, names)
            assert worst(effects, reference) <= 1e-12
            assert effects.y_base == pytest.approx(reference.y_base, rel=1e-12)
            assert effects.y_source == pytest.approx(reference.y_source, rel=1e-12)
    # Those whose spans have one length were together, where each alone would not fill a batch.
    made = blocks_of(decoder, PAIRS, question, names)
    together = {
        block.granularity: max(sizes.runs for sizes in block.batches)
        for block in made
        if len(block.pairs) == 3
    }
    assert {"layer", "module"} <= set(together) and min(together.values()) > 2


def test_what_is_the_same_has_no_effect_at_all_wherever_it_stands():
    """In a block: pairs of identical prompts, and what equal tokens write before prompts differ."""
    decoder, question = tiny.decoder("qwen2"), Question(LOGIT, Positions.PROMPT)
    same = [
        dataclasses.replace(of, counterfactual_ids=of.prompt_ids) for of in (PAIRS[1], PAIRS[2])
    ]
    changed = list(UNEQUAL.prompt_ids)
    changed[7] = changed[7] % 60 + 1
    differs = dataclasses.replace(UNEQUAL, counterfactual_ids=tuple(changed))
    block = [UNEQUAL, same[0], differs, same[1]]
    assert len(blocks_of(decoder, block, question, GRANULARITIES)[0].pairs) == 4
    found = scanned(decoder, block, question, GRANULARITIES)
    for effects in (found[1], found[3]):
        assert largest(effects) == 0
        assert effects.y_base == effects.y_source
    assert min(largest(found[0]), largest(found[2])) > 1e-3
    for side in (found[2].nie["token"], found[2].tie["token"]):
        # Counted from the end: the changed position is column 4 of 12.
        assert np.all(side[..., 5:] == 0) and np.abs(side[..., 4]).max() > 1e-3


def test_a_pair_alone_is_the_pair_in_a_block_but_for_rounding():
    decoder, question = tiny.decoder("qwen2"), Question(LOGIT)
    (alone,) = scanned(decoder, PAIRS[:1], question, SHORT)
    among = scanned(decoder, PAIRS, question, SHORT)
    assert worst(among[0], alone) <= 1e-5


def test_operations_are_told_as_they_are_done():
    decoder, question, told = tiny.decoder("qwen2"), Question(LOGIT), []
    scanned(decoder, PAIRS, question, SHORT, on_operations=told.append)
    total = sum(cost.operations(decoder.config, of, question, SHORT) for of in PAIRS)
    assert sum(told) == pytest.approx(total, rel=1e-12) and len(told) > len(SHORT)


def test_units_of_runs_that_differ_are_laid_into_one_list():
    def work(layers, units, positions):
        made = plan.Units(*(np.array(each, np.int32) for each in (layers, units, positions)))
        edited = Edited(np.arange(4), np.arange(4))
        return plan.Work("token", Site.MLP, made, edited, 0, 4, 4, np.full(len(made), 4), ())

    runs_of = [work([0, 0, 1], [0, 0, 0], [1, 3, 2]), work([0, 1, 1], [0, 0, 2], [0, 1, -1])]
    units, rows = blocks.merged(runs_of)
    assert units.layers.tolist() == [0, 0, 1, 1] and units.units.tolist() == [0, 0, 0, 2]
    nowhere = plan.NO_POSITION
    assert units.positions.tolist() == [[1, 3, 2, nowhere], [0, nowhere, 1, -1]]
    assert [each.tolist() for each in rows] == [[0, 1, 2], [0, 2, 3]]


def test_fewer_runs_go_together_where_the_memory_is_small():
    config, question = tiny.config("llama"), Question(LOGIT)
    (group,) = blocks.groups(config, PAIRS, question, "layer", [{}] * 3)
    (sizes,) = blocks.batches(config, np.float32, [group], 6, 2**30, "cpu")
    assert sizes.runs == 4

    def runs_in(memory: int) -> int:
        """How many go together; 0 where not one unit fits."""
        try:
            return blocks.batches(config, np.float32, [group], 6, memory, "cpu")[0].runs
        except InputError:
            return 0

    assert runs_in(2**16) == 0
    least = next(memory for memory in range(2**16, 2**24, 2**12) if runs_in(memory))
    assert runs_in(least) == 1 < runs_in(2 * least) <= 8


def test_pairs_of_like_length_share_a_block_and_long_lists_are_done_pair_by_pair(monkeypatch):
    config, question = tiny.config("llama"), Question(LOGIT)
    monkeypatch.setattr(cost, "_TOGETHER", {"cpu": 16})
    monkeypatch.setattr(cost, "_PAIRS", {"cpu": 2})
    made = blocks.blocks(
        *(config, np.float32, PAIRS, question, ["layer", "neuron"]),
        chosen=[{}] * 3,
        memory=2**30,
        platform="cpu",
    )
    assert [(block.granularity, block.pairs) for block in made] == [
        ("layer", (2, 0)),
        ("neuron", (2,)),
        ("neuron", (0,)),
        ("layer", (1,)),
        ("neuron", (1,)),
    ]
    assert made == [blocks.Block.of(dataclasses.asdict(block)) for block in made]


def test_parts_of_the_layers_have_the_effects_of_the_whole_list():
    decoder, question = tiny.decoder("qwen2"), Question(LOGIT)
    chosen = [{"neuron": np.arange(3 * 40).reshape(3, 40) % 3 > 0}, {}, {}]
    of_pairs = scan.Scan(decoder, PAIRS, question, chosen=chosen)
    names, together = ("module", "neuron"), {"neuron": 2}
    whole = of_pairs.blocks(names, 2**30)
    parts = of_pairs.blocks(names, 2**30, together)
    assert {block.layers for block in whole} == {(0, 3)}
    assert [block.layers for block in parts if block.granularity == "neuron"] == [(0, 2), (2, 3)]
    assert [block for block in parts if block.granularity == "module"] == whole[:1]
    assert [block.name for block in parts] == [
        "module-00002-000",
        "neuron-00002-000",
        "neuron-00002-002",
    ]
    (expected,) = (of_pairs.effects(block) for block in whole[1:])
    for block in parts[1:]:
        inside = np.zeros(3, bool)
        inside[slice(*block.layers)] = True
        for found, of_whole in zip(of_pairs.effects(block), expected, strict=True):
            for side in ("nie", "tie"):
                part = getattr(found, side)["neuron"]
                wanted = getattr(of_whole, side)["neuron"]
                assert np.isnan(part[~inside]).all()
                np.testing.assert_allclose(
                    part[inside], wanted[inside], rtol=1e-4, atol=1e-6 * np.nanmax(np.abs(wanted))
                )


def test_a_part_takes_about_a_minute_and_still_fills_the_device(monkeypatch):
    config, question = tiny.config("llama", num_layers=12), Question(LOGIT)

    def together(granularity="neuron", **computed):
        names = ["layer", granularity]
        found = blocks.layers_together(config, PAIRS, question, names, "cpu", computed=computed)
        assert found["layer"] == 12
        return found[granularity]

    assert together() == 12  # 480 neurons are few
    monkeypatch.setattr(cost, "_TOGETHER", {"cpu": 8})  # a chunk has 64 rows of them
    monkeypatch.setattr(cost, "UNITS_OF_A_BLOCK", 200)
    assert together() == 4 and together(neuron=200) == 12
    monkeypatch.setattr(cost, "UNITS_OF_A_BLOCK", 50)
    assert together() == 1
    of_layers = cost.layer_operations(config, PAIRS[1], question, "neuron")
    assert of_layers.shape == (12,) and (np.diff(of_layers) < 0).all()
    whole = cost.operations(config, PAIRS[1], question, ["neuron"])
    assert of_layers.sum() == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(cost, "UNITS_OF_A_BLOCK", 1000)
    monkeypatch.setattr(cost, "_OPERATIONS", {"cpu": float(of_layers[:2].sum())})
    assert together() == 2
    # Modules of a prompt are too few to fill a chunk by a layer's.
    monkeypatch.setattr(cost, "_OPERATIONS", {"cpu": 1.0})
    assert together("module") == 12 and together() == 1


def test_a_block_is_halved_as_often_as_it_can_be():
    block = blocks.Block("token", (0,), (0, 3), (cost.Batching(4, 8, 3), cost.Batching(1, 8, 1)))
    sizes = []
    while block := block.halved():
        sizes.append([each[::2] for each in block.batches])
    assert sizes == [[(4, 1), (1, 1)], [(2, 1), (1, 1)], [(1, 1), (1, 1)]]


def test_several_runs_share_loops_and_weights():
    """As many loops and products as one run has; no bound of a loop differs between runs, and no
    weight is multiplied but once for all of them."""
    decoder, size, shape = tiny.decoder("llama"), 2, (4, 2, 3)
    tokens = tuple(range(8))
    frame = jax.eval_shape(
        lambda d: capture.frame(d, capture.capture(d, tokens), 8 - size, size, 32), decoder
    )
    frames = jax.tree.map(lambda of: jax.ShapeDtypeStruct((shape[0], *of.shape), of.dtype), frame)
    stages = jax.ShapeDtypeStruct(shape[1:], jnp.int32)
    of_one, of_several = (
        jax.make_jaxpr(carry)(decoder, given, stages, jax.ShapeDtypeStruct(array, jnp.float32), 3)
        for carry, given, array in (
            (propagate.carry, frame, (2, size, 3, 24)),
            (runs.carry, frames, (4, 2, size, 3, 24)),
        )
    )

    def found(jaxpr, name) -> list[Any]:
        return [each for each in jaxprs.equations(jaxpr) if each.primitive.name == name]

    loops = found(of_several, "while")
    assert len(loops) == len(found(of_one, "while")) == 2
    for loop in loops:
        bound = loop.params["cond_jaxpr"]
        assert not found(bound, "reduce_or") and bound.out_avals[0].shape == ()
    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(decoder.blocks) if leaf.ndim == 3}

    def of_weights(jaxpr):
        return [
            [variable.aval.shape for variable in each.invars]
            for each in found(jaxpr, "dot_general")
            if each.invars[1].aval.shape in weights
        ]

    assert len(of_weights(of_several)) == len(of_weights(of_one)) > 0
    assert any(shapes[0][: len(shape) - 1] == (4, 3) for shapes in of_weights(of_several))
