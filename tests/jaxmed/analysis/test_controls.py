"""Controls against their plain definitions: traces and explicit steering, in float64."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from scipy import special, stats

import jaxmed
from jaxmed.analysis import controls
from jaxmed.engine import propagate, scan
from jaxmed.question import metrics
from jaxmed.question import question as question_lib
from jaxmed.question.positions import Positions
from models.edits import Edit
from models.sites import Site
from tests import tiny
from tests.jaxmed import scans

LOGIT = metrics.LogitDifference()
RESPONSE = metrics.ResponseLogprobDifference()
SITES = {
    "layer": ("layer",),
    "module": ("attention", "mlp"),
    "head": ("head",),
    "neuron": ("neuron",),
}
LENGTH = 16  # of all runs of the references, padded: tokens see nothing that follows them
BATCH = 120  # of all batches of the references, so that they compile once


def altered(unequal):
    """12 tokens, and the same without the first `unequal` of them and with tokens 5 to 8 changed:
    aligned at the end, they differ first at token 5."""
    pair = scans.pair(12, 12)
    ids = np.array(pair.prompt_ids)
    ids[5:9] = (ids[5:9] - 8 + 17) % 53 + 8
    return dataclasses.replace(pair, counterfactual_ids=tuple(ids[unequal:].tolist()))


ALTERED = {"equal": altered(0), "unequal": altered(1)}
PAIRS = [scans.UNEQUAL, scans.pair(11, 12, seed=1), scans.pair(12, 12, seed=2)]
HEADS = np.ones((3, 4), bool)


@functools.cache
def model(family):
    """Made once, in float64: call where that is enabled."""
    return tiny.decoder(family, dtype="float64")


@jax.jit
def _trace(decoder, tokens):
    return decoder(tokens)[1]


def trace(decoder, ids):
    """Every site's value in a plain run, as numpy arrays."""
    found = vars(_trace(decoder, np.pad(ids, (0, LENGTH))[:LENGTH]))
    return types.SimpleNamespace(**{name: np.asarray(value) for name, value in found.items()})


# Differences of activations


def first_differing(pair):
    """How many tokens before the end the aligned prompts differ first."""
    common = min(len(pair.prompt_ids), len(pair.counterfactual_ids))
    return max(
        back
        for back in range(1, common + 1)
        if pair.prompt_ids[-back] != pair.counterfactual_ids[-back]
    )


def plain_difference(decoder, pair, question, granularity):
    """sum over runs and positions of |a' - a|, unit by unit."""
    prompts = pair.prompt_ids, pair.counterfactual_ids
    total = 0.0
    for response in [()] if question.metric is LOGIT else [pair.harmful_ids, pair.safe_ids]:
        runs = [trace(decoder, prompt + response) for prompt in prompts]
        # Positions are counted from the prompts' ends, where they are aligned.
        offsets = {
            "last": lambda _: range(-1, 0),
            "prompt": lambda _: range(-min(map(len, prompts)), 0),
            "differing": lambda _: range(-first_differing(pair), 0),
            "response": lambda response: range(len(response)),
        }[question.positions](response)
        for offset in offsets:
            base, source = (
                [getattr(run, site)[:, len(prompt) + offset] for site in SITES[granularity]]
                for run, prompt in zip(runs, prompts, strict=True)
            )
            change = np.array(source) - base
            if granularity != "neuron":
                change = np.sqrt(np.sum(change**2, axis=-1))
            change = np.abs(change)
            total = total + (change.T if granularity == "module" else change[0])
    return total


SHAPES = {"layer": (3,), "module": (3, 2), "head": (3, 4), "neuron": (3, 40)}


@pytest.mark.parametrize("lengths", ALTERED)
@pytest.mark.parametrize(
    "metric, positions",
    [
        (LOGIT, "last"),
        (LOGIT, "prompt"),
        (LOGIT, "differing"),
        (RESPONSE, "differing"),
        (RESPONSE, "response"),
    ],
)
def test_differences_of_activations_are_those_of_plain_traces(lengths, metric, positions):
    pair, question = ALTERED[lengths], question_lib.Question(metric, Positions(positions))
    assert first_differing(pair) == 7
    with jax.enable_x64(True):
        decoder = model("qwen2")
        for granularity, shape in SHAPES.items():
            expected = plain_difference(decoder, pair, question, granularity)
            found = controls.activation_difference(decoder, pair, question, granularity)
            assert found.shape == expected.shape == shape
            assert expected.max() > 1e-2
            np.testing.assert_allclose(found, expected, atol=1e-12 * expected.max(), rtol=0)


