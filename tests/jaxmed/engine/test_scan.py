"""The engine against the plain definition, at every site and choice of positions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed
from jaxmed.analysis import joint as joint_lib
from jaxmed.engine import capture, cost, plan, propagate, runs, scan
from jaxmed.files import reading
from jaxmed.question import metrics
from jaxmed.question import question as question_lib
from jaxmed.question.positions import Align, Positions
from jaxmed.validation import presets
from models import products
from models.edits import Edit
from models.errors import InputError
from models.sites import Site
from tests import tiny
from tests.jaxmed.engine import jaxprs
from tests.jaxmed.scans import (
    GRANULARITIES,
    UNEQUAL,
    define,
    largest,
    pair,
    some_directions,
    worst,
)

METRICS = {
    "logit": metrics.LogitDifference(),
    "sets": metrics.LogitDifference((1, 2, 3), (4, 5)),
    "response": metrics.ResponseLogprobDifference(),
}


def in_float32(decoder):
    return tiny.decoder(decoder.config.family, dtype="float32")


CASES = [
    ("llama", "logit", "last"),
    ("llama", "logit", "differing"),
    ("qwen2", "sets", "prompt"),
    # One model for all of them, as little is compiled: Llama's blocks, but for biases and windows.
    ("qwen2", "response", "last"),
    ("qwen2", "response", "differing"),
    ("qwen2", "response", "prompt"),
    ("qwen2", "response", "response"),
]


@pytest.mark.parametrize("family, metric, positions", CASES)
def test_the_engine_gives_the_plain_definition(family, metric, positions, monkeypatch):
    if family != "llama":
        # Batches of one size instead of two, which compiles half as much.
        monkeypatch.setattr(cost, "_FEW", 1)
    question = question_lib.Question(METRICS[metric], Positions(positions))
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        reference = define(decoder, UNEQUAL, question, GRANULARITIES)
        assert largest(reference) > 1e-2
        double = scan.scan_pair(decoder, UNEQUAL, question, GRANULARITIES)
    assert worst(double, reference) <= 1e-12
    single = scan.scan_pair(in_float32(decoder), UNEQUAL, question, GRANULARITIES)
    assert worst(single, reference) <= 1e-5
    assert double.y_base == pytest.approx(reference.y_base, rel=1e-12)
    assert double.y_source == pytest.approx(reference.y_source, rel=1e-12)
    assert single.y_base == pytest.approx(reference.y_base, rel=1e-5, abs=1e-5)
    assert single.y_source == pytest.approx(reference.y_source, rel=1e-5, abs=1e-5)


def test_groups_of_neurons_and_other_alignments_give_the_plain_definition():
    spans = dataclasses.replace(UNEQUAL, prompt_span=(3, 7), counterfactual_span=(2, 6))
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        for align, group_size in ((Align.START, 7), (Align.SPAN, 16)):
            question = question_lib.Question(METRICS["logit"], Positions.PROMPT, align, group_size)
            names = ("neuron", "module")
            reference = define(decoder, spans, question, names)
            found = scan.scan_pair(decoder, spans, question, names)
            assert found.nie["neuron"].shape == (3, -(-40 // group_size))
            assert worst(found, reference) <= 1e-12


def test_the_last_layer_of_a_layer_scan_is_consistent_with_the_total_effect():
    """Patching the last block's output at the last position is the total effect by definition."""
    found = scan.scan_pair(
        tiny.decoder("llama"), UNEQUAL, question_lib.Question(METRICS["logit"]), ["token"]
    )
    te = found.y_source - found.y_base
    assert found.nie["token"][-1, 0, 0] == pytest.approx(te, rel=1e-4)
    assert found.tie["token"][-1, 0, 0] == pytest.approx(te, rel=1e-4)


@pytest.mark.parametrize("positions", list(Positions))
def test_identical_prompts_have_no_effect_at_all(positions, tmp_path):
    metric = METRICS["response"]
    same = dataclasses.replace(UNEQUAL, counterfactual_ids=UNEQUAL.prompt_ids)
    given = some_directions(tiny.config("llama"), tmp_path)
    question = question_lib.Question(metric, positions, directions=given)
    names = (*GRANULARITIES, "direction")
    found = scan.scan_pair(tiny.decoder("qwen2"), same, question, names)
    for side, name in itertools.product((found.nie, found.tie), names):
        exists = given.given if name == "direction" else np.ones(side[name].shape, bool)
        assert np.all(side[name][exists] == 0.0)
        assert np.all(np.isnan(side[name][~exists]))
    assert found.y_base == found.y_source


