"""Random units that are like given ones."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxmed.intervention.units import Unit
from jaxmed.intervention.values import Values
from models.decoder import Decoder
from models.layers import Linear
from models.products import numbers_on_host
from models.sites import Site

_NEGLIGIBLE = 1e-6  # of a layer's largest
NEIGHBOURS = 8  # of the most similar units, among which a control is drawn


_ATTEMPTS = 20  # to draw random units that were not drawn before

# Of each site, positive numbers of every unit: what units are alike in.
Traits = Mapping[Site, Sequence[Float[np.ndarray, "L U"]]]


def traits(decoder: Decoder, left: Values, right: Values) -> Traits:
    """What heads and neurons are compared by: how far two groups' means are apart in each, and the
    norm of what it writes."""
    return {
        site: (difference(left, right, site), output_norms(decoder, site))
        for site in left
        if site in (Site.NEURON, Site.HEAD)
    }


def difference(left: Values, right: Values, site: Site) -> Float[np.ndarray, "L U"]:
    """How far heads or neurons are apart in two groups' means; the larger of the two places."""
    before, last = (
        np.abs(a - b) if site == Site.NEURON else np.linalg.norm(a - b, axis=-1)
        for a, b in zip(left[site], right[site], strict=True)
    )
    return np.maximum(before, last)


def output_norms(decoder: Decoder, site: Site) -> Float[np.ndarray, "L U"]:
    """Norm of the weights by which each head or neuron writes to the residual stream."""
    config = decoder.config
    if site == Site.NEURON:
        return np.linalg.norm(_numbers(decoder.blocks.mlp.down), axis=-1)
    kernel = _numbers(decoder.blocks.attention.output)
    by_head = kernel.reshape(config.num_layers, config.num_heads, -1)
    return np.linalg.norm(by_head, axis=-1)


def _numbers(linear: Linear) -> Float[np.ndarray, "L in out"]:
    return np.asarray(numbers_on_host(linear.kernel[...]), np.float32)


def matched(
    units: Sequence[Unit],
    traits: Traits,
    rng: np.random.Generator,
) -> list[Unit] | None:
    """Random units like the given ones: of each layer and site as many, none of them the given,
    each drawn among the `NEIGHBOURS` that are most like one of them.

    Likeness is Euclidean distance of the traits' logarithms, each in its layer's standard
    deviations; below a millionth of a layer's largest, traits count as equal.

    Args:
        units: heads and neurons.
        traits: what they are to be alike in.
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


def another(
    units: Sequence[Unit], traits: Traits, before: Sequence[Sequence[Unit]], *, seed: int
) -> list[Unit] | None:
    """Random units like the given ones (`matched`), other than those that were drawn before; None
    if none are found."""
    taken = [set(draw) for draw in before]
    rng = np.random.default_rng([seed, len(before)])
    for _ in range(_ATTEMPTS):
        drawn = matched(units, traits, rng)
        if drawn is None or set(drawn) not in taken:
            return drawn
    return None


def described(units: Sequence[Unit], traits: Traits) -> list[dict]:
    """The name of each unit, and its traits."""
    found = []
    for unit in units:
        difference, norm = (trait[unit.layer, unit.index] for trait in traits[unit.site])
        found.append({"unit": str(unit), "difference": float(difference), "norm": float(norm)})
    return found


def _distances(unit: Unit, traits: Sequence[Float[np.ndarray, "L U"]]) -> Float[np.ndarray, "U"]:
    """How unlike a unit those of its layer are, squared."""
    total = np.zeros(traits[0].shape[1])
    for trait in traits:
        of_layer = trait[unit.layer]
        least = max(_NEGLIGIBLE * of_layer.max(), np.finfo(np.float32).tiny)
        logarithm = np.log(np.maximum(of_layer, least))
        spread = logarithm.std() or 1.0
        total = total + ((logarithm - logarithm[unit.index]) / spread) ** 2
    return total