@pytest.mark.parametrize("positions", ["last", "prompt", "differing"])
def test_identical_prompts_do_not_differ_at_all(positions):
    same = dataclasses.replace(scans.UNEQUAL, counterfactual_ids=scans.UNEQUAL.prompt_ids)
    question = question_lib.Question(RESPONSE, Positions(positions))
    with jax.enable_x64(True):
        for granularity, shape in SHAPES.items():
            found = controls.activation_difference(model("qwen2"), same, question, granularity)
            np.testing.assert_array_equal(found, np.zeros(shape))


# Rotations


def written(decoder, base, change, granularity):
    """D: what each unit's edit adds to the residual stream, [L, U, T, d]."""
    if granularity == "layer":
        return change["layer"][:, None]
    if granularity == "module":
        return np.stack([change["attention"], change["mlp"]], axis=1)
    blocks, layers = decoder.blocks, decoder.config.num_layers
    if granularity == "head":
        kernel = np.asarray(blocks.attention.output.kernel[...]).reshape(layers, 4, 8, -1)
        added = np.einsum("lthk,lhkd->lhtd", change["head"], kernel)
        plain = np.einsum("lthk,lhkd->ltd", base.head, kernel)
        norm = blocks.attention_post_norm
    else:
        kernel = np.asarray(blocks.mlp.down.kernel[...])
        added = np.einsum("lti,lid->litd", change["neuron"], kernel)
        plain = np.einsum("lti,lid->ltd", base.neuron, kernel)
        norm = blocks.mlp_post_norm
    if norm is None:
        return added
    scale = decoder.config.norm_offset + np.asarray(norm.weight[...])[:, None, None]

    def normed(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + decoder.config.norm_eps) * scale

    return normed(plain[:, None] + added) - normed(plain[:, None])


STEERED = (Site.LAYER, Site.ATTENTION, Site.MLP)


@jax.jit
def _steered(decoder, tokens, layers, sites, positions, shifts):
    """Logits of runs in each of which a shift is added to one of the `STEERED` sites."""

    def run(layer, site, shift):
        edits = [
            Edit.steer(of, layer, positions & (site == number), shift)
            for number, of in enumerate(STEERED)
        ]
        return decoder(tokens, edits=edits)[0]

    return jax.vmap(run)(layers, sites, shifts)


def values(decoder, pair, prompt, response, where, shifts):
    """What the metric's term reads of runs with the given shifts."""
    layers, sites, positions = where
    count = len(layers)
    layers, sites, shifts = (
        np.pad(array, [(0, BATCH - count)] + [(0, 0)] * (array.ndim - 1))
        for array in (layers, sites, shifts)
    )
    tokens = np.pad(prompt + response, (0, LENGTH))[:LENGTH]
    logits = np.asarray(_steered(decoder, tokens, layers, sites, positions, shifts))
    logits = logits[:count, len(prompt) - 1 :]
    if not response:
        return logits[:, 0, pair.harmful_ids[0]] - logits[:, 0, pair.safe_ids[0]]
    log_p = special.log_softmax(logits, axis=-1)
    return np.mean([log_p[:, n, t] for n, t in enumerate(response)], axis=0)


def plain_effects(decoder, pair, question, granularity, rotations):
    """NIE and TIE with D @ rotation in the place of D, [2, draw, L, U]."""
    responses = [((), 1)]
    if question.metric is RESPONSE:
        responses = [(pair.harmful_ids, 1), (pair.safe_ids, -1)]
    prompts = pair.prompt_ids, pair.counterfactual_ids
    back = {"prompt": min(map(len, prompts)), "differing": first_differing(pair)}
    back = back[question.positions]
    total = 0.0
    for response, sign in responses:
        sides = []
        for base_prompt, source_prompt in (prompts, prompts[::-1]):
            base, source = (trace(decoder, p + response) for p in (base_prompt, source_prompt))
            start, source_start = len(base_prompt) - back, len(source_prompt) - back
            positions = np.isin(np.arange(LENGTH), start + np.arange(back))
            change = {}
            for site in ("layer", "attention", "mlp", "head", "neuron"):
                before, after = getattr(base, site), getattr(source, site)
                change[site] = np.zeros_like(before)
                change[site][:, positions] = (
                    after[:, source_start : source_start + back] - before[:, positions]
                )
            added = written(decoder, base, change, granularity)
            layers, units = (index.reshape(-1) for index in np.indices(added.shape[:2]))
            sites = {"layer": 0 * units, "module": 1 + units, "head": 1 + 0 * units}
            where = layers, sites.get(granularity, 2 + 0 * units), positions
            added = added.reshape(-1, *added.shape[2:])
            run = functools.partial(values, decoder, pair, base_prompt, response, where)
            sides.append([run(added @ rotation) - run(0 * added) for rotation in rotations])
        # TIE is what the patch into the source run takes away.
        total = total + sign * np.stack([sides[0], -np.array(sides[1])])
    return total.reshape(*total.shape[:2], *SHAPES[granularity])