def test_a_pair_alone_is_the_pair_among_others():
    decoder = tiny.decoder("qwen2")
    generator = np.random.default_rng(1)
    others = [
        pair(*(int(n) for n in generator.integers(4, 24, 2)), seed=seed) for seed in range(20)
    ]
    pairs = [dataclasses.replace(other, id=str(index)) for index, other in enumerate(others)]
    asked = {"granularity": "neuron", "metric": METRICS["logit"], "positions": "prompt"}
    alone = jaxmed.scan(decoder, [UNEQUAL], **asked)["neuron"]
    among = jaxmed.scan(decoder, [*pairs[:10], UNEQUAL, *pairs[10:]], **asked)["neuron"]
    scale = max(np.abs(alone.nie).max(), np.abs(alone.tie).max())
    assert np.abs(among.nie[10] - alone.nie[0]).max() <= 1e-5 * scale
    assert np.abs(among.tie[10] - alone.tie[0]).max() <= 1e-5 * scale
    assert among.nie.shape == (21, 3, 40)
    assert among.nie.dtype == np.float32


def neuron_work(decoder, question):
    (term,) = cost.runs(decoder.config, UNEQUAL, question)
    return plan.plan(decoder.config, UNEQUAL, term, question, ["neuron"], False)[0], term


def test_a_smaller_batch_changes_nothing_but_rounding():
    decoder = tiny.decoder("qwen2")
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)
    work, term = neuron_work(decoder, question)
    budgets = (2**30, 5 * 2**20)
    rows = [
        of_all.runs * of_all.rows
        for of_all in (
            cost.batching(decoder.config, np.float32, work, term, budget, "cpu", runs=2)
            for budget in budgets
        )
    ]
    assert rows[0] > 2 * rows[1]
    whole, small = (
        scan.scan_pair(decoder, UNEQUAL, question, ["neuron"], memory=memory) for memory in budgets
    )
    assert worst(small, whole) <= 1e-5


@pytest.mark.parametrize("family", tiny.costly_families())
def test_a_batch_leaves_the_prefix_unbatched(family):
    """Under `vmap` only scores have both the batch's and the prefix's length."""
    decoder, start, size, batch = tiny.decoder(family), 7, 3, 13
    # Shapes are all that is looked at: nothing is compiled.
    frame = jax.tree.map(
        lambda array: jnp.zeros(array.shape, array.dtype),
        jax.eval_shape(
            lambda d: capture.frame(d, capture.capture(d, UNEQUAL.prompt_ids), start, size, 32),
            decoder,
        ),
    )
    prefix_length = frame.prefix.positions.shape[0]
    block, traits = decoder.block(1), decoder.traits.at(1)
    prefix = propagate._at_layer(frame.prefix, 1)

    def attend(x):
        return block.attend(x, frame.span, traits, prefix, propagate._untapped)[0]

    change = jax.vmap(propagate.change_of(decoder, attend, frame.inputs[1]), 1, 1)
    of_both = 0
    for equation in jaxprs.equations(jax.make_jaxpr(change)(np.ones((size, batch, 24)))):
        for variable in (*equation.invars, *equation.outvars):
            shape = variable.aval.shape
            if batch in shape and {prefix_length, prefix_length + size} & set(shape):
                of_both += 1
                assert decoder.config.head_dim not in shape, (equation.primitive.name, shape)
    assert of_both


@pytest.mark.parametrize("precision", ["float32", "split2"])
@pytest.mark.parametrize("family", tiny.costly_families())
def test_no_product_of_the_base_run_is_in_the_loop_over_batches(family, precision):
    """Neither where differences are carried nor where they are read, of a few tokens or of all."""
    decoder = tiny.decoder(family).at_precision(precision)
    programs = [carry_jaxpr(decoder)] + [reading_jaxpr(decoder, name) for name in METRICS]
    for program in programs:
        inner = [
            loop
            for loop in jaxprs.equations(program)
            if loop.primitive.name == "while" and not any(jaxprs.loops(loop.params["body_jaxpr"]))
        ]
        products = [
            operands
            for loop in inner
            for equation, operands in jaxprs.followed(loop)
            if equation.primitive.name == "dot_general"
        ]
        assert products
        assert all(map(any, products))


