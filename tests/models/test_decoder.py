"""The decoder: edits at every site, traces, caches and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder as decoder_lib
from models.decoder import KEPT
from models.edits import Edit
from models.layers import Cache
from models.sites import Site
from tests import tiny

TOKENS = np.array([5, 17, 3, 42, 8, 23, 60])
T = len(TOKENS)
MIDDLE = np.isin(np.arange(T), [2, 4])


# Edits take the same way through families that differ in data alone.
DISTINCT = ("llama", "gemma2", "gemma3_text", "olmo2", "gpt2", "gpt_neox")


@pytest.fixture(scope="module", params=tiny.costly_families())
def decoder(request):
    return tiny.decoder(request.param)


@pytest.fixture(scope="module", params=tiny.costly_families(DISTINCT))
def distinct(request):
    return tiny.decoder(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny.decoder("llama")


@functools.cache
def plain(decoder):
    return decoder(TOKENS)


def test_a_trace_is_consistent_with_itself(decoder):
    logits, trace = plain(decoder)
    steps = np.concatenate([trace.embedding[None], trace.residual])
    np.testing.assert_allclose(np.diff(steps, axis=0), trace.layer, atol=2e-6)
    np.testing.assert_allclose(trace.attention + trace.mlp, trace.layer, atol=1e-6)
    for layer in range(decoder.config.num_layers):
        block = decoder.block(layer)
        for added, module, norm, value in (
            (trace.attention, block.attention, block.attention_post_norm, trace.head),
            (trace.mlp, block.mlp, block.mlp_post_norm, trace.neuron),
        ):
            written = module.write(value[layer])
            written = written if norm is None else norm(written)
            np.testing.assert_allclose(written, added[layer], atol=1e-5)
    np.testing.assert_allclose(decoder.unembed(trace.residual[-1]), logits, atol=1e-6)
    chosen = decoder.unembed(trace.residual[-1], np.array([3, 1]))
    np.testing.assert_allclose(chosen, logits[:, [3, 1]], atol=1e-5)


def spread(edit, value):
    """The same edit of a site that has this value, with arrays of one shape for all edits: a run
    with them is compiled once."""
    units = edit.units
    if units is None and edit.site in (Site.HEAD, Site.NEURON):
        units = np.ones(value.shape[1], bool)
    scale, shift = (np.broadcast_to(part, value.shape) for part in (edit.scale, edit.shift))
    return Edit.affine(edit.site, edit.layer, edit.positions, scale, shift, units)


@pytest.mark.parametrize("shape", [(T, 24), (T, 4, 8), (T, 40)])
def test_scale_shift_and_units_are_broadcast_to_the_site(shape):
    value = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    site = {(T, 4, 8): Site.HEAD, (T, 40): Site.NEURON}.get(shape, Site.MLP)
    along = np.linspace(-3.0, 3.0, shape[-1])
    for scale, shift in ((0.5, 0.25), (0.0, along), (1.0, along), (along, 0.0), (2.0, value)):
        edit = Edit.affine(site, 1, MIDDLE, scale, shift)
        where = np.expand_dims(MIDDLE, tuple(range(1, value.ndim)))
        want = np.where(where, scale * value + shift, value)
        np.testing.assert_allclose(edit.apply(value), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(spread(edit, value).apply(value), edit.apply(value))


# Numbers of a fixed type: those of Python would be compiled as another.
NOTHING, ONCE, TWICE = np.float32([0, 1, 2])


@pytest.mark.parametrize("site", list(Site))
def test_no_edit_is_exactly_no_edit(distinct, site):
    """(1, 0), and a patch of nothing, change no bit."""
    logits, trace = plain(distinct)
    value = getattr(trace, site.value)
    value = value if site == Site.EMBEDDING else value[1]
    edits = [
        Edit.affine(site, 1, np.ones(T), ONCE, NOTHING),
        Edit.steer(site, 1, np.ones(T), NOTHING),
        Edit.patch(site, 1, np.zeros(T), np.float32(99)),
        Edit.patch(site, 1, np.ones(T), value),
    ]
    # As they are, in the families with most norms.
    as_they_are = edits if distinct.config.family.startswith("gemma") else []
    for edit in [spread(edit, value) for edit in edits] + as_they_are:
        np.testing.assert_array_equal(distinct(TOKENS, edits=[edit])[0], logits)


@pytest.mark.parametrize("site", list(Site))
def test_an_edit_changes_its_own_positions_layer_and_units_alone(distinct, site):
    logits, trace = plain(distinct)
    units = {Site.HEAD: np.arange(4) == 2, Site.NEURON: np.arange(40) == 11}.get(site)
    # A norm may take away what all channels have in common.
    shift = np.linspace(-3.0, 3.0, getattr(trace, site.value).shape[-1])
    value = getattr(trace, site.value)
    value = value if site == Site.EMBEDDING else value[1]
    edit = spread(Edit.affine(site, 1, MIDDLE, 0.5, shift, units), value)
    edited, after = distinct(TOKENS, edits=[edit])
    old, new = (np.asarray(getattr(run, site.value)) for run in (trace, after))
    if site != Site.EMBEDDING:
        np.testing.assert_array_equal(new[0], old[0])
        old, new = old[1], new[1]
    changed = new != old
    if units is not None:
        assert changed[:, units].all(axis=tuple(range(1, changed.ndim)))[MIDDLE].all()
        # Its own layer's other heads and neurons are computed before or beside it.
        assert not changed[:, ~units].any()
        changed = changed[:, units]
    assert not changed[~MIDDLE][:2].any()  # before the first edit nothing can have changed
    want = 0.5 * old[MIDDLE] + shift
    mask = np.ones(old.shape[1], bool) if units is None else units
    np.testing.assert_allclose(new[MIDDLE][:, mask], want[:, mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(edited[:2], logits[:2])
    assert np.all(edited[2:] != logits[2:])


def test_a_list_of_edits_is_a_joint_intervention(distinct):
    first = Edit.patch("neuron", 0, np.ones(T), 2.0, np.arange(40) == 7)
    second = Edit.patch("mlp", 2, MIDDLE, 0.0)
    _, trace = distinct(TOKENS, edits=[first, second])
    assert np.all(trace.neuron[0][:, 7] == 2.0)
    assert np.all(trace.mlp[2][MIDDLE] == 0.0)
    # Two edits of the same value are made in their order.
    doubled = [
        Edit.affine("mlp", 1, MIDDLE, TWICE, NOTHING),
        Edit.steer("mlp", 1, MIDDLE, ONCE),
    ]
    once, swapped = (distinct(TOKENS, edits=e)[1].mlp[1] for e in (doubled, doubled[::-1]))
    np.testing.assert_allclose(swapped[MIDDLE], once[MIDDLE] + 1.0, rtol=1e-5)


def test_a_patch_selects_and_never_multiplies(distinct):
    """A unit whose value is not finite can still be patched out."""
    broken = Edit.patch("mlp", 1, MIDDLE, np.inf)
    mended = Edit.patch("mlp", 1, MIDDLE, plain(distinct)[1].mlp[1])
    np.testing.assert_array_equal(distinct(TOKENS, edits=[broken, mended])[0], plain(distinct)[0])


def test_edits_can_be_vmapped(distinct):
    def logits(layer, unit):
        return distinct(
            TOKENS, edits=[Edit.patch("neuron", layer, MIDDLE, 1.0, jnp.arange(40) == unit)]
        )[0]

    layers, units = np.array([0, 2, 1]), np.array([3, 39, 0])
    together = jax.vmap(logits)(layers, units)
    alone = np.stack([logits(*unit) for unit in zip(layers, units, strict=True)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("family", tiny.costly_families())
def test_a_cached_prefix_changes_nothing(family):
    """In float64: how the two round in float32 differs from version to version of XLA."""
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        logits, trace = decoder(TOKENS)
        prefix = decoder(TOKENS[:4])[1].cache
        rest, rest_trace = decoder(TOKENS[4:], cache=prefix)
        np.testing.assert_allclose(rest, logits[4:], atol=1e-13)
        np.testing.assert_allclose(rest_trace.residual, trace.residual[:, 4:], atol=1e-13)
        # Room at the cache's end that holds no token is not seen.
        room = ((0, 0), (0, 3), (0, 0), (0, 0))
        padded = Cache(
            keys=jnp.pad(prefix.keys, room),
            values=jnp.pad(prefix.values, room),
            positions=jnp.arange(7),
            valid=jnp.arange(7) < 4,
        )
        np.testing.assert_allclose(decoder(TOKENS[4:], cache=padded)[0], logits[4:], atol=1e-13)


@pytest.mark.parametrize(
    "sites", [("residual",), ("embedding", Site.HEAD), ("values", "keys", "neuron"), ()]
)
def test_a_trace_holds_what_was_asked_for_and_nothing_else(llama, sites):
    logits, full = plain(llama)
    found, trace = llama(TOKENS, sites=sites)
    np.testing.assert_array_equal(found, logits)
    held = {name for name in KEPT if getattr(trace, name) is not None}
    assert held == set(sites)
    for name in held:
        np.testing.assert_array_equal(getattr(trace, name), getattr(full, name))
    # Nor does the loop over layers stack anything else.
    jaxpr = jax.make_jaxpr(lambda tokens: llama(tokens, sites=sites))(TOKENS)
    [run] = [eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.primitive.name == "jit"][-1:]
    [loop] = [eqn for eqn in run.eqns if eqn.primitive.name == "scan"]
    stacked = [each for each in loop.outvars if each.aval.shape[:1] == (loop.params["length"],)]
    assert len(stacked) == len(held - {"embedding"})


def test_a_trace_without_keys_and_values_is_no_prefix(llama):
    with pytest.raises(ValueError, match="did not keep 'values': name it"):
        _ = llama(TOKENS, sites=("residual", "keys"))[1].cache
    prefix = llama(TOKENS[:4], sites=("keys", "values"))[1].cache
    np.testing.assert_array_equal(
        llama(TOKENS[4:], cache=prefix)[0],
        llama(TOKENS[4:], cache=llama(TOKENS[:4])[1].cache)[0],
    )


def test_logits_are_those_of_the_positions_asked_for(llama):
    logits, full = plain(llama)
    found, trace = llama(TOKENS, positions=[6, 2])
    np.testing.assert_allclose(found, logits[np.array([6, 2])], rtol=1e-6, atol=1e-6)
    for name in KEPT:  # the trace has all positions
        np.testing.assert_array_equal(getattr(trace, name), getattr(full, name))
    assert llama(TOKENS, positions=())[0].shape == (0, 61)
    shapes = [
        var.aval.shape
        for eqn in _equations(jax.make_jaxpr(lambda t: llama(t, positions=[6, 2]))(TOKENS))
        for var in eqn.outvars
    ]
    assert (2, 61) in shapes and (T, 61) not in shapes


def _equations(jaxpr):
    """Of a program and of those within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                yield from _equations(value)


