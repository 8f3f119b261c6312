"""Generation against its slow definition: the whole sequence again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.behaviour import batches, generation, holding, likelihood
from jaxmed.behaviour.generation import Generated, generate
from jaxmed.behaviour.sampling import Sampling
from models.edits import Hold
from models.errors import InputError
from models.sites import Site
from tests import tiny
from tests.jaxmed.behaviour.defined import (
    FAMILIES,
    LONG,
    PROMPTS,
    ROWS,
    SITES,
    decoder,
    edits_of,
    hold,
    logits_after,
    nothing,
)

FEW = Sampling(max_tokens=12)


def answers(prompts, family="llama", *, stop=(), sampling=FEW, batch_size=ROWS, **asked):
    return generate(
        decoder(family), prompts, stop=stop, sampling=sampling, batch_size=batch_size, **asked
    )


def defined(family, prompt, count, holds=()):
    """The likeliest tokens, one by one."""
    edits = [edit for hold in holds for edit in edits_of(hold, len(prompt))]
    tokens, margin = list(prompt), np.inf
    for _ in range(count):
        logits = logits_after(family, tokens, edits)[-1]
        margin = min(margin, np.diff(np.sort(logits))[-1] / np.abs(logits).max())
        tokens.append(int(np.argmax(logits)))
    assert margin > 1e-5, "a tie: these weights decide nothing"
    return tuple(tokens[len(prompt) :])


def tokens_of(responses):
    return [response.tokens for response in responses]


@pytest.mark.parametrize("family", tiny.costly_families(FAMILIES))
def test_greedy_is_the_definition(family):
    prompts = PROMPTS + LONG[:1]
    found = answers(prompts, family)
    assert tokens_of(found) == [defined(family, prompt, 12) for prompt in prompts]
    assert not any(response.stopped for response in found)


@pytest.mark.parametrize("family", tiny.costly_families(FAMILIES))
def test_holds_are_edits_of_every_position(family):
    holds = [hold(site, family, seed=seed) for seed, site in enumerate(SITES)]
    found = tokens_of(answers(PROMPTS, family, holds=holds))
    assert found == [defined(family, prompt, 12, holds) for prompt in PROMPTS]
    assert found != tokens_of(answers(PROMPTS, family))


@pytest.mark.parametrize("where", ["at_prompt", "at_last", "at_generated"])
def test_a_hold_is_made_where_it_says(where):
    elsewhere = dict.fromkeys(("at_prompt", "at_last", "at_generated"), False)
    held = [hold(Site.RESIDUAL, seed=3, **elsewhere | {where: True})]
    found = tokens_of(answers(PROMPTS, holds=held))
    assert found == [defined("llama", prompt, 12, held) for prompt in PROMPTS]
    assert found != tokens_of(answers(PROMPTS))
    nowhere = [hold(Site.RESIDUAL, seed=3, **elsewhere)]
    assert tokens_of(answers(PROMPTS, holds=nowhere)) == tokens_of(answers(PROMPTS))


@pytest.mark.parametrize("family", tiny.costly_families(FAMILIES))
def test_a_hold_of_nothing_changes_no_bit(family):
    """The sampled tokens, every logit of the response, and a divergence of exactly 0."""
    drawn = Sampling(max_tokens=12, temperature=1.0)
    plain = answers(PROMPTS, family, sampling=drawn)
    assert answers(PROMPTS, family, sampling=drawn, holds=nothing(family)) == plain
    sequences = [(p, r.tokens) for p, r in zip(PROMPTS, plain, strict=True)]
    read = functools.partial(likelihood.logprobs, decoder(family), sequences, batch_size=ROWS)
    for held, free in zip(read(holds=nothing(family)).values, read().values, strict=True):
        np.testing.assert_array_equal(held, free)
    divergence = likelihood.kl(decoder(family), sequences, nothing(family), batch_size=ROWS)
    assert not np.concatenate(divergence.values).any()


@pytest.mark.parametrize("family", tiny.costly_families(FAMILIES))
def test_a_step_with_a_hold_of_nothing_has_the_same_logits(family):
    """What the loop does in every step, by itself: cache and logits, bit by bit."""
    model, lengths = decoder(family), np.array([7, 32, 2, 1], np.int32)
    tokens = np.random.default_rng(1).integers(0, 61, (ROWS, 32)).astype(np.int32)
    layers = generation.layered(model)
    step = jax.jit(generation._step)

    def run(holds):
        holds = holding.fitted(model.config, holds, ROWS)
        rows = generation.empty(
            model, layers, rows=ROWS, length=32, room=16, kept_as=np.dtype("float32")
        )
        rows = generation.fill(
            model,
            layers,
            holds,
            rows,
            fresh=np.arange(ROWS)[None],
            count=np.int32([ROWS]),
            tokens=tokens,
            lengths=lengths,
            together=2,
        )
        after, cache, newest = step(model, layers, holds, rows, tokens[:, 0], lengths)
        return model.unembed(rows.x), model.unembed(after), cache, newest

    for held, free in zip(*(jax.tree.leaves(run(h)) for h in (nothing(family), [])), strict=True):
        np.testing.assert_array_equal(held, free)


def test_one_program_serves_all_holds_of_a_site_and_all_settings():
    answers(PROMPTS, holds=[hold(Site.NEURON)])
    compiled = generation.fill._cache_size(), generation.advance._cache_size()
    everywhere = Hold.affine("neuron", np.zeros((3, 1)), np.zeros((1, 40)), at_prompt=False)
    few = Sampling(max_tokens=5, temperature=0.7, top_p=0.9, top_k=4)
    answers(PROMPTS, holds=[everywhere], sampling=few, stop={1})
    assert (generation.fill._cache_size(), generation.advance._cache_size()) == compiled


def test_each_prompt_may_have_its_own_shift():
    """As if it had been asked alone, also where batches mix lengths and orders."""
    prompts = LONG + PROMPTS
    held = hold(Site.MLP, prompts=len(prompts))
    found = answers(prompts, holds=[held])
    for index, prompt in enumerate(prompts[2:], start=2):
        own = Hold.affine("mlp", held.scale, held.shift[index][None])
        assert answers([prompt], holds=[own]) == [found[index]]
    assert len({response.tokens for response in found}) == len(found)


def test_a_response_depends_on_its_own_seed_alone():
    """Not on the company, the order or the place in the batch: the same prompt throughout."""
    drawn = Sampling(max_tokens=12, temperature=1.0)
    prompts, seeds = [PROMPTS[2]] * 6 + PROMPTS, list(range(11))
    found = answers(prompts, seeds=seeds, sampling=drawn)
    assert len({response.tokens for response in found[:6]}) == 6
    order = np.random.default_rng(1).permutation(11)
    mixed = answers([prompts[i] for i in order], seeds=[seeds[i] for i in order], sampling=drawn)
    assert mixed == [found[i] for i in order]
    for index in (2, 8, 10):
        alone = answers([prompts[index]], seeds=[seeds[index]], sampling=drawn)
        assert alone == [found[index]]
    assert answers(prompts, sampling=drawn) == found  # by default, seeds count the prompts


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_size_of_a_batch_makes_no_difference_without_ties(batch_size):
    drawn = Sampling(max_tokens=12, temperature=1.0)
    assert answers(PROMPTS, sampling=drawn, batch_size=batch_size) == answers(
        PROMPTS, sampling=drawn
    )


SHORT = np.random.default_rng(2).integers(0, 61, (14, 5)).tolist()


def test_a_row_that_ends_is_given_the_next_prompt(monkeypatch):
    """Which is answered as if it had been asked alone, its own shift and seed with it."""
    monkeypatch.setattr(generation.cost, "prompts_together", lambda *shape: 1)
    drawn, held = Sampling(40, 1.0), hold(Site.MLP, prompts=len(SHORT))
    free = answers(SHORT, sampling=drawn, holds=[held])
    stop = {free[index].tokens[2 * index] for index in (0, 3, 8, 11)}
    told = []
    found = answers(SHORT, stop=stop, sampling=drawn, holds=[held], ended=told.append)
    assert sorted(index for each in told for index in each) == list(range(len(SHORT)))
    lengths = [next((i for i, t in enumerate(r.tokens) if t in stop), 40) for r in free]
    assert found == [
        Generated(response.tokens[:length], length < 40)
        for response, length in zip(free, lengths, strict=True)
    ]
    assert len(set(lengths)) > 3 and len(told) > 6  # not all rows of a batch together
    for index in (1, 9):
        own = Hold.affine("mlp", held.scale, held.shift[index][None])
        asked = {"stop": stop, "sampling": drawn, "holds": [own], "seeds": [index]}
        assert answers([SHORT[index]], **asked) == [found[index]]


def test_a_prompt_waits_no_longer_than_32_steps(monkeypatch):
    """Where too few rows have ended for their prompts to be run together."""
    monkeypatch.setattr(generation.cost, "prompts_together", lambda *shape: ROWS)
    drawn, told = Sampling(40, 1.0), []
    free = answers(SHORT[:8], sampling=drawn)
    stop = next(t for t in free[0].tokens if any(t not in r.tokens[:32] for r in free[1:ROWS]))
    answers(SHORT[:8], sampling=drawn, stop={stop}, ended=told.append)
    assert 0 in told[0] and len(told[0]) < ROWS
    assert all(stop in free[index].tokens[:32] for index in told[0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_keys_and_values_may_be_kept_in_bfloat16(family, monkeypatch):
    """They are rounded as they are kept, and nothing else is; it takes half of their memory."""
    kept = []
    empty = generation.empty

    def watched(*arguments, **named):
        kept.append(empty(*arguments, **named))
        return jax.tree.map(jnp.copy, kept[-1])

    monkeypatch.setattr(generation, "empty", watched)
    plain = answers(PROMPTS, family)
    rounded = answers(PROMPTS, family, cache_dtype="bfloat16")
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(rows.cache)) for rows in kept]
    assert len(kept) == 2 and sizes[0] == 2 * sizes[1]
    # The first token reads what was not rounded.
    assert [r.tokens[0] for r in rounded] == [p.tokens[0] for p in plain]
    logits = logits_after_one_more(family, "bfloat16"), logits_after_one_more(family, "")
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max()
    assert 1e-6 < error < 2**-6


def logits_after_one_more(family, cache_dtype):
    """Those after a generated token, by the cache."""
    model, lengths = decoder(family), np.array([7, 32, 2, 1], np.int32)
    tokens = np.random.default_rng(1).integers(0, 61, (ROWS, 32)).astype(np.int32)
    layers, kept_as = generation.layered(model), np.dtype(cache_dtype or "float32")
    rows = generation.empty(model, layers, rows=ROWS, length=32, room=16, kept_as=kept_as)
    shared = {"fresh": np.arange(ROWS)[None], "count": np.int32([ROWS]), "together": 2}
    rows = generation.fill(model, layers, [], rows, tokens=tokens, lengths=lengths, **shared)
    after, *_ = jax.jit(generation._step)(model, layers, [], rows, tokens[:, 0], lengths)
    return np.asarray(model.unembed(after))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_a_stack_and_of_arrays_of_their_own_are_the_same(dtype, monkeypatch):
    """A float32 model on a CPU reads the latter, which lie where they lie in the stack."""
    model = tiny.decoder("llama", dtype=dtype)
    layers = generation.layered(model)
    assert isinstance(layers, tuple) == (dtype == "float32")
    found = generate(model, PROMPTS, stop=(), sampling=FEW, batch_size=ROWS)
    if dtype == "float32":
        stack, own = model.blocks.mlp.up.kernel[...], layers[0].mlp.up.kernel[...]
        assert own.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer()
        monkeypatch.setattr(generation, "layered", lambda decoder: decoder.blocks)
        assert generate(model, PROMPTS, stop=(), sampling=FEW, batch_size=ROWS) == found
    else:
        wide = tiny.decoder("llama", dtype=dtype)
        in_parts = wide.at_precision("split3")
        assert generate(in_parts, PROMPTS, stop=(), sampling=FEW, batch_size=ROWS) == found


def test_a_vocabulary_in_chunks_has_the_same_logits(monkeypatch):
    """Of a 16-bit model on a CPU, the last of which overlaps with the one before."""
    model = tiny.decoder("llama", dtype="bfloat16")
    x = np.random.default_rng(0).normal(size=(3, model.config.hidden_size)).astype(np.float32)
    assert generation._in_chunks(model)
    monkeypatch.setattr(generation, "_WIDENED", 8 * model.config.hidden_size)
    found = jax.jit(generation._logits)(model, x)
    np.testing.assert_allclose(found, model.unembed(jnp.asarray(x)), rtol=1e-6, atol=1e-6)


def test_a_stop_token_ends_a_response_and_a_limit_cuts_it():
    free = answers(PROMPTS)
    stop = free[1].tokens[5]
    for prompt, whole in zip(PROMPTS, free, strict=True):
        (found,) = answers([prompt], stop={stop, 60})
        end = next((i for i, t in enumerate(whole.tokens) if t in (stop, 60)), None)
        assert found.tokens == whole.tokens[:end]
        assert found.stopped == (end is not None)
    assert answers(PROMPTS, stop={stop, 60})[1].stopped
    # The stop token may be the last that there is room for.
    first = free[1].tokens.index(stop)
    for limit, stopped in ((first, False), (first + 1, True)):
        (found,) = answers(PROMPTS[1:2], stop={stop}, sampling=Sampling(limit))
        assert found == Generated(free[1].tokens[:first], stopped)


def test_responses_are_told_as_they_end():
    told = []
    found = answers(PROMPTS + LONG, ended=told.append)
    assert [len(each) for each in told] == [2, 4, 1]  # the longest prompts first; batches of four
    assert {key: value for each in told for key, value in each.items()} == dict(enumerate(found))
    assert answers([], ended=told.append) == [] and len(told) == 3


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 61]]}, "prompt 0 has the token 61, outside the vocabulary of 61"),
        ({"prompts": [[1, -1]]}, "token -1"),
        ({"prompts": [[1] * 53]}, "53 tokens, and 12 more are to follow: the model has 64"),
        ({"stop": {61}}, "stop token 61 is outside"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": [-1]}, "seed -1"),
        ({"seeds": [2**32]}, "seed 4294967296"),
        ({"sampling": Sampling(max_tokens=0)}, "max_tokens = 0"),
        ({"sampling": Sampling(temperature=-0.1)}, "temperature = -0.1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature = nan"),
        ({"sampling": Sampling(temperature=float("inf"))}, "temperature = inf"),
        ({"sampling": Sampling(top_p=0)}, "top_p = 0"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p = 1.5"),
        ({"sampling": Sampling(top_k=-1)}, "top_k = -1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"cache_dtype": "float16"}, "cache_dtype = 'float16': not one of bfloat16"),
        ({"memory": 1000, "batch_size": None}, "too little for a single prompt"),
    ],
)
def test_what_cannot_be_used_is_refused(asked, message):
    with pytest.raises(InputError, match=message):
        answers(**{"prompts": [[1]]} | asked)


@pytest.mark.parametrize(
    "scale, shift, prompts, message",
    [
        ((3, 40), (3, 41), 1, r"neuron has a shift of \(3, 41\); it must be \(3, 40\)"),
        ((2, 1), (3, 1), 1, r"a scale of \(2, 1\)"),
        ((3,), (3,), 1, r"a scale of \(3,\)"),
        ((3, 1), (2, 3, 40), 3, r"a shift of \(2, 3, 40\); it must be \(3, 3, 40\)"),
    ],
)
def test_holds_that_do_not_fit_are_refused(scale, shift, prompts, message):
    held = Hold.affine("neuron", np.zeros(scale), np.zeros(shift))
    with pytest.raises(ValueError, match=message):
        answers([[1]] * prompts, holds=[held])


def test_a_hold_of_the_embedding_is_refused():
    with pytest.raises(ValueError, match="not on embedding"):
        answers([[1]], holds=[Hold.affine("embedding", np.zeros((3, 1)), np.zeros((3, 1)))])


def test_the_batch_fits_the_memory():
    """With more of it rows are more, up to a constant; long prompts, and a shift of each prompt's
    own, take some."""
    model, prompts = decoder(), [[1], [1] * 60]

    def rows(memory, holds=()):
        found = batches.answered_together(
            model, holds, prompts, room=16, kept_as="float32", memory=memory
        )
        assert list(found) == [64, 32]  # the longest first: if it does not fit, that shows at once
        return [found[32], found[64]]

    first = 850_000
    sizes = np.array([rows(first * 2**n) for n in range(10)])
    assert (np.diff(sizes, axis=0) >= 0).all() and (sizes[0] < sizes[-1]).all()
    assert (sizes[:, 0] >= sizes[:, 1]).all() and (sizes[0, 0] > sizes[0, 1])
    assert all(row.bit_count() == 1 for row in sizes.ravel().tolist())
    held = holding.fitted(model.config, [hold(Site.NEURON, prompts=2)] * 99, 2)
    assert rows(first, held)[0] < sizes[0, 0]


def test_products_are_float32(monkeypatch):
    """On accelerators the default is less; a product's precision is settled where it is traced."""
    seen = []

    def watched(original):
        def run(*arguments, **named):
            seen.append(jax.config.jax_default_matmul_precision)
            return original(*arguments, **named)

        return run

    for module, name in (
        (generation, "fill"),
        (generation, "advance"),
        (likelihood, "response_logprobs"),
        (likelihood, "response_divergences"),
    ):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    answers([[1, 2]])
    likelihood.logprobs(decoder(), [([1], [2])])
    likelihood.kl(decoder(), [([1], [2])], [])
    assert seen == [generation.PRECISION] * 4 == ["float32"] * 4


def test_logits_that_are_not_finite_are_an_error():
    """Of which the likeliest would be any, and whose prompts would drop out of every mean."""
    far = Hold.affine("layer", np.ones((3, 1)), np.full((3, 1), 3e38, np.float32))
    with pytest.raises(InputError, match="logits are not finite: what is held is too far"):
        answers([[1, 2], [3, 4]], holds=[own_shift(far, [0.0, 1.0])])
    for read in (likelihood.logprobs, likelihood.kl):
        with pytest.raises(InputError, match="logits are not finite: what is held"):
            read(decoder(), [([1], [2])], holds=[far])


def own_shift(held, factors):
    """The hold with these multiples of its shift, of each prompt its own."""
    return Hold.affine(held.site, held.scale, np.stack([held.shift * f for f in factors]))
