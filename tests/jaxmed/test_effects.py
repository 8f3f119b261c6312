"""The engine against the plain definition, at every site and choice of positions."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxmed import capture, data, definition, effects, metrics, planning
from jaxmed.alignment import Align, Positions
from models.edits import Edit, Site
from models.errors import InputError
from tests import tiny

GRANULARITIES = tuple(planning.SITES)
METRICS = {
    "logit": metrics.LogitDifference(),
    "sets": metrics.LogitDifference((1, 2, 3), (4, 5)),
    "response": metrics.ResponseLogprobDifference(),
}


def pair(base, source, harmful=2, safe=3, seed=0):
    """A random pair of the given numbers of tokens; its prompts end in the same two tokens."""
    generator = np.random.default_rng(seed)

    def draw(length):
        return tuple(generator.integers(8, 61, length).tolist())

    suffix = draw(2)
    return data.Pair(
        f"{base}-{source}",
        draw(base - 2) + suffix,
        draw(source - 2) + suffix,
        (6, *draw(harmful - 1)),
        (7, *draw(safe - 1)),
    )


# Unequal prompts whose four runs with responses have few lengths: 12 and 11 tokens, with 2 and 3.
UNEQUAL = pair(12, 11)


def largest(found):
    sides = itertools.chain(found.nie.values(), found.tie.values())
    return max(np.nanmax(np.abs(side)) for side in sides)


def worst(found, reference):
    """Largest error of any unit, of the pair's largest effect."""
    errors = []
    for side, name in itertools.product(("nie", "tie"), reference.nie):
        got, want = getattr(found, side)[name], getattr(reference, side)[name]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        errors.append(np.nanmax(np.abs(got - want)))
    return max(errors) / largest(reference)


def in_float32(decoder):
    return tiny.decoder(decoder.config.family, dtype="float32")


CASES = [
    ("llama", "logit", "last"),
    ("llama", "logit", "differing"),
    ("llama", "logit", "prompt"),
    ("llama", "response", "last"),
    ("llama", "response", "differing"),
    ("llama", "response", "prompt"),
    ("llama", "response", "response"),
    ("qwen2", "sets", "prompt"),
    ("qwen2", "response", "response"),
]


@pytest.mark.parametrize("family, metric, positions", CASES)
def test_the_engine_gives_the_plain_definition(family, metric, positions):
    question = planning.Question(METRICS[metric], Positions(positions))
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        reference = definition.define_pair(decoder, UNEQUAL, question, GRANULARITIES)
        assert largest(reference) > 1e-2
        double = effects.scan_pair(decoder, UNEQUAL, question, GRANULARITIES)
    assert worst(double, reference) <= 1e-12
    single = effects.scan_pair(in_float32(decoder), UNEQUAL, question, GRANULARITIES)
    assert worst(single, reference) <= 1e-5
    assert abs(single.y_base - reference.y_base) < 1e-5 * max(1, abs(reference.y_base))