def test_each_row_of_a_batch_may_ask_for_its_own_positions(llama):
    batch = np.stack([TOKENS, TOKENS[::-1]])
    logits, _ = llama(batch)
    own, _ = llama(batch, positions=[[6, 2], [0, 1]], sites=())
    np.testing.assert_allclose(own[0], logits[0, np.array([6, 2])], atol=1e-6)
    np.testing.assert_allclose(own[1], logits[1, np.array([0, 1])], atol=1e-6)
    shared, _ = llama(batch, positions=[3], sites=())
    np.testing.assert_allclose(shared[:, 0], logits[:, 3], atol=1e-6)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"positions": [7]}, "logits are wanted at position 7, and there are 7 tokens"),
        ({"positions": [0, -1]}, "at position -1"),
        ({"sites": ("residual", "logits")}, "'logits' is no site; a run can keep embedding, "),
    ],
)
def test_positions_and_sites_that_are_not_there_are_refused(asked, message, llama):
    with pytest.raises(ValueError, match=message):
        llama(TOKENS, **asked)


@pytest.mark.parametrize("side", ["left", "right", "mixed", "both"])
def test_padding_and_batching_change_nothing(decoder, side):
    """Neither the logits, nor what an edit of each row's last token changes."""
    # Two lengths, of which each is compiled alone.
    rows = [TOKENS, TOKENS[:4], TOKENS[3:]]
    batch, valid = np.zeros((3, 9), int), np.zeros((3, 9), bool)
    for row, (tokens, real) in enumerate(zip(rows, map(len, rows), strict=True)):
        start = {"left": 9 - real, "right": 0, "mixed": (row % 2) * (9 - real), "both": 1}[side]
        batch[row, start : start + real], valid[row, start : start + real] = tokens, True
    logits, trace = decoder(batch, valid=valid)
    assert trace.neuron.shape == (3, 3, 9, 40)
    last = valid & (np.cumsum(valid, axis=1) == valid.sum(axis=1, keepdims=True))
    changes = _edited(decoder, batch, valid, last) - logits
    for row, tokens in enumerate(rows):
        alone = decoder(tokens)[0]
        assert np.abs(logits[row][valid[row]] - alone).max() <= 1e-6 * np.abs(alone).max()
        every, end = (
            np.ones((1, len(tokens)), bool),
            np.arange(len(tokens))[None] == len(tokens) - 1,
        )
        change = (_edited(decoder, tokens[None], every, end)[0] - alone)[-1]
        assert np.abs(changes[row][last[row]] - change).max() <= 1e-6 * np.abs(change).max()


