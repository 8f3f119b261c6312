"""Which units are held still while a model generates, and at what values.

Shapes: L layers, U units of a layer (heads or neurons), d hidden size; a site's value in all layers
is [L, I] for neurons, [L, H, h] for heads and [L, d] for modules.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmed import capture, scoring
from jaxmed.planning import SITES
from jaxmed.results import Results
from models.config import DecoderConfig
from models.decoder import Decoder
from models.edits import Hold, Site
from models.errors import InputError

GRANULARITIES = ("neuron", "head", "module")  # of the units that can be held
BY = ("max", "nie", "tie", "joint")
# Positions at which units are held, and whether these are the prompt's before its last token, its
# last token, and those of generated tokens.
POSITIONS = {
    "all": (True, True, True),
    "prompt": (True, True, False),
    "answer": (False, True, True),
}
_NEGLIGIBLE = 1e-6  # of a layer's largest
NEIGHBOURS = 8  # of the most similar units, among which a control is drawn

# What units are held at, [L, ...] or for each prompt its own [B, L, ...]: at the prompt's
# positions before its last, and at its last and those of generated tokens.
Values = Mapping[Site, tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]]


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """A head, a neuron or a module.

    Attributes:
        site: head, neuron, attention or mlp.
        layer: its layer.
        index: of the head or neuron; None for a module.
    """

    site: Site
    layer: int
    index: int | None = None

    def __str__(self) -> str:
        """As `named` reads it."""
        place = self.layer if self.index is None else f"{self.layer}.{self.index}"
        return f"{self.site}:{place}"


def named(names: Sequence[str], config: DecoderConfig) -> list[Unit]:
    """Units by their names: neuron:LAYER.INDEX, head:LAYER.INDEX, attention:LAYER or mlp:LAYER.

    Raises:
        InputError: a name is none, or of a unit that the model does not have.
    """
    inside = {Site.NEURON: config.intermediate_size, Site.HEAD: config.num_heads}
    found = []
    for name in names:
        site, _, place = name.partition(":")
        numbers = place.split(".")
        whole = site in SITES["module"]
        if not (whole or site in inside) or not all(map(str.isdecimal, numbers)):
            raise InputError(
                f"--units={name}: name units neuron:LAYER.INDEX, head:LAYER.INDEX, attention:LAYER "
                "or mlp:LAYER"
            )
        sizes = [config.num_layers] + ([] if whole else [inside[Site(site)]])
        if len(numbers) != len(sizes):
            raise InputError(f"--units={name}: needs {'a layer' if whole else 'LAYER.INDEX'}")
        if any(int(number) >= size for number, size in zip(numbers, sizes, strict=True)):
            raise InputError(
                f"--units={name}: the model has {config.num_layers} layers"
                + ("" if whole else f" of {sizes[1]} {site}s")
                + ", numbered from 0"
            )
        found.append(Unit(Site(site), *map(int, numbers)))
    if len(set(found)) < len(found):
        raise InputError("--units: names a unit twice")
    return found


def strongest(results: Results, granularity: str, by: str, top: int) -> list[Unit]:
    """The units that a run ranks highest, the strongest first; of a joint set all that it has.

    Args:
        results: the run.
        granularity: one of `GRANULARITIES`.
        by: "nie" or "tie", the size of the mean effect; "max", the larger of both; or "joint".
        top: how many; 0 for all of a joint set.

    Raises:
        InputError: the run lacks what is asked for.
    """
    if granularity not in results.granularities or results.run.get("group_size", 1) > 1:
        raise InputError(
            f"{results.folder} has no effects of single {granularity}s: run launch.mediate with "
            f"--granularity={granularity}"
        )
    joint = [tuple(unit) for unit in results.run.get("joint", {}).get("picked", [])]
    if by == "joint":
        if granularity != "neuron" or not joint:
            raise InputError(
                f"{results.folder} has no joint set of {granularity}s: run launch.mediate with "
                "--joint_size=K, or choose --by=max"
            )
        top = top or len(joint)
        if top > len(joint):
            raise InputError(f"--top={top}: the joint set of {results.folder} has {len(joint)}")
        places = joint[:top]
    else:
        scores = scoring.rankings(results, granularity)[by]
        known = int(np.isfinite(scores).sum())
        if not 1 <= top <= known:
            raise InputError(f"--top={top}: {results.folder} ranks {known} {granularity}s")
        order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None, kind="stable")
        places = zip(*np.unravel_index(order[:top], scores.shape), strict=True)
    sites = SITES[granularity]
    if granularity == "module":
        return [Unit(sites[int(index)], int(layer)) for layer, index in places]
    return [Unit(sites[0], int(layer), int(index)) for layer, index in places]


def modules_of(units: Sequence[Unit]) -> list[Unit]:
    """The modules that heads or neurons belong to."""
    module = {Site.NEURON: Site.MLP, Site.HEAD: Site.ATTENTION}
    return sorted({Unit(module.get(unit.site, unit.site), unit.layer) for unit in units})


def masks(units: Sequence[Unit], config: DecoderConfig) -> dict[Site, Bool[np.ndarray, "L ..."]]:
    """Which units of each site these are, with the site's number of axes."""
    shapes = {
        Site.NEURON: (config.num_layers, config.intermediate_size),
        Site.HEAD: (config.num_layers, config.num_heads, 1),
    }
    found = {}
    for unit in units:
        shape = shapes.get(unit.site, (config.num_layers, 1))
        mask = found.setdefault(unit.site, np.zeros(shape, bool))
        mask[(unit.layer,) if unit.index is None else (unit.layer, unit.index)] = True
    return found


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
    before, last, generated = POSITIONS[positions]
    found = []
    for site, mask in masks(units, config).items():
        scale = jnp.asarray(np.where(mask, 1 - strength, 1), jnp.float32)
        for value, places in zip(
            values[site], ((before, False, False), (False, last, generated)), strict=True
        ):
            if any(places):
                shift = jnp.asarray(np.where(mask, strength * value, 0), jnp.float32)
                at = dict(zip(("at_prompt", "at_last", "at_generated"), places, strict=True))
                found.append(Hold.affine(site, scale, shift, **at))
    return tuple(found)