def plain_strengths(decoder, pairs, question, granularity, rotations):
    """max(|mean NIE|, |mean TIE|) over the pairs, [draw, L, U]."""
    found = [plain_effects(decoder, pair, question, granularity, rotations) for pair in pairs]
    return np.abs(np.mean(found, axis=0)).max(axis=0)


def rotations(draws, seed):
    return stats.special_ortho_group.rvs(24, size=draws, random_state=seed).reshape(draws, 24, 24)


def chosen_units(granularity):
    """All units, but some only of the neurons: so few that the heads' compilation serves them."""
    shape = SHAPES[granularity]
    if granularity == "neuron":
        return np.arange(120).reshape(shape) % 11 == 4
    return np.ones(shape, bool)


PROMPT = question_lib.Question(LOGIT, Positions.PROMPT)


@pytest.mark.parametrize(
    "family, granularity, question",
    [
        ("qwen2", "layer", PROMPT),
        ("qwen2", "module", PROMPT),
        ("qwen2", "head", PROMPT),
        ("qwen2", "neuron", PROMPT),
        ("qwen2", "head", question_lib.Question(RESPONSE, Positions.DIFFERING)),
        ("gemma2", "head", PROMPT),
        ("gemma2", "neuron", PROMPT),
    ],
)
def test_a_control_is_what_the_rotated_edit_does(family, granularity, question):
    chosen = chosen_units(granularity)
    with jax.enable_x64(True):
        decoder = model(family)
        expected = plain_strengths(decoder, PAIRS, question, granularity, rotations(2, 7))
        found = controls.rotated_strengths(
            decoder, PAIRS, question, granularity, chosen, draws=2, seed=7
        )
    assert expected.max() > 1e-3
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(~chosen, found.shape))
    error = np.abs(found - expected)[:, chosen].max()
    assert error <= 1e-10 * expected.max()


def test_the_mean_over_pairs_comes_before_the_absolute_value():
    with jax.enable_x64(True):
        together, *alone = (
            controls.rotated_strengths(model("qwen2"), pairs, PROMPT, "head", HEADS, draws=1)
            for pairs in (PAIRS, *([pair] for pair in PAIRS))
        )
    assert np.all(together < np.mean(alone, axis=0) * (1 + 1e-12))
    assert np.any(together < 0.5 * np.mean(alone, axis=0))


def test_a_rotation_keeps_the_size_of_what_is_added(monkeypatch):
    """And the angles between positions; also where a norm follows the module."""
    entered = []

    def recorded(decoder, frame, stages, differences, *rest, carry=propagate.carry):
        # A copy: the buffer is reused for the result.
        rows = np.moveaxis(differences, 2, 1)
        entered.append(np.array(rows).reshape(-1, *rows.shape[2:]))
        return carry(decoder, frame, stages, differences, *rest)

    monkeypatch.setattr(propagate, "carry", recorded)
    rotation = rotations(1, 3)[0]
    with jax.enable_x64(True):
        for turn in (None, rotation):
            scan.scan_pair(
                *(model("gemma2"), PAIRS[0], PROMPT, ["neuron"]),
                chosen={"neuron": chosen_units("neuron")},
                rotation=turn,
            )
    half = len(entered) // 2
    for plain, turned in zip(entered[:half], entered[half:], strict=True):
        assert np.abs(plain).max() > 1e-3
        np.testing.assert_allclose(turned, plain @ rotation, atol=1e-14)
        inner = [np.einsum("utd,usd->uts", added, added) for added in (plain, turned)]
        np.testing.assert_allclose(*inner, atol=1e-13 * np.abs(inner[0]).max(), rtol=0)


def test_the_identity_in_place_of_the_rotation_gives_the_units_strengths(monkeypatch):
    asked = []

    def identities(width, size, random_state):
        asked.append((width, size, random_state))
        return np.broadcast_to(np.eye(width), (size, width, width))

    monkeypatch.setattr(stats.special_ortho_group, "rvs", identities)
    with jax.enable_x64(True):
        decoder = model("qwen2")
        plain = jaxmed.scan(decoder, PAIRS, "head", LOGIT, positions="prompt")["head"]
        found = controls.rotated_strengths(decoder, PAIRS, PROMPT, "head", HEADS, draws=2, seed=9)
    expected = np.maximum(np.abs(plain.nie.mean(axis=0)), np.abs(plain.tie.mean(axis=0)))
    assert asked == [(24, 2, 9)]
    # `scan` rounds effects to float32.
    np.testing.assert_allclose(found, [expected] * 2, atol=1e-6 * expected.max(), rtol=0)