def frame_shapes(decoder, size):
    """Of a run of 8 tokens, cut before the last `size`."""
    return jax.eval_shape(
        lambda d: capture.frame(d, capture.capture(d, tuple(range(8))), 8 - size, size, 32), decoder
    )


def reading_jaxpr(decoder, metric, size=4, batches=2, rows=3):
    """What reads a metric, from shapes."""
    metric = METRICS[metric]
    (term,) = cost.runs(decoder.config, UNEQUAL, question_lib.Question(metric))
    shape = batches, size, rows, decoder.config.hidden_size
    return jax.make_jaxpr(
        lambda *given: propagate.read_changes(*given, 0, metric, term.whole_vocabulary)
    )(
        decoder,
        frame_shapes(decoder, size),
        jax.ShapeDtypeStruct((batches, rows), jnp.int32),
        jax.ShapeDtypeStruct(shape, decoder.compute_dtype),
        term.reading,
    )


def carry_jaxpr(decoder, size=2, batches=2, rows=3):
    """What carries differences, from shapes."""
    shape = batches, size, rows, decoder.config.hidden_size
    return jax.make_jaxpr(propagate.carry, static_argnums=4)(
        decoder,
        frame_shapes(decoder, size),
        jax.ShapeDtypeStruct((batches, rows), jnp.int32),
        jax.ShapeDtypeStruct(shape, decoder.compute_dtype),
        decoder.config.num_layers,
    )


def test_the_last_block_is_run_where_its_output_is_read():
    """Of a span of 5 positions, one of which is read, all have keys and values and nothing else."""
    decoder = tiny.decoder("llama")
    keys = decoder.config.num_kv_heads * decoder.config.head_dim
    of_weights = [
        equation
        for loop in jaxprs.loops(reading_jaxpr(decoder, "logit", size=5))
        for equation in jaxprs.equations(loop.params["body_jaxpr"])
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2
    ]
    shapes = [equation.outvars[0].aval.shape for equation in of_weights]
    # A norm's means may be products with one column.
    shapes = [shape for shape in shapes if shape[-1] > 1]
    assert [shape[-1] for shape in shapes if 5 in shape] == [keys, keys]
    # Queries, the output, gate, up and down; and the logits.
    assert len(shapes) >= 2 + 5 + 1


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", products.PRECISIONS[1:])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_parts_weights_are_made_ready_outside_the_loop_over_batches(dtype, precision, platform):
    """Inside it every product with a weight takes bfloat16 numbers, and no weight is converted."""
    decoder = tiny.decoder("llama", dtype=dtype).at_precision(precision, platform)
    shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(decoder.blocks) if leaf.ndim == 3}
    loops = [
        inner.params["body_jaxpr"]
        for outer in jaxprs.equations(carry_jaxpr(decoder))
        if outer.primitive.name == "while"
        for inner in jaxprs.equations(outer.params["body_jaxpr"])
        if inner.primitive.name == "while"
    ]
    assert len(loops) == 1
    of_weights = 0
    for equation in (e for loop in loops for e in jaxprs.equations(loop)):
        shapes_in = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "convert_element_type":
            assert shapes_in[0][-2:] not in shapes
        if equation.primitive.name == "dot_general" and len(shapes_in[1]) == 2:
            if shapes_in[1][1] == 1:  # the mean of a norm
                continue
            of_weights += 1
            assert [v.aval.dtype.name for v in equation.invars] == ["bfloat16"] * 2
            assert equation.outvars[0].aval.dtype == jnp.float32
    # On a GPU one product along all parts; on a CPU one for each part of a weight.
    parts = {"bfloat16": 1, "split2": 2, "split3": 3}[precision]
    of_each = 1 if platform == "gpu" or dtype == "bfloat16" else parts
    assert of_weights == of_each * 7