@jax.jit
def _edited(decoder, batch, valid, positions):
    """Logits when each row's residual stream is set to another at that row's positions."""

    def run(tokens, valid, positions):
        edit = Edit.patch("residual", 1, positions, jnp.linspace(-3.0, 3.0, 24))
        return decoder(tokens, edits=[edit], valid=valid)[0]

    return jax.vmap(run)(batch, valid, positions)


def test_a_batch_shares_its_edits(distinct):
    edit = Edit.patch("mlp", 1, MIDDLE, 0.0)
    batch = np.stack([TOKENS, TOKENS[::-1]])
    together = distinct(batch, edits=[edit])[0]
    for row, tokens in zip(together, batch, strict=True):
        np.testing.assert_allclose(row, distinct(tokens, edits=[edit])[0], atol=2e-6)


def test_a_bfloat16_checkpoint_has_unrounded_activations():
    decoder = tiny.decoder("llama", dtype="bfloat16")
    logits, trace = decoder(TOKENS)
    assert decoder.dtype == jnp.bfloat16
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder)} == {2}
    assert logits.dtype == trace.neuron.dtype == jnp.float32


@pytest.mark.parametrize(
    "edit, message",
    [
        (Edit.patch("mlp", 3, np.ones(T), 0.0), "layer 3, the model has 3 layers"),
        (Edit.patch("mlp", -1, np.ones(T), 0.0), "layer -1"),
        (Edit.patch("mlp", 0, [True], 0.0), r"\(1,\) positions, the run has 7 tokens"),
        (Edit.patch("neuron", 0, np.ones(T), 0.0, [True]), r"\(1,\) units, the site has 40"),
        (Edit.patch("mlp", 0, np.ones(T), 0.0, np.ones(24)), "the site has none"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(edit, message, llama):
    with pytest.raises(ValueError, match=message):
        llama(TOKENS, edits=[edit])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_more_tokens_than_positions_are_refused(family):
    """A learned position that is not there must not be taken for the last one."""
    decoder = tiny.decoder(family, max_positions=8)
    decoder(np.arange(12), valid=np.arange(12) < 8)
    with pytest.raises(ValueError, match="9 tokens, and the model has 8 positions"):
        decoder(np.arange(9))
    prefix = decoder(np.arange(5))[1].cache
    with pytest.raises(ValueError, match="9 tokens, and the model has 8 positions"):
        decoder(np.arange(4), cache=prefix)


def test_tokens_outside_the_vocabulary_are_refused_and_a_list_is_taken(llama):
    with pytest.raises(ValueError, match="outside the vocabulary of 61"):
        llama([1, 61])
    np.testing.assert_array_equal(llama(TOKENS.tolist())[0], llama(TOKENS)[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", r"these are str .* tokenizer\(text\)\['input_ids'\] makes them"),
        (["a", "text"], "these are list .* takes token ids"),
        ({"input_ids": [1, 2]}, "these are dict .* takes token ids"),
        ([1.0, 2.5], r"these are list \(float64\)"),
        ([[1, 2], [3]], "rows of a batch must be of one length"),
    ],
)
def test_what_is_no_token_ids_is_told_what_to_give(given, message):
    with pytest.raises(TypeError, match=f"^tokens: {message}"):
        decoder_lib._token_ids(given)


def test_branches_are_runs_of_their_own(distinct):
    """Three tokens, and two continuations that do not see each other; the windows are shorter."""
    first, second = TOKENS[3:5], np.array([11, 12, 13])
    together = np.concatenate([TOKENS[:3], first, second])
    branches = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    logits, trace = distinct(together, branches=branches)
    assert trace.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    for branch, continuation in ((1, first), (2, second)):
        alone, _ = distinct(np.concatenate([TOKENS[:3], continuation]))
        rows = np.flatnonzero((branches == 0) | (branches == branch))
        np.testing.assert_allclose(logits[rows], alone, atol=2e-6)
    # That one sees the other would show.
    assert np.abs(logits[5:] - distinct(together)[0][5:]).max() > 1e-3
    with pytest.raises(ValueError, match=r"branches of \(7,\) tokens, the run has 8"):
        distinct(together, branches=branches[1:])