def test_groups_of_neurons_and_other_alignments_give_the_plain_definition():
    spans = dataclasses.replace(UNEQUAL, prompt_span=(3, 7), counterfactual_span=(2, 6))
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        for align, group_size in ((Align.START, 7), (Align.SPAN, 16)):
            question = planning.Question(METRICS["logit"], Positions.PROMPT, align, group_size)
            names = ("neuron", "module")
            reference = definition.define_pair(decoder, spans, question, names)
            found = effects.scan_pair(decoder, spans, question, names)
            assert found.nie["neuron"].shape == (3, -(-40 // group_size))
            assert worst(found, reference) <= 1e-12


def test_the_definition_is_an_explicit_patch():
    """One unit of each direction, patched by hand."""
    question = planning.Question(METRICS["logit"], Positions.PROMPT)
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        found = definition.define_pair(decoder, UNEQUAL, question, ["neuron", "head", "token"])
        base, source = np.array(UNEQUAL.prompt_ids), np.array(UNEQUAL.counterfactual_ids)

        def value(tokens, *edits):
            logits = decoder(tokens, edits=list(edits))[0]
            return float(logits[-1, UNEQUAL.harmful_ids[0]] - logits[-1, UNEQUAL.safe_ids[0]])

        base_trace, source_trace = decoder(base)[1], decoder(source)[1]
        # The last 11 of 12 positions correspond.
        aligned = np.arange(12) >= 1
        moved = np.concatenate([np.zeros((1, 40)), source_trace.neuron[1]])
        edit = Edit.patch("neuron", 1, aligned, moved, np.arange(40) == 17)
        assert found.nie["neuron"][1, 17] == pytest.approx(value(base, edit) - value(base))
        edit = Edit.patch("head", 2, np.ones(11, bool), base_trace.head[2, 1:], np.arange(4) == 3)
        assert found.tie["head"][2, 3] == pytest.approx(value(source) - value(source, edit))
        at = np.arange(12) == 12 - 1 - 4
        moved = np.concatenate([np.zeros((1, 24)), source_trace.mlp[0]])
        edit = Edit.patch("mlp", 0, at, moved)
        assert found.nie["token"][0, 2, 4] == pytest.approx(value(base, edit) - value(base))
        assert found.y_base == pytest.approx(value(base))
        assert found.y_source == pytest.approx(value(source))


def test_the_last_layer_of_a_layer_scan_is_consistent_with_the_total_effect():
    """Patching the last block's output at the last position is the total effect by definition."""
    found = effects.scan_pair(
        tiny.decoder("llama"), UNEQUAL, planning.Question(METRICS["logit"]), ["token"]
    )
    te = found.y_source - found.y_base
    assert found.nie["token"][-1, 0, 0] == pytest.approx(te, rel=1e-4)
    assert found.tie["token"][-1, 0, 0] == pytest.approx(te, rel=1e-4)


@pytest.mark.parametrize("positions", list(Positions))
def test_identical_prompts_have_no_effect_at_all(positions):
    metric = METRICS["response"]
    same = dataclasses.replace(UNEQUAL, counterfactual_ids=UNEQUAL.prompt_ids)
    question = planning.Question(metric, positions)
    found = effects.scan_pair(tiny.decoder("qwen2"), same, question, GRANULARITIES)
    for side, name in itertools.product((found.nie, found.tie), GRANULARITIES):
        assert np.all(side[name] == 0.0)
    assert found.y_base == found.y_source


def test_a_pair_alone_is_the_pair_among_others():
    decoder = tiny.decoder("qwen2")
    generator = np.random.default_rng(1)
    others = [
        pair(*(int(n) for n in generator.integers(4, 24, 2)), seed=seed) for seed in range(20)
    ]
    pairs = [dataclasses.replace(other, id=str(index)) for index, other in enumerate(others)]
    alone = effects.scan(decoder, [UNEQUAL], "neuron", METRICS["logit"], positions="prompt")
    among = effects.scan(
        decoder, [*pairs[:10], UNEQUAL, *pairs[10:]], "neuron", METRICS["logit"], positions="prompt"
    )
    scale = max(np.abs(alone.nie).max(), np.abs(alone.tie).max())
    assert np.abs(among.nie[10] - alone.nie[0]).max() <= 1e-5 * scale
    assert np.abs(among.tie[10] - alone.tie[0]).max() <= 1e-5 * scale
    assert among.nie.shape == (21, 3, 40)
    assert among.nie.dtype == np.float32


def test_a_smaller_batch_changes_nothing_but_rounding():
    decoder = tiny.decoder("qwen2")
    question = planning.Question(METRICS["logit"], Positions.PROMPT)
    whole, small = (
        effects.scan_pair(decoder, UNEQUAL, question, ["neuron"], memory_gb=memory)
        for memory in (1.0, 4e-4)
    )
    work = planning.plan(
        decoder.config, UNEQUAL, METRICS["logit"].terms(UNEQUAL)[0], question, ["neuron"], False
    )[0]
    term = METRICS["logit"].terms(UNEQUAL)[0]
    assert planning.batch_size(decoder.config, work, term, 120, 4e-4) < 120 / 3
    assert worst(small, whole) <= 1e-5


def test_a_joint_set_of_one_neuron_is_that_neuron():
    decoder = tiny.decoder("llama")
    question = planning.Question(METRICS["logit"], Positions.PROMPT)
    single = effects.scan_pair(decoder, UNEQUAL, question, ["neuron", "module"])
    sets = np.zeros((3, 3, 40), bool)
    sets[0, 1, 5] = sets[1, 2, 30] = True
    sets[2, 1] = True
    joint = definition.joint_pair(decoder, UNEQUAL, question, sets)
    for side in ("nie", "tie"):
        got, one = getattr(joint, side)["joint"], getattr(single, side)
        # All neurons of a layer are its MLP, which has no bias after them.
        want = [one["neuron"][1, 5], one["neuron"][2, 30], one["module"][1, 1]]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-4)


def test_one_compilation_serves_all_layers_and_granularities():
    # Another vocabulary than that of any other test, so that nothing is compiled yet.
    decoder = tiny.decoder("llama", vocab_size=67)
    question = planning.Question(METRICS["logit"], Positions.PROMPT)
    before = effects.carry._cache_size()
    effects.scan_pair(decoder, pair(12, 12), question, ["layer", "module", "head", "neuron"])
    assert effects.carry._cache_size() == before + 1
    effects.scan_pair(
        decoder, pair(14, 14, seed=1), question, ["layer", "module", "head", "neuron"]
    )
    assert effects.carry._cache_size() == before + 1


def test_an_embedding_edit_goes_through_the_engine():
    """No granularity has the embedding as its site, but the engine takes it as any other."""
    question = planning.Question(METRICS["logit"])
    term = METRICS["logit"].terms(UNEQUAL)[0]
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        base, source = (
            capture.capture(decoder, ids)
            for ids in (UNEQUAL.prompt_ids, UNEQUAL.counterfactual_ids)
        )
        rows = np.arange(16)
        # Each of the base prompt's positions 4 and 9 takes the embedding that stands one before.
        change = capture.site_difference(
            base, source, Site.EMBEDDING, rows, rows - 1, np.isin(rows, (4, 9))
        )
        units = planning.Units.grid(1, positions=(4, 9))
        entering = effects.enter(
            decoder, change, units.layers, units.units, units.positions, Site.EMBEDDING, 1
        )
        found = effects.carry(
            decoder,
            capture.frame(decoder, base, 0, 16),
            planning.stage(Site.EMBEDDING, units.layers),
            entering,
            term.reading,
            11,
            question.metric,
        )
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
    question = planning.Question(METRICS["logit"], Positions.PROMPT)

    def with_massive_channel(dtype):
        decoder = tiny.decoder("llama", dtype=dtype)
        table = decoder.embedding[...]
        decoder.embedding[...] = table.at[unequal.prompt_ids[2], 5].set(300.0)
        return decoder

    with jax.enable_x64(True):
        decoder = with_massive_channel("float64")
        reference = definition.define_pair(decoder, unequal, question, GRANULARITIES)
        double = effects.scan_pair(decoder, unequal, question, GRANULARITIES)
    assert worst(double, reference) <= 1e-12
    single = effects.scan_pair(with_massive_channel("float32"), unequal, question, GRANULARITIES)
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
    with pytest.raises(data.DataError, match=rf"pairs\.jsonl:7: .*{message}"):
        effects.scan(tiny.decoder("llama"), [UNEQUAL, bad])


def test_positions_after_all_that_is_read_are_refused():
    """Every effect would be 0, and look like a finding."""
    question = planning.Question(metrics.ResponseLogprobDifference("decision"), Positions.RESPONSE)
    with pytest.raises(data.DataError, match="reads nothing at or after"):
        effects.scan_pair(tiny.decoder("llama"), UNEQUAL, question, ["layer"])


def test_an_unknown_granularity_is_refused():
    with pytest.raises(InputError, match="'neurons' is not one of layer, module"):
        effects.scan(tiny.decoder("llama"), [UNEQUAL], "neurons")