# Of the largest effect: rounding of differences to so many bits, through three layers.
ERRORS = {"float32": 1e-5, "split3": 1e-5, "split2": 5e-5, "bfloat16": 3e-2}


@pytest.mark.parametrize("family", tiny.STRUCTURES)
@pytest.mark.parametrize("precision", products.PRECISIONS[1:])
def test_effects_are_as_exact_as_the_precision_says(precision, family):
    question = question_lib.Question(METRICS["logit"], Positions.DIFFERING)
    granularities = ["layer", "head", "neuron"]
    narrow = tiny.decoder(family, dtype="bfloat16")
    with jax.enable_x64(True):
        reference = define(presets.in_float64(narrow), UNEQUAL, question, granularities)
    found = scan.scan_pair(narrow.at_precision(precision), UNEQUAL, question, granularities)
    assert worst(found, reference) <= ERRORS[precision]
    same = dataclasses.replace(UNEQUAL, counterfactual_ids=UNEQUAL.prompt_ids)
    nothing = scan.scan_pair(narrow.at_precision(precision), same, question, granularities)
    assert largest(nothing) == 0


def test_too_little_memory_is_refused_with_what_is_needed():
    question = question_lib.Question(METRICS["logit"])
    with pytest.raises(InputError, match="too little for a single unit.*--memory_gb"):
        scan.scan_pair(tiny.decoder("llama"), UNEQUAL, question, ["neuron"], memory=1000)


@pytest.mark.parametrize(
    "metric, granularity, group_size",
    [("logit", "neuron", 1), ("response", "neuron", 128), ("logit", "head", 1)],
)
def test_a_batch_takes_no_more_memory_than_planned(metric, granularity, group_size):
    """What XLA allocates for the compiled functions, which does not grow with the units."""
    decoder = tiny.decoder("llama", hidden_size=96, intermediate_size=384, head_dim=64)
    question = question_lib.Question(METRICS[metric], Positions.PROMPT, group_size=group_size)
    (term,) = cost.runs(decoder.config, UNEQUAL, question)
    (work,) = plan.plan(decoder.config, UNEQUAL, term, question, [granularity], False)
    memory = 32 * 2**20
    together, batches, rows = cost.batching(
        decoder.config, np.float32, work, term, memory, "cpu", runs=2
    )
    captured = runs.captured(decoder, [UNEQUAL], question)
    which, starts = np.zeros(together, np.int32), np.full(together, work.start, np.int32)
    frames = runs.frames(decoder, captured.traces, which, starts, work.size, 0)
    differences = jax.ShapeDtypeStruct((together, batches, work.size, rows, 96), np.float32)
    stages = jax.ShapeDtypeStruct((batches, rows), np.int32)
    positions = jax.ShapeDtypeStruct((together, batches, rows), np.int32)
    change = getattr(captured.traces, work.site.value)[which, :, : work.size]
    compiled = [
        runs.enter.lower(
            *(decoder, change, None, stages, stages, positions, work.site, group_size)
        ),
        runs.carry.lower(decoder, frames, stages, differences, 2),
        runs.read_changes.lower(
            *(decoder, frames, stages, differences),
            *(runs.stacked([term.reading] * together), which + 11),
            *(question.metric, term.whole_vocabulary),
        ),
    ]
    for function in compiled:
        usage = function.compile().memory_analysis()
        taken = usage.temp_size_in_bytes + usage.output_size_in_bytes + differences.size * 4
        assert taken <= memory


def test_only_the_chosen_units_are_computed():
    decoder = tiny.decoder("llama")
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)
    names = ["neuron", "module"]
    chosen = {"neuron": np.random.default_rng(0).random((3, 40)) < 0.2}
    everything = scan.scan_pair(decoder, UNEQUAL, question, names)
    found = scan.scan_pair(decoder, UNEQUAL, question, names, chosen=chosen)
    for some, whole in ((found.nie, everything.nie), (found.tie, everything.tie)):
        np.testing.assert_array_equal(np.isnan(some["neuron"]), ~chosen["neuron"])
        got, want = some["neuron"][chosen["neuron"]], whole["neuron"][chosen["neuron"]]
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(whole["neuron"]).max(), rtol=0)
        np.testing.assert_array_equal(some["module"], whole["module"])
    operations = [
        cost.operations(decoder.config, UNEQUAL, question, ["neuron"], which)
        for which in (None, chosen)
    ]
    assert 0 < operations[1] < operations[0]


