"""Gradient screens: scores against finite differences, bounds against textbook and simulation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmed.analysis import audit as audit_lib
from jaxmed.analysis import screening
from jaxmed.data import pairs
from jaxmed.engine import capture, scan
from jaxmed.question import metrics, positions, sites
from jaxmed.question import question as question_lib
from jaxmed.question.positions import Align, Positions
from models.edits import Edit
from models.errors import InputError
from models.sites import Site
from tests import tiny

LOGIT = metrics.LogitDifference()
RESPONSE = metrics.ResponseLogprobDifference()


def pair(base, source, seed=0):
    """A random pair of the given numbers of tokens, with responses of 2 and 3 tokens."""
    generator = np.random.default_rng(seed)
    prompts = [tuple(generator.integers(8, 61, length).tolist()) for length in (base, source)]
    spans = {"prompt_span": (3, 7), "counterfactual_span": (2, 6)}
    return pairs.Pair("pair", *prompts, (6, 20), (7, 30, 31), **spans)


UNEQUAL = pair(12, 11)


@functools.cache
def model(dtype):
    """With sliding windows and biases; float64 where that is enabled."""
    return tiny.decoder("qwen2", dtype=dtype)


DRAWS = 200
LENGTH = 16  # of all runs of the reference, padded: tokens see nothing that follows them


SITES = {
    "layer": (Site.LAYER,),
    "module": (Site.ATTENTION, Site.MLP),
    "head": (Site.HEAD,),
    "neuron": (Site.NEURON,),
}


@jax.jit
def _trace(decoder, tokens):
    return decoder(tokens)[1]


@functools.partial(jax.jit, static_argnames=("site",))
def _logits(decoder, tokens, embedding, layers, units, steering, site):
    """Logits when a multiple of a unit's change is added to it, for a batch of units."""

    def run(layer, unit, added):
        edits = [
            Edit.patch(Site.EMBEDDING, 0, jnp.ones(LENGTH, bool), embedding),
            Edit.steer(site, layer, jnp.ones(LENGTH, bool), added, unit),
        ]
        return decoder(tokens, edits=edits)[0]

    return jax.vmap(run)(layers, units, steering)


def unit_masks(config, site, size):
    """What each unit of a site is made of; None where the site is one unit."""
    if site == Site.HEAD:
        return np.eye(config.num_heads, dtype=bool)
    if site == Site.NEURON:
        groups = sites.group_count(config, size)
        return np.arange(groups)[:, None] == np.arange(config.intermediate_size) // size
    return None


def reference(
    decoder, asked, question, fractions=(0.0,), extent=1e-5, granularity="neuron"
) -> np.ndarray:
    """Derivatives of NIE and TIE in the extent of the patch, by central differences, [2, L, U]."""
    of_sites = [
        _of_site(decoder, asked, question, fractions, extent, site) for site in SITES[granularity]
    ]
    return np.concatenate(of_sites, axis=2)


def _of_site(decoder, asked, question, fractions, extent, site):
    """The reference for the units of one site."""
    config = decoder.config
    masks = unit_masks(config, site, question.group_size)
    shape = config.num_layers, 1 if masks is None else len(masks)
    layers, units = (axis.reshape(-1) for axis in np.indices(shape))
    members = None if masks is None else masks[units]
    found = np.zeros((2, len(layers)))
    for term in question.metric.terms(asked):
        edited = positions.edited(asked, question.positions, question.align, len(term.response))
        paired = positions.edited(asked, Positions.PROMPT, question.align)
        prompts = [asked.prompt_ids, asked.counterfactual_ids]
        for side in range(2):
            if side:
                prompts, edited, paired = prompts[::-1], edited.swapped(), paired.swapped()
            runs = [np.pad(p + term.response, (0, LENGTH))[:LENGTH] for p in prompts]
            base, source = (_trace(decoder, run) for run in runs)
            embedding, goal = base.embedding, source.embedding
            path = jnp.zeros_like(embedding)
            path = path.at[paired.base].set(goal[paired.source] - embedding[paired.base])
            before, after = (getattr(run, site.value) for run in (base, source))
            change = np.zeros_like(before)
            change[:, edited.base] = after[:, edited.source] - before[:, edited.base]

            def value(sign, fraction, runs=runs, prompts=prompts, change=change, term=term,
                      embedding=embedding, path=path):  # fmt: skip
                logits = _logits(
                    decoder,
                    runs[0],
                    embedding + fraction * path,
                    layers,
                    members,
                    sign * extent * change[layers],
                    site,
                )
                logits = logits[:, len(prompts[0]) - 1 :]
                if question.metric.name == "logit_diff":
                    return logits[:, 0, asked.harmful_ids[0]] - logits[:, 0, asked.safe_ids[0]]
                log_p = jax.nn.log_softmax(logits, axis=-1)
                stop = question.metric.decision_tokens if question.metric.part != "all" else None
                response = term.response[:stop]
                return sum(log_p[:, n, t] for n, t in enumerate(response)) / len(response)

            for fraction in fractions:
                slope = (value(1, fraction) - value(-1, fraction)) / (2 * extent)
                found[side] += term.sign * (-1 if side else 1) * slope / len(fractions)
    return found.reshape(2, *shape)


