"""Holds, and the slow definition of what they do: edits of a plain run of the whole sequence."""

import functools

import jax
import numpy as np

from models.edits import Edit, Hold
from models.sites import Site
from tests import tiny

# Those that differ in what a cache, positions, windows and caps have to do with.
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3_text", "gpt_neox")
SIZE = 64  # positions of the tiny models
ROWS = 4  # of every batch, so that compilations are shared
_RNG = np.random.default_rng(0)
PROMPTS = [_RNG.integers(0, 61, length).tolist() for length in (1, 3, 9, 20, 32)]
LONG = [_RNG.integers(0, 61, length).tolist() for length in (34, 50)]
SITES = [site for site in Site if site != Site.EMBEDDING]


@functools.cache
def decoder(family="llama"):
    return tiny.decoder(family)


def shape(site, config):
    heads = config.num_heads, config.head_dim
    inside = {Site.HEAD: heads, Site.NEURON: (config.intermediate_size,)}
    return config.num_layers, *inside.get(site, (config.hidden_size,))


def hold(site, family="llama", *, prompts=None, seed=0, **where):
    """A hold that patches some entries of the site, and scales and shifts others."""
    rng, full = np.random.default_rng(seed), shape(site, decoder(family).config)
    scale = rng.choice([0.0, 0.5, 1.0], full).astype(np.float32)
    own = full if prompts is None else (prompts, *full)
    shift = np.where(scale == 1, 0, rng.normal(0, 0.5, own)).astype(np.float32)
    return Hold.affine(site, scale, shift, **where)


def edits_of(hold, prompt_length):
    """The hold as edits of every layer in a run of SIZE tokens."""
    positions = np.arange(SIZE)
    where = hold.at_generated & (positions >= prompt_length)
    where |= hold.at_prompt & (positions < prompt_length - 1)
    where |= hold.at_last & (positions == prompt_length - 1)
    return [
        Edit.affine(hold.site, np.int32(layer), where, scale, shift)
        for layer, (scale, shift) in enumerate(
            zip(np.asarray(hold.scale), np.asarray(hold.shift), strict=True)
        )
    ]


@jax.jit
def _all_logits(decoder, tokens, valid, edits):
    return decoder(tokens, valid=valid, edits=edits)[0]


def logits_after(family, tokens, edits=()):
    """Logits [T, V] of a plain run of the whole sequence."""
    padded = np.zeros(SIZE, np.int32)
    padded[: len(tokens)] = tokens
    valid = np.arange(SIZE) < len(tokens)
    return np.asarray(_all_logits(decoder(family), padded, valid, list(edits)))[: len(tokens)]


def nothing(family="llama"):
    """Holds of every site that change nothing."""
    shapes = {site: shape(site, decoder(family).config) for site in SITES}
    return [
        Hold.affine(site, np.ones(full, np.float32), np.zeros(full, np.float32))
        for site, full in shapes.items()
    ]
