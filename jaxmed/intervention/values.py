"""What units are held at, and where."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed.behaviour import batches
from jaxmed.engine import shard
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
    decoder: Decoder,
    prompts: Sequence[Sequence[Sequence[int]]],
    sites: Sequence[Site],
    *,
    memory: int | None = None,
) -> Values:
    """Values of sites, [B, L, ...]: the mean over positions before a prompt's last, and its last's.

    A prompt of one token has nothing before its last; there its last counts.

    Args:
        decoder: the model.
        prompts: token ids of the prompts, one or several in a row of the result, which has their
            mean.
        sites: which.
        memory: bytes; `memory.free()` by default.

    Raises:
        InputError: the longest prompt does not fit.
    """
    rows = [row for row, several in enumerate(prompts) for _ in several]
    tokens = [one for several in prompts for one in several]
    found = [dict.fromkeys(sites, np.zeros(2, np.float32)) for _ in prompts]
    for place, values in _of_prompts(decoder, tokens, sites, memory):
        row = rows[place]
        for site, value in values.items():
            found[row][site] = _plus(found[row][site], value / np.float32(len(prompts[row])))
    return {
        site: (np.stack([row[site][0] for row in found]), np.stack([row[site][1] for row in found]))
        for site in sites
    }


def group_means(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    groups: Mapping[str, Bool[np.ndarray, "B"]],
    sites: Sequence[Site],
    *,
    memory: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Values]:
    """Means over groups of prompts, of what `activations` gives; each prompt is run once.

    Args:
        decoder: the model.
        prompts: token ids.
        groups: which prompts are in each; one without any has no mean.
        sites: which.
        memory: bytes; `memory.free()` by default.
        progress: told how many more prompts were run.

    Raises:
        InputError: the longest prompt does not fit.
    """
    sums = {name: dict.fromkeys(sites, np.zeros(2)) for name in groups}
    for row, values in _of_prompts(decoder, prompts, sites, memory):
        for name, members in groups.items():
            for site in sites if members[row] else ():
                sums[name][site] = _plus(sums[name][site], values[site])
        if progress is not None:
            progress(1)
    found = {}
    for name, members in groups.items():
        if number := members.sum():
            means = {site: total / number for site, total in sums[name].items()}
            found[name] = {site: (mean[0], mean[1]) for site, mean in means.items()}
    return found


def _plus(total: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The sum, in the total's type; a total that has nothing yet has only the first axis."""
    return total.reshape(total.shape + (1,) * (value.ndim - total.ndim)) + value


@jax.default_matmul_precision("float32")
def _of_prompts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sites: Sequence[Site],
    memory: int | None,
) -> Iterator[tuple[int, dict[Site, Float[np.ndarray, "2 L ..."]]]]:
    """The place of each prompt, and its values: the mean before its last position, and its last's.

    Prompts of like length are run together.
    """
    kept = decoder.config.num_layers * sum(_width(decoder.config, site) for site in sites)
    rows = batches.sizes(decoder, (), prompts, kept=kept, memory=memory)
    for length, members in batches.by_length(prompts, rows.__getitem__):
        # Whole batches alone, so that a length is compiled once.
        filled = members + members[:1] * (rows[length] - len(members))
        ends = np.array([len(prompts[member]) for member in filled])[:, None]
        positions = np.arange(length)
        before, last = positions < ends - 1, positions == ends - 1
        weights = np.stack([np.where(ends > 1, before, last), last], axis=1).astype(np.float32)
        weights /= weights.sum(axis=2, keepdims=True)
        tokens = batches.padded([prompts[member] for member in filled], length)
        means = _means(decoder, tokens, positions < ends, weights, tuple(sites))
        means = {site: np.asarray(mean, np.float32) for site, mean in means.items()}
        for row, member in enumerate(members):
            yield member, {site: mean[row] for site, mean in means.items()}


def _width(config: DecoderConfig, site: Site) -> int:
    """Numbers of a site at one position of a layer."""
    own = {Site.HEAD: config.num_heads * config.head_dim, Site.NEURON: config.intermediate_size}
    return own.get(site, config.hidden_size)


@functools.partial(jax.jit, static_argnames="sites")
def _means(
    decoder: Decoder,
    tokens: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    weights: Float[Array, "B W N"],
    sites: tuple[Site, ...],
) -> dict[Site, Float[Array, "B W L ..."]]:
    """Weighted sums over positions of sites' values in plain runs, for each row of weights."""

    def step(decoder, tokens, valid, weights):
        trace = decoder(tokens, valid=valid, positions=(), sites=sites)[1]
        return {
            site: jnp.einsum("bwn,bln...->bwl...", weights, getattr(trace, site.value))
            for site in sites
        }

    own = shard.rows(0)
    return shard.over(step, decoder, tokens, valid, weights, given=(own,) * 3, gives=own)