def relative_error(found, expected):
    scale = np.abs(expected).max()
    assert scale > 1e-3
    return np.abs(np.array(found) - expected).max() / scale


QUESTIONS = {
    "last": question_lib.Question(LOGIT, Positions.LAST),
    "prompt": question_lib.Question(LOGIT, Positions.PROMPT),
    "start": question_lib.Question(LOGIT, Positions.PROMPT, Align.START, 7),
    "span": question_lib.Question(LOGIT, Positions.PROMPT, Align.SPAN, 7),
    "response metric": question_lib.Question(RESPONSE, Positions.DIFFERING),
    "response": question_lib.Question(RESPONSE, Positions.RESPONSE),
    "decision": question_lib.Question(
        metrics.ResponseLogprobDifference("decision", 2), Positions.RESPONSE
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_scores_are_the_derivatives_of_the_definition(name):
    question = QUESTIONS[name]
    with jax.enable_x64(True):
        decoder = model("float64")
        expected = reference(decoder, UNEQUAL, question)
        found = screening.scores(decoder, UNEQUAL, question)
        assert found[0].shape == (3, sites.group_count(decoder.config, question.group_size))
        assert relative_error(found, expected) <= 1e-8


def test_scores_in_float32():
    question = QUESTIONS["response metric"]
    with jax.enable_x64(True):
        expected = screening.scores(model("float64"), UNEQUAL, question)
    found = screening.scores(model("float32"), UNEQUAL, question)
    assert relative_error(found, np.array(expected)) <= 1e-5


@pytest.mark.parametrize("name", ["prompt", "response metric"])
def test_integrated_gradients_average_the_derivative_over_the_path(name):
    question = QUESTIONS[name]
    with jax.enable_x64(True):
        decoder = model("float64")
        expected = reference(decoder, UNEQUAL, question, fractions=(1 / 6, 3 / 6, 5 / 6))
        found = screening.scores(decoder, UNEQUAL, question, steps=3)
        assert relative_error(found, expected) <= 1e-8
        plain = screening.scores(decoder, UNEQUAL, question)
        assert relative_error(plain, expected) > 1e-3


SHAPES = {"layer": (3,), "module": (3, 2), "head": (3, 4)}


@pytest.mark.parametrize("name", ["prompt", "response metric"])
@pytest.mark.parametrize("granularity", SHAPES)
def test_scores_of_larger_units_are_the_derivatives_of_the_definition(granularity, name):
    question = QUESTIONS[name]
    with jax.enable_x64(True):
        decoder = model("float64")
        expected = reference(decoder, UNEQUAL, question, granularity=granularity)
        found = screening.scores(decoder, UNEQUAL, question, granularity=granularity)
    assert [side.shape for side in found] == [SHAPES[granularity]] * 2
    assert relative_error(found, expected.reshape(2, *SHAPES[granularity])) <= 1e-8


def test_integrated_gradients_of_heads_average_the_derivative_over_the_path():
    question, fractions = QUESTIONS["prompt"], (1 / 8, 3 / 8, 5 / 8, 7 / 8)
    with jax.enable_x64(True):
        decoder = model("float64")
        expected = reference(decoder, UNEQUAL, question, fractions, granularity="head")
        found = screening.scores(decoder, UNEQUAL, question, granularity="head", steps=4)
        assert relative_error(found, expected) <= 1e-8
        plain = screening.scores(decoder, UNEQUAL, question, granularity="head")
        assert relative_error(plain, expected) > 1e-3


@pytest.mark.parametrize("name", ["prompt", "response metric"])
def test_a_modules_score_is_the_sum_of_its_units(name):
    """A derivative is linear in the change, and so is what the units of a module write."""
    with jax.enable_x64(True):
        module, head, neuron = (
            np.array(
                screening.scores(
                    model("float64"), UNEQUAL, QUESTIONS[name], granularity=granularity
                )
            )
            for granularity in ("module", "head", "neuron")
        )
    sums = np.stack([head.sum(axis=-1), neuron.sum(axis=-1)], axis=-1)
    assert relative_error(module, sums) <= 1e-10


def test_the_two_paths_of_equally_long_prompts_are_one():
    with jax.enable_x64(True):
        decoder = model("float64")
        nie, tie = screening.scores(decoder, pair(12, 12), QUESTIONS["prompt"], steps=3)
    np.testing.assert_allclose(nie, tie, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 3])
def test_equal_prompts_have_scores_of_exactly_zero(steps):
    same = dataclasses.replace(UNEQUAL, counterfactual_ids=UNEQUAL.prompt_ids)
    with jax.enable_x64(True):
        found = screening.scores(model("float64"), same, QUESTIONS["prompt"], steps=steps)
    assert not np.any(found)


def test_the_last_layer_of_the_last_position_alone_reaches_the_last_row():
    """In the last layer no other position can matter to a metric that is read at the last one."""
    with jax.enable_x64(True):
        last, prompt = (
            screening.scores(model("float64"), UNEQUAL, QUESTIONS[name])
            for name in ("last", "prompt")
        )
    np.testing.assert_allclose(last[0][-1], prompt[0][-1], atol=1e-14)
    assert np.abs(last[0][0] - prompt[0][0]).max() > 1e-3


def test_padding_does_not_matter(monkeypatch):
    question = QUESTIONS["response metric"]
    with jax.enable_x64(True):
        decoder = model("float64")
        expected = np.array(screening.scores(decoder, UNEQUAL, question, steps=3))

        def padded_with_a_word(tokens, branches=None, pad=capture.pad):
            padded, valid, branches = pad(tokens, branches)
            return np.where(valid, padded, 17), valid, branches

        with monkeypatch.context() as patched:
            patched.setattr(capture, "pad", padded_with_a_word)
            found = screening.scores(decoder, UNEQUAL, question, steps=3)
            np.testing.assert_array_equal(found, expected)
        monkeypatch.setattr(capture, "SHORTEST", 16)
        found = screening.scores(decoder, UNEQUAL, question, steps=3)
        np.testing.assert_allclose(found, expected, atol=1e-14)


def test_bad_questions_are_refused():
    decoder = model("float32")
    with pytest.raises(ValueError, match="0 steps"):
        screening.scores(decoder, UNEQUAL, QUESTIONS["last"], steps=0)
    with pytest.raises(InputError, match="positions=.response., but the metric reads no response"):
        screening.scores(decoder, UNEQUAL, question_lib.Question(LOGIT, Positions.RESPONSE))
    for granularity in ("token", "direction", "neurons"):
        with pytest.raises(ValueError, match=f"no gradients of granularity '{granularity}'"):
            screening.scores(decoder, UNEQUAL, QUESTIONS["last"], granularity=granularity)


# Selection


def heavy_tailed(layers=4, groups=600, seed=0):
    return np.random.default_rng(seed).standard_t(2, (layers, groups))


def test_a_selection_has_the_strongest_and_a_sample_of_every_stratum():
    scores = heavy_tailed()
    chosen = screening.select(scores, top=50, audit=600, seed=3)
    again = screening.select(scores, top=50, audit=600, seed=3)
    for field in dataclasses.fields(chosen):
        np.testing.assert_array_equal(getattr(chosen, field.name), getattr(again, field.name))
    other = screening.select(scores, top=50, audit=600, seed=4)
    assert (chosen.sampled != other.sampled).any()

    assert chosen.candidates.sum() == screening.MARGIN * 50
    assert chosen.sampled.sum() == 600
    assert not (chosen.candidates & chosen.sampled).any()
    assert (chosen.computed == (chosen.candidates | chosen.sampled)).all()
    np.testing.assert_array_equal(chosen.stratum == -1, chosen.candidates)
    strength = np.abs(scores)
    for stratum in range(3):
        above, here = strength[chosen.stratum < stratum], strength[chosen.stratum == stratum]
        assert above.min() >= here.max()
    sizes, samples = (
        np.array([np.sum(which[chosen.stratum == stratum]) for stratum in range(3)])
        for which in (np.ones(scores.shape, int), chosen.sampled)
    )
    assert sizes[0] == samples[0] == 100
    assert sizes[0] < sizes[1] < sizes[2]
    np.testing.assert_allclose(samples[1:], 500 / 2200 * sizes[1:], atol=1)


@pytest.mark.parametrize("strata", [1, 2, 3, 5])
@pytest.mark.parametrize("top, audit", [(1, 0), (1, 3), (7, 40), (40, 20), (7, 500), (70, 9)])
def test_selections_of_few_units(strata, top, audit):
    scores = heavy_tailed(2, 60)
    chosen = screening.select(scores, top, audit, seed=0, strata=strata)
    candidates = min(120, 2 * top)
    assert chosen.candidates.sum() == candidates
    assert chosen.sampled.sum() == min(audit, 120 - candidates)
    assert not (chosen.candidates & chosen.sampled).any()
    assert chosen.stratum.max() < strata
    found = audit_lib.missed(chosen, np.where(chosen.computed, scores, np.nan), top)
    assert 0 <= found.bound <= found.uncomputed == 120 - chosen.computed.sum()


def test_a_score_that_is_not_a_number_makes_a_candidate():
    scores = heavy_tailed(2, 60)
    scores[1, 7] = np.nan
    assert screening.select(scores, 3, 10, seed=0).candidates[1, 7]


def test_bad_selections_are_refused():
    for arguments in ({"top": 0}, {"audit": -1}, {"strata": 0}):
        with pytest.raises(ValueError, match="positive"):
            screening.select(heavy_tailed(), **{"top": 5, "audit": 5, "seed": 0} | arguments)


# The bound


def textbook(size, sample, hits, confidence=0.95):
    """One-sided hypergeometric limit, by trying every number of marked units."""
    marked = np.arange(hits, size - sample + hits + 1)
    p = stats.hypergeom.cdf(hits, size, marked, sample)
    return int(marked[p > 1 - confidence].max() - hits)


def test_the_bound_of_one_stratum_is_the_textbooks():
    generator = np.random.default_rng(0)
    for _ in range(100):
        size = int(generator.integers(1, 300))
        sample = int(generator.integers(1, size + 1))
        hits = int(generator.integers(0, min(sample, 20) + 1))
        confidence = generator.choice([0.8, 0.95, 0.99])
        bound = audit_lib.missing_bound([size], [sample], [hits], confidence)
        assert bound == textbook(size, sample, hits, confidence)
    assert audit_lib.missing_bound([5000], [1200], [0]) == textbook(5000, 1200, 0) == 10


def not_rejected(sizes, samples, hits):
    """Largest number of missing units that the test does not reject: every outcome of every m."""
    weights = np.array(sizes) / samples
    probabilities, missing, statistic = 1.0, 0, 0.0
    for j, (size, sample, hit) in enumerate(zip(sizes, samples, hits, strict=True)):
        marked = np.arange(hit, size - sample + hit + 1)
        drawn = np.arange(sample + 1)
        p = stats.hypergeom.pmf(drawn, size, marked[:, None], sample)
        probabilities = np.einsum("...,mh->...mh", probabilities, p)
        missing = np.add.outer(missing, marked - hit)
        statistic = np.add.outer(statistic, weights[j] * drawn)
    strata = len(sizes)
    axes = [2 * j for j in range(strata)] + [2 * j + 1 for j in range(strata)]
    probabilities = probabilities.transpose(axes).reshape(missing.size, statistic.size)
    extreme = statistic.reshape(-1) <= weights @ hits + 1e-9
    return missing.reshape(-1)[probabilities[:, extreme].sum(axis=1) > 0.05].max()


@pytest.mark.parametrize("hits", [(0, 0), (1, 0), (0, 1), (2, 1), (0, 4)])
@pytest.mark.parametrize("samples", [(4, 9), (7, 6)])
def test_the_bound_of_two_strata_is_the_largest_that_is_not_rejected(samples, hits):
    sizes = (12, 30)
    expected = not_rejected(sizes, samples, hits)
    assert audit_lib.missing_bound(sizes, samples, hits) == expected
    # A census misses nothing; where nothing is sampled, all may be missing.
    more = audit_lib.missing_bound((5, *sizes, 8), (5, *samples, 0), (3, *hits, 0))
    assert more == expected + 8


@pytest.mark.parametrize("hits", [(0, 0, 0), (1, 0, 1), (0, 2, 0)])
def test_the_bound_of_three_strata_is_the_largest_that_is_not_rejected(hits):
    sizes, samples = (6, 10, 14), (3, 4, 5)
    expected = not_rejected(sizes, samples, hits)
    assert audit_lib.missing_bound(sizes, samples, hits) == expected


def test_the_bound_is_monotone():
    sizes = (300, 4000, 90000)
    by_hits = [audit_lib.missing_bound(sizes, (90, 800, 9000), (0, 1, h)) for h in range(8)]
    assert by_hits == sorted(by_hits) and by_hits[0] < by_hits[-1]
    by_sample = [audit_lib.missing_bound(sizes, (90, 800, n), (0, 1, 2)) for n in (50, 900, 9000)]
    assert by_sample == sorted(by_sample, reverse=True)
    by_confidence = [audit_lib.missing_bound(sizes, (90, 800, 9000), (0, 1, 2), c)
                     for c in (0.5, 0.8, 0.95, 0.999)]  # fmt: skip
    assert by_confidence == sorted(by_confidence)


def test_no_search_is_long_and_a_shorter_one_is_not_below_the_exact_bound(monkeypatch):
    sizes, samples = (200, 13000, 486000), (100, 3200, 116000)
    exact = audit_lib.missing_bound(sizes, samples, (1, 2, 3))
    monkeypatch.setattr(audit_lib, "_MOST_TERMS", 20_000)
    coarse = audit_lib.missing_bound(sizes, samples, (1, 2, 3))
    assert exact <= coarse <= 1.2 * exact
    monkeypatch.setattr(audit_lib, "_MOST_HITS", 0)
    chernoff = audit_lib.missing_bound(sizes, samples, (1, 2, 3))
    assert coarse < chernoff <= 1.5 * exact
    many = audit_lib.missing_bound(sizes, samples, (60, 2000, 80000))
    assert 60 + 6125 + 255_000 < many <= sum(sizes) - sum(samples)


def test_contradictions_are_refused():
    for numbers in (([5], [6], [0]), ([5], [3], [4]), ([5], [3], [-1])):
        with pytest.raises(ValueError, match="must not fall"):
            audit_lib.missing_bound(*numbers)
    with pytest.raises(ValueError, match="confidence=1"):
        audit_lib.missing_bound([5], [3], [0], 1)


@pytest.mark.parametrize(
    "marked, sizes, samples",
    [
        ((0, 0, 30), (50, 400, 4000), (50, 100, 900)),  # all in the lowest stratum
        ((0, 0, 11), (50, 400, 4000), (50, 95, 950)),
        ((20, 12, 9), (50, 400, 4000), (40, 100, 900)),
        ((45, 2, 0), (50, 400, 4000), (10, 100, 900)),
        ((0, 60, 700), (50, 400, 4000), (50, 100, 200)),
        ((3, 0), (40, 100), (10, 25)),
    ],
)
def test_the_bound_holds_in_the_stated_share_of_samples(marked, sizes, samples):
    marked, sizes = np.array(marked), np.array(sizes)
    generator = np.random.default_rng(1)
    drawn = generator.hypergeometric(marked, sizes - marked, samples, (DRAWS, len(sizes)))
    outcomes, counts = np.unique(drawn, axis=0, return_counts=True)
    held = [
        np.sum(marked - hits) <= audit_lib.missing_bound(sizes, samples, hits) for hits in outcomes
    ]
    assert np.sum(counts[held]) >= 0.93 * DRAWS


def test_the_threshold_comes_from_the_candidates_alone():
    mask = np.zeros((3, 1, 8), bool)
    mask[0, 0, :4], mask[1, 0, 4:6] = True, True
    chosen = screening.Selection(mask[0], mask[1], np.where(mask[0], -1, 0))
    effects_found = np.array([[1.0, -5, 3, 2, 9, -3, np.nan, np.nan]])
    found = audit_lib.missed(chosen, effects_found, top=2)
    # The sampled -3 is no stronger than the second strongest candidate, 3; the sampled 9 is.
    assert (found.threshold, found.hits, found.uncomputed) == (3, 1, 2)
    assert found.estimate == 1 * (4 / 2 - 1)
    assert found.bound == textbook(4, 2, 1)
    assert audit_lib.missed(chosen, effects_found, top=1).hits == 1
    assert audit_lib.missed(chosen, -effects_found, top=2) == found


def test_what_was_not_computed_is_refused():
    chosen = screening.select(heavy_tailed(), 5, 20, seed=0)
    with pytest.raises(ValueError, match="not computed"):
        audit_lib.missed(chosen, np.where(chosen.candidates, 1, np.nan), 5)
    with pytest.raises(ValueError, match="10 candidates"):
        audit_lib.missed(chosen, heavy_tailed(), 11)


# The whole screen, on a model whose gradients say nothing of the units that matter


DETECTORS = np.arange(3, 390, 13)  # in the first layer
GATES = np.array([[11, 50], [90, 140]])  # in the last layer; each a pair


def saturated(asked):
    """A decoder in which any one of several detectors switches gates that are flat on both sides.

    In the base run every detector is 0, in the source run 1. They write a channel of the residual
    stream that nothing else writes and that only the gates read, as a pre-activation z: -20 with no
    detector, 20 and more with any. A pair of gates gives silu(z) - silu(z - 10): 0 or 10.
    """
    decoder = tiny.decoder(num_layers=3, intermediate_size=400, mlp_bias=True)
    mlp = decoder.blocks.mlp
    names = {
        "embedding": decoder.embedding,
        "attention": decoder.blocks.attention.output.kernel,
        "query": decoder.blocks.attention.query.kernel,
        "key": decoder.blocks.attention.key.kernel,
        "value": decoder.blocks.attention.value.kernel,
        "gate": mlp.gate.kernel,
        "up": mlp.up.kernel,
        "down": mlp.down.kernel,
        "gate_bias": mlp.gate.bias,
        "up_bias": mlp.up.bias,
        "down_bias": mlp.down.bias,
        "unembedding": decoder.unembedding,
    }
    new = {name: np.array(parameter[...]) for name, parameter in names.items()}
    for writes in ("embedding", "attention", "down", "down_bias", "unembedding"):
        new[writes][..., -1] = 0
    for reads in ("query", "key", "value", "gate", "up"):
        new[reads][:, -1, :] = 0

    def install():
        for name, parameter in names.items():
            parameter[...] = jnp.asarray(new[name])

    def mlp_inputs(layer):
        for ids in (asked.prompt_ids, asked.counterfactual_ids):
            trace = decoder(np.array(ids))[1]
            x = np.array(trace.residual[layer] - trace.mlp[layer])[-1]
            scale = np.sqrt(np.mean(x**2) + decoder.config.norm_eps)
            yield x / scale * np.array(decoder.blocks.mlp_norm.weight[layer]), scale

    install()
    (base, _), (source, _) = mlp_inputs(0)
    slope = 40 * (source - base) / np.sum((source - base) ** 2)
    new["gate"][0][:, DETECTORS] = slope[:, None]
    new["gate_bias"][0][DETECTORS] = -slope @ (source + base) / 2
    new["up"][0][:, DETECTORS], new["up_bias"][0][DETECTORS] = 0, 1 / 20
    new["down"][0][DETECTORS] = 0.01 * np.eye(24)[-1]
    scale = max(scale for _, scale in mlp_inputs(2))
    weight = float(decoder.blocks.mlp_norm.weight[2, -1])
    answers = new["unembedding"][asked.harmful_ids[0]] - new["unembedding"][asked.safe_ids[0]]
    for pair in GATES:
        new["gate"][2][:, pair] = 0
        new["gate"][2][-1, pair] = 50 * scale / (0.01 * weight)
        new["gate_bias"][2][pair] = -20, -30
        new["up"][2][:, pair], new["up_bias"][2][pair] = 0, 1
        new["down"][2][pair] = 0.02 * np.outer((1, -1), answers)
    install()
    return decoder


SHORT = dataclasses.replace(pair(10, 10), harmful_ids=(6,), safe_ids=(7,))
TOP = 100


def strongest(exact):
    """Mask of the `TOP` strongest effects."""
    mask = np.zeros(exact.size, bool)
    mask[np.argsort(-np.abs(exact), axis=None)[:TOP]] = True
    return mask.reshape(exact.shape)


@pytest.fixture(scope="module")
def hard():
    """Scores and exact effects where the detectors have strong effects and no gradient."""
    decoder, question = saturated(SHORT), question_lib.Question(LOGIT)
    scores = screening.scores(decoder, SHORT, question)[0]
    exact = scan.scan_pair(decoder, SHORT, question, ["neuron"]).nie["neuron"]
    assert np.abs(scores[0, DETECTORS]).max() < 1e-5
    assert strongest(exact)[0, DETECTORS].all()
    return scores, exact


# Where nearly a third of the strongest are missed, a bound of 10 takes nine tenths of the rest.
@pytest.mark.parametrize("audit, largest_bound", [(250, 100), (900, 10)])
def test_where_gradients_say_nothing_the_audit_says_what_may_be_missing(hard, audit, largest_bound):
    """None of the detectors is a candidate."""
    scores, exact = hard
    covered, covered_top, hits = [], [], []
    for seed in range(100):
        chosen = screening.select(scores, TOP, audit=audit, seed=seed)
        assert not chosen.candidates[0, DETECTORS].any()
        found = audit_lib.missed(chosen, np.where(chosen.computed, exact, np.nan), TOP)
        missing = ~chosen.computed & (np.abs(exact) > found.threshold)
        covered.append(missing.sum() <= found.bound)
        covered_top.append((strongest(exact) & ~chosen.computed).sum() <= found.bound)
        hits.append(found.hits)
        assert found.bound <= largest_bound
    assert np.sum(covered) >= 93
    assert np.sum(covered_top) >= 93
    assert np.sum(np.array(hits) > 0) >= 93


def test_where_the_model_is_smooth_the_candidates_are_the_strongest():
    decoder = tiny.decoder(num_layers=3, intermediate_size=400, mlp_bias=True)
    question = question_lib.Question(LOGIT)
    exact = scan.scan_pair(decoder, SHORT, question, ["neuron"])
    for side, scores in zip(
        ("nie", "tie"), screening.scores(decoder, SHORT, question), strict=True
    ):
        effect = getattr(exact, side)["neuron"]
        assert np.corrcoef(scores.reshape(-1), effect.reshape(-1))[0, 1] > 0.99
        chosen = screening.select(scores, TOP, audit=250, seed=0)
        found = audit_lib.missed(chosen, np.where(chosen.computed, effect, np.nan), TOP)
        assert (strongest(effect) & chosen.candidates).sum() >= 99
        assert (strongest(effect) & ~chosen.computed).sum() <= found.bound <= 15
