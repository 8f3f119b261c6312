"""What units are held at, and where."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.engine import capture
from jaxmed.intervention.units import Unit, masks
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Hold
from models.sites import Site

# Positions at which units are held, and whether these are the prompt's before its last token, its
# last token, and those of generated tokens.
POSITIONS = {
    "all": (True, True, True),
    "prompt": (True, True, False),
    "answer": (False, True, True),
}

# What units are held at, [L, ...] or for each prompt its own [B, L, ...]: at the prompt's
# positions before its last, and at its last and those of generated tokens.
Values = Mapping[Site, tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]]


def holds(
    units: Sequence[Unit],
    values: Values,
    strength: float,
    positions: str,
    config: DecoderConfig,
) -> tuple[Hold, ...]:
    """Holds that move units by a share of the way to values: y <- (1 - strength) y + strength v.

    Strength 1 holds a unit at its value, one below 1 damps what it does beyond that, and one above
    1 overshoots. Value 0 and strength s is damping by the factor 1 - s.

    Args:
        units: the units.
        values: of every site that they are of.
        strength: share of the way.
        positions: one of `POSITIONS`.
        config: of the model.
    """
    at_prompt, at_last, at_generated = POSITIONS[positions]
    found = []
    for site, mask in masks(units, config).items():
        scale = jnp.asarray(np.where(mask, 1 - strength, 1), jnp.float32)
        before, last = values[site]
        if at_prompt:
            shift = jnp.asarray(np.where(mask, strength * before, 0), jnp.float32)
            found.append(Hold.affine(site, scale, shift, at_last=False, at_generated=False))
        if at_last or at_generated:
            shift = jnp.asarray(np.where(mask, strength * last, 0), jnp.float32)
            places = {"at_prompt": False, "at_last": at_last, "at_generated": at_generated}
            found.append(Hold.affine(site, scale, shift, **places))
    return tuple(found)


def zero(sites: Sequence[Site], config: DecoderConfig) -> Values:
    """The value 0 of each site."""
    found = {}
    for site in sites:
        nothing = np.zeros((1, 1, 1) if site == Site.HEAD else (1, 1))
        found[site] = nothing, nothing
    return found


def activations(
    decoder: Decoder, prompts: Sequence[Sequence[Sequence[int]]], sites: Sequence[Site]
) -> Values:
    """Values of sites, [B, L, ...]: the mean over positions before a prompt's last, and its last's.

    A prompt of one token has nothing before its last; there its last counts.

    Args:
        decoder: the model.
        prompts: token ids of the prompts, one or several in a row of the result, which has their
            mean.
        sites: which.
    """
    found = {site: ([], []) for site in sites}
    for several in prompts:
        values = [_of_prompt(decoder, tokens, sites) for tokens in several]
        for site in sites:
            for place, kept in enumerate(found[site]):
                value = np.mean([each[site][place] for each in values], axis=0)
                kept.append(value.astype(np.float32))
    return {site: (np.stack(before), np.stack(last)) for site, (before, last) in found.items()}


def group_means(
    decoder: Decoder,
    prompts: Iterable[Sequence[int]],
    groups: Mapping[str, Bool[np.ndarray, "B"]],
    sites: Sequence[Site],
) -> dict[str, Values]:
    """Means over groups of prompts, of what `activations` gives; each prompt is run once.

    Args:
        decoder: the model.
        prompts: token ids.
        groups: which prompts are in each; one without any has no mean.
        sites: which.
    """
    sums = {name: {site: [0.0, 0.0] for site in sites} for name in groups}
    for row, tokens in enumerate(prompts):
        values = _of_prompt(decoder, tokens, sites)
        for name, members in groups.items():
            for site in sites if members[row] else ():
                for place in range(2):
                    sums[name][site][place] = sums[name][site][place] + values[site][place]
    found = {}
    for name, members in groups.items():
        if number := members.sum():
            found[name] = {
                site: (before / number, last / number)
                for site, (before, last) in sums[name].items()
            }
    return found


@jax.default_matmul_precision("float32")
def _of_prompt(
    decoder: Decoder, tokens: Sequence[int], sites: Sequence[Site]
) -> dict[Site, Float[np.ndarray, "2 L ..."]]:
    """A prompt's values: the mean before its last position, and its last's."""
    padded, valid = capture.pad(tuple(tokens))
    index = np.arange(len(padded))
    before, last = valid & (index < len(tokens) - 1), index == len(tokens) - 1
    weights = np.stack([before if before.any() else last, last]).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    means = _means(decoder, padded, valid, weights, tuple(sites))
    return {site: np.asarray(mean, np.float64) for site, mean in means.items()}


@functools.partial(jax.jit, static_argnames="sites")
def _means(
    decoder: Decoder,
    tokens: Int[Array, "N"],
    valid: Bool[Array, "N"],
    weights: Float[Array, "W N"],
    sites: tuple[Site, ...],
) -> dict[Site, Float[Array, "W L ..."]]:
    """Weighted sums over positions of sites' values in a plain run, for each row of weights."""
    trace = decoder(tokens, valid=valid, positions=(), sites=sites)[1]
    return {
        site: jnp.einsum("wn,ln...->wl...", weights, getattr(trace, site.value)) for site in sites
    }