def test_a_joint_set_of_one_neuron_is_that_neuron():
    decoder = tiny.decoder("llama")
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)
    single = scan.scan_pair(decoder, UNEQUAL, question, ["neuron", "module"])
    sets = np.zeros((3, 3, 40), bool)
    sets[0, 1, 5] = sets[1, 2, 30] = True
    sets[2, 1] = True
    joint = joint_lib.joint_pair(decoder, UNEQUAL, question, sets)
    for side in ("nie", "tie"):
        got, one = getattr(joint, side)["joint"], getattr(single, side)
        # All neurons of a layer are its MLP, which has no bias after them.
        want = [one["neuron"][1, 5], one["neuron"][2, 30], one["module"][1, 1]]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-4)


@pytest.mark.parametrize("family", tiny.costly_families())
def test_joint_sets_are_whole_runs_with_edits_in_several_layers(family):
    """A later neuron of a set has the other run's value, whatever the earlier ones do to it."""
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        layers, neurons = decoder.config.num_layers, decoder.config.intermediate_size
        sets = np.random.default_rng(0).random((6, layers, neurons)) < 0.3
        sets[1, 0], sets[2, 1:], sets[3] = False, False, False
        sets[4] = True
        sets[5, 0, 3] = sets[5, -1, 7] = True
        found = joint_lib.joint_pair(decoder, UNEQUAL, question, sets)
        prompts = UNEQUAL.prompt_ids, UNEQUAL.counterfactual_ids
        paired = min(map(len, prompts))

        @jax.jit
        def y(tokens, values, members):
            place = np.arange(len(tokens)) - (len(tokens) - paired)
            edits = [
                Edit.patch("neuron", layer, place >= 0, values[layer][place], members[layer])
                for layer in range(layers)
            ]
            logits = decoder(tokens, edits=edits)[0][-1]
            return logits[UNEQUAL.harmful_ids[0]] - logits[UNEQUAL.safe_ids[0]]

        for base, source, got, sign in (
            (*prompts, found.nie["joint"], 1),
            (*prompts[::-1], found.tie["joint"], -1),
        ):
            values = decoder(np.array(source))[1].neuron[:, -paired:]
            tokens = np.array(base)
            plain = y(tokens, values, np.zeros_like(sets[0]))
            want = sign * np.array([y(tokens, values, members) - plain for members in sets])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())
            assert got[3] == 0 and np.abs(want[[0, 1, 2, 4, 5]]).min() > 0


def test_joint_sets_of_equal_prompts_do_nothing():
    decoder = tiny.decoder("llama")
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)
    same = dataclasses.replace(UNEQUAL, counterfactual_ids=UNEQUAL.prompt_ids)
    found = joint_lib.joint_pair(decoder, same, question, np.ones((2, 3, 40), bool))
    assert not found.nie["joint"].any() and not found.tie["joint"].any()


def test_few_joint_sets_take_small_batches(monkeypatch):
    """Which neurons they have is held for every row of a chunk, and a batch has no empty rows for
    nothing."""
    decoder, question = tiny.decoder("llama"), question_lib.Question(METRICS["logit"])
    forced, rows = propagate.Forced, []

    def watched(change, edited, members):
        rows.append(members.shape[1])
        return forced(change, edited, members)

    monkeypatch.setattr(propagate, "Forced", watched)
    joint_lib.joint_pair(decoder, UNEQUAL, question, np.ones((2, 3, 40), bool))
    assert max(rows) <= 64 < cost.positions_together("cpu")


def test_two_compilations_serve_all_layers_and_granularities():
    """One for batches of many units, one for batches of few."""
    # Another vocabulary than that of any other test, so that nothing is compiled yet.
    decoder = tiny.decoder("llama", vocab_size=67)
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)
    before = runs.carry._cache_size()
    scan.scan_pair(decoder, pair(12, 12), question, ["layer", "module", "head", "neuron"])
    assert runs.carry._cache_size() <= before + 2
    scan.scan_pair(decoder, pair(11, 11, seed=1), question, ["layer", "module", "head", "neuron"])
    assert runs.carry._cache_size() <= before + 2


