"""What may be changed in a run, and how."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Site(enum.StrEnum):
    """Where a mediator sits. T positions, d hidden size, H query heads, h head size, I neurons."""

    EMBEDDING = "embedding"  # [T, d]     the token embeddings, before the first block
    RESIDUAL = "residual"  # [T, d]     a block's output
    LAYER = "layer"  # [T, d]     all that a block adds to the residual stream
    ATTENTION = "attention"  # [T, d]     what the attention module adds
    MLP = "mlp"  # [T, d]     what the MLP adds
    HEAD = "head"  # [T, H, h]  a query head's output, before the output projection
    NEURON = "neuron"  # [T, I]     a hidden unit of the MLP: the input of the down projection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """An affine map on a site of one layer: ``y <- scale * y + shift`` where the masks are true.

    Every field but `site` is an array, so that edits can be stacked and vmapped. ``scale = 0``
    selects the shift and never multiplies, so a patch is exact even where y is not finite.

    Attributes:
        site: the site.
        layer: index of the layer, [] (ignored for `embedding`).
        positions: which of the run's T positions are edited, [T].
        units: which heads or neurons are edited, [H] or [I]; None for all, and for other sites.
        scale: broadcastable to the site's value.
        shift: broadcastable to the site's value.
    """

    site: Site = dataclasses.field(metadata={"static": True})
    layer: Int[Array, ""]
    positions: Bool[Array, "T"]
    units: Bool[Array, "U"] | None
    scale: Float[Array, "..."]
    shift: Float[Array, "..."]

    @classmethod
    def patch(cls, site, layer, positions, value, units=None) -> "Edit":
        """Replaces the site's value; value 0 is zero ablation, a mean is mean ablation."""
        value = jnp.asarray(value)
        return cls.affine(site, layer, positions, jnp.zeros((), value.dtype), value, units)

    @classmethod
    def steer(cls, site, layer, positions, direction, units=None) -> "Edit":
        """Adds a direction."""
        direction = jnp.asarray(direction)
        return cls.affine(site, layer, positions, jnp.ones((), direction.dtype), direction, units)

    @classmethod
    def damp(cls, site, layer, positions, factor, units=None) -> "Edit":
        """Multiplies by a factor; 1 is no edit."""
        factor = jnp.asarray(factor)
        return cls.affine(site, layer, positions, factor, jnp.zeros((), factor.dtype), units)

    @classmethod
    def affine(cls, site, layer, positions, scale, shift, units=None) -> "Edit":
        """Any scale and shift."""
        return cls(
            site=Site(site),
            layer=jnp.asarray(layer),
            positions=jnp.asarray(positions, bool),
            units=None if units is None else jnp.asarray(units, bool),
            scale=jnp.asarray(scale),
            shift=jnp.asarray(shift),
        )

    def mask(self, value: Float[Array, "T ..."]) -> Bool[Array, "T ..."]:
        """The entries of the site's value that this edit touches, broadcastable to it."""
        mask = jnp.expand_dims(self.positions, tuple(range(1, value.ndim)))
        if self.units is not None:
            mask = mask & jnp.expand_dims(self.units, tuple(range(1, value.ndim - 1)))
        return mask

    def apply(self, value: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
        """The edited value of the site, for a run in this edit's layer."""
        scale, shift = self.scale.astype(value.dtype), self.shift.astype(value.dtype)
        edited = jnp.where(scale == 0, shift, scale * value + shift)
        return jnp.where(self.mask(value), edited, value)


def apply(
    edits: list[Edit], site: Site, layer: Int[Array, ""], value: Float[Array, "T ..."]
) -> Float[Array, "T ..."]:
    """The value of a site after the edits that concern it, in their order."""
    for edit in edits:
        if edit.site == site:
            here = True if site == Site.EMBEDDING else layer == edit.layer
            value = jnp.where(here, edit.apply(value), value)
    return value