def test_a_seed_gives_its_draws():
    with jax.enable_x64(True):
        decoder = model("qwen2")
        first, again, other = (
            controls.rotated_strengths(decoder, PAIRS[:1], PROMPT, "head", HEADS, draws=2, seed=s)
            for s in (4, 4, 5)
        )
        single = controls.rotated_strengths(decoder, PAIRS[:1], PROMPT, "head", HEADS, draws=1)
        default = controls.rotated_strengths(
            decoder, PAIRS[:1], PROMPT, "head", HEADS, draws=1, seed=0
        )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 0
    assert np.abs(first[0] - first[1]).min() > 0
    np.testing.assert_array_equal(single, default)


def test_where_nothing_is_chosen_nothing_is_run(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a run was made")

    monkeypatch.setattr(scan, "scan_pair", fail)
    found = controls.rotated_strengths(
        tiny.decoder("qwen2"), PAIRS, PROMPT, "head", np.zeros((3, 4), bool), draws=5
    )
    assert found.shape == (5, 3, 4) and np.isnan(found).all()


# Discoveries


def discovered(monkeypatch, strength, above, total_effect, **arguments):
    """Discoveries, with given controls; which units they were asked of."""
    asked = []

    def given(decoder, pairs, question, granularity, chosen, *, draws, seed, memory):
        asked.append((chosen, draws, seed))
        return np.where(chosen, above, np.nan)

    monkeypatch.setattr(controls, "rotated_strengths", given)
    found = controls.discoveries(
        tiny.decoder("qwen2"), [], PROMPT, "head", strength, total_effect, **arguments
    )
    assert found.dtype == bool and found.shape == strength.shape
    return found, *asked[0]


@pytest.mark.parametrize("total_effect", [100.0, -100.0])
def test_a_discovery_is_above_the_minimum_and_all_its_controls(monkeypatch, total_effect):
    strength = np.array([[0.5, 1.0, np.nextafter(1, 2), 5, 5, 5, np.nan]])
    above = np.zeros((3, *strength.shape))
    above[1, 0, 3:6] = 4.9, 5, 5.1
    found, chosen, draws, seed = discovered(
        monkeypatch, strength, above, total_effect, draws=3, seed=8
    )
    # At 1% of the total effect a unit is no candidate, and equal to a control it is not above it.
    np.testing.assert_array_equal(chosen, [[False, False, True, True, True, True, False]])
    np.testing.assert_array_equal(found, [[False, False, True, True, False, False, False]])
    assert (draws, seed) == (3, 8)


def test_without_candidates_there_are_no_discoveries(monkeypatch):
    strength = np.array([[0.5, np.nan, 0.0]])
    found, chosen, draws, seed = discovered(monkeypatch, strength, np.zeros((19, 1, 3)), 60.0)
    assert not chosen.any() and not found.any()
    assert (draws, seed) == (19, 0)


@pytest.mark.parametrize("draws", [4, 19])
def test_units_like_their_controls_are_found_at_the_stated_rate(monkeypatch, draws):
    generator = np.random.default_rng(0)
    values = np.abs(generator.standard_t(2, (draws + 1, 40, 1000)))
    found, *_ = discovered(monkeypatch, values[0], values[1:], 1e-9, draws=draws)
    expected = 1 / (draws + 1)
    deviation = np.sqrt(expected * (1 - expected) / found.size)
    assert abs(found.mean() - expected) <= 3 * deviation


def test_discoveries_of_a_model_are_held_against_its_rotations():
    with jax.enable_x64(True):
        decoder = model("qwen2")
        asked = decoder, PAIRS, PROMPT, "head"
        plain = jaxmed.scan(decoder, PAIRS, "head", LOGIT, positions="prompt")["head"]
        strength = np.maximum(np.abs(plain.nie.mean(axis=0)), np.abs(plain.tie.mean(axis=0)))
        # A total effect of which 1% is the median: half of the units are candidates.
        total = -100 * float(np.median(strength))
        above = controls.rotated_strengths(*asked, HEADS, draws=2, seed=2).max(axis=0)
        found = controls.discoveries(*asked, strength, total, draws=2, seed=2)
    expected = (strength > np.median(strength)) & (strength > above)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < 6


def test_controls_are_computed_as_precisely_as_effects(monkeypatch):
    """Both in bfloat16 products, if the effects were."""
    seen, scan_pair = [], scan.scan_pair

    def recorded(decoder, *arguments, **options):
        seen.append(decoder.products.precision)
        return scan_pair(decoder, *arguments, **options)

    monkeypatch.setattr(scan, "scan_pair", recorded)
    controls.discoveries(
        *(tiny.decoder("qwen2").at_precision("bfloat16"), [scans.UNEQUAL], PROMPT, "head"),
        *(np.full((3, 4), 1.0), 1.0),
        draws=1,
    )
    assert seen == ["bfloat16"]