def test_an_embedding_edit_goes_through_the_engine():
    """No granularity has the embedding as its site, but the engine takes it as any other."""
    question = question_lib.Question(METRICS["logit"])
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        (term,) = cost.runs(decoder.config, UNEQUAL, question)
        base, source = (
            capture.capture(decoder, ids)
            for ids in (UNEQUAL.prompt_ids, UNEQUAL.counterfactual_ids)
        )
        rows = np.arange(16)
        # Each of the base prompt's positions 4 and 9 takes the embedding that stands one before.
        change = capture.site_difference(
            base, source, Site.EMBEDDING, rows, rows - 1, np.isin(rows, (4, 9))
        )
        units = plan.Units.grid(1, positions=(4, 9))
        places = (array[None] for array in (units.layers, units.units, units.positions))
        entering = propagate.enter(decoder, change, None, *places, Site.EMBEDDING, 1)
        frame = capture.frame(decoder, base, 0, 16, 0)
        stages = plan.stage(decoder.config, Site.EMBEDDING, units.layers)
        blocks = propagate.blocks_to_carry(decoder.config, 16, term.reading)
        carried = propagate.carry(decoder, frame, stages[None], entering, blocks)
        found = propagate.read_changes(
            *(decoder, frame, stages[None], carried, term.reading, 11),
            *(question.metric, term.whole_vocabulary),
        )[0]
        tokens = np.array(UNEQUAL.prompt_ids)

        def value(*edits):
            logits = decoder(tokens, edits=list(edits))[0]
            return logits[-1, UNEQUAL.harmful_ids[0]] - logits[-1, UNEQUAL.safe_ids[0]]

        for position, got in zip((4, 9), found, strict=True):
            moved = source.embedding[position - 1]
            edit = Edit.patch(Site.EMBEDDING, 0, np.arange(12) == position, moved)
            want = value(edit) - value()
            assert abs(got - want) <= 1e-12 * abs(want)


def test_massive_activations_are_patched_away_exactly():
    """As at a real model's first token: one channel holds a value far above all others, and a
    prompt of another length pairs it with an ordinary token."""
    unequal = pair(12, 10)
    question = question_lib.Question(METRICS["logit"], Positions.PROMPT)

    def with_massive_channel(dtype):
        decoder = tiny.decoder("llama", dtype=dtype)
        table = decoder.embedding[...]
        decoder.embedding[...] = table.at[unequal.prompt_ids[2], 5].set(300.0)
        return decoder

    with jax.enable_x64(True):
        decoder = with_massive_channel("float64")
        reference = define(decoder, unequal, question, GRANULARITIES)
        double = scan.scan_pair(decoder, unequal, question, GRANULARITIES)
    assert worst(double, reference) <= 1e-12
    single = scan.scan_pair(with_massive_channel("float32"), unequal, question, GRANULARITIES)
    assert worst(single, reference) <= 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_ids": (1, 2, 99)}, "token id 99 of prompt_ids is outside the vocabulary of 61"),
        ({"harmful_ids": (61,)}, "token id 61 of harmful_ids is outside"),
        ({"prompt_ids": (1,) * 65}, "has 65 tokens, and the model has 64 positions"),
        ({"counterfactual_ids": ()}, "has an empty counterfactual"),
        ({"safe_ids": (6,)}, "the same first token"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_before_any_work(changes, message):
    bad = dataclasses.replace(UNEQUAL, where="pairs.jsonl:7", **changes)
    with pytest.raises(reading.DataError, match=rf"pairs\.jsonl:7: .*{message}"):
        jaxmed.scan(tiny.decoder("llama"), [UNEQUAL, bad])


def test_positions_after_all_that_is_read_are_refused():
    """Every effect would be 0, and look like a finding."""
    question = question_lib.Question(
        metrics.ResponseLogprobDifference("decision"), Positions.RESPONSE
    )
    with pytest.raises(reading.DataError, match="reads nothing at or after"):
        scan.scan_pair(tiny.decoder("llama"), UNEQUAL, question, ["layer"])