def zero(sites: Sequence[Site], config: DecoderConfig) -> Values:
    """The value 0 of each site."""
    axes = {Site.HEAD: 3}
    return {site: (np.zeros((1,) * axes.get(site, 2)),) * 2 for site in sites}


def activations(
    decoder: Decoder, prompts: Sequence[Sequence[Sequence[int]]], sites: Sequence[Site]
) -> dict[Site, tuple[Float[np.ndarray, "B L ..."], Float[np.ndarray, "B L ..."]]]:
    """Values of sites: the mean over positions before a prompt's last, and its last's.

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
    return {site: tuple(map(np.stack, both)) for site, both in found.items()}


def group_means(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
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
    return {
        name: {site: tuple(total / members.sum() for total in both) for site, both in own.items()}
        for (name, members), own in zip(groups.items(), sums.values(), strict=True)
        if members.any()
    }


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
    trace = decoder(tokens, valid=valid)[1]
    return {
        site: jnp.einsum("wn,ln...->wl...", weights, getattr(trace, site.value)) for site in sites
    }


def difference(left: Values, right: Values, site: Site) -> Float[np.ndarray, "L U"]:
    """How far heads or neurons are apart in two groups' means; the larger of the two places."""
    size = [
        np.abs(a - b) if site == Site.NEURON else np.linalg.norm(a - b, axis=-1)
        for a, b in zip(left[site], right[site], strict=True)
    ]
    return np.maximum(*size)


def output_norms(decoder: Decoder, site: Site) -> Float[np.ndarray, "L U"]:
    """Norm of the weights by which each head or neuron writes to the residual stream."""
    config = decoder.config
    if site == Site.NEURON:
        kernel = decoder.blocks.mlp.down.kernel[...]
        return np.linalg.norm(np.asarray(kernel, np.float32), axis=-1)
    kernel = np.asarray(decoder.blocks.attention.output.kernel[...], np.float32)
    by_head = kernel.reshape(config.num_layers, config.num_heads, -1)
    return np.linalg.norm(by_head, axis=-1)


def matched(
    units: Sequence[Unit],
    traits: Mapping[Site, Sequence[Float[np.ndarray, "L U"]]],
    rng: np.random.Generator,
) -> list[Unit] | None:
    """Random units like the given ones: of each layer and site as many, none of them the given,
    each drawn among the `NEIGHBOURS` that are most like one of them.

    Likeness is Euclidean distance of the traits' logarithms, each in its layer's standard
    deviations; below a millionth of a layer's largest, traits count as equal.

    Args:
        units: heads and neurons.
        traits: of each site, positive numbers of every unit.
        rng: of the draw.

    Returns:
        The units; None where a layer has too few others, or a unit is a module.
    """
    taken = set(units)
    found = []
    for place in rng.permutation(len(units)):
        unit = units[place]
        if unit.index is None:
            return None
        distance = _distances(unit, traits[unit.site])
        order = [
            int(index)
            for index in np.argsort(distance, kind="stable")
            if Unit(unit.site, unit.layer, int(index)) not in taken
        ]
        if not order:
            return None
        drawn = Unit(unit.site, unit.layer, int(rng.choice(order[:NEIGHBOURS])))
        taken.add(drawn)
        found.append(drawn)
    return sorted(found)


def _distances(unit: Unit, traits: Sequence[Float[np.ndarray, "L U"]]) -> Float[np.ndarray, "U"]:
    total = 0.0
    for trait in traits:
        of_layer = trait[unit.layer]
        least = max(_NEGLIGIBLE * of_layer.max(), np.finfo(np.float32).tiny)
        logarithm = np.log(np.maximum(of_layer, least))
        spread = logarithm.std() or 1.0
        total = total + ((logarithm - logarithm[unit.index]) / spread) ** 2
    return total
