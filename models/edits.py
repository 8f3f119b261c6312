"""What may be changed in a run, and how."""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.shapes import Layer, SiteValue, Valid
from models.sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of a site in one layer of one run: ``y <- scale * y + shift`` (see `affine`).

    Every field but `site` is an array, so that edits can be stacked and vmapped. A patch is exact
    even where y is not finite.

    Attributes:
        site: the site.
        layer: index of the layer, [] (ignored for `embedding`).
        positions: which of the run's T positions are edited, [T].
        units: which heads or neurons are edited, [H] or [I]; None for all, and for other sites.
        scale: broadcastable to the site's value.
        shift: broadcastable to the site's value.
    """

    site: Site = dataclasses.field(metadata={"static": True})
    layer: Int[Array, "*batch"]
    positions: Bool[Array, "*batch T"]
    units: Bool[Array, "*batch U"] | None
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
    def affine(cls, site, layer, positions, scale, shift, units=None) -> "Edit":
        """Any scale and shift; shift 0 damps, and (1, 0) is no edit."""
        return cls(
            site=Site(site),
            layer=jnp.asarray(layer),
            positions=jnp.asarray(positions, bool),
            units=None if units is None else jnp.asarray(units, bool),
            scale=jnp.asarray(scale),
            shift=jnp.asarray(shift),
        )

    def mask(self, value: SiteValue) -> Bool[Array, "T ..."]:
        """The entries of the site's value that this edit touches, broadcastable to it."""
        mask = _along(self.positions, value)
        if self.units is not None:
            mask = mask & jnp.expand_dims(self.units, tuple(range(1, value.ndim - 1)))
        return mask

    def apply(self, value: SiteValue) -> SiteValue:
        """The edited value of the site, for a run in this edit's layer."""
        return affine(value, self.mask(value), self.scale, self.shift)


class Part(enum.IntEnum):
    """Of a run that generates text, the part that a position belongs to."""

    PROMPT = 0  # the prompt's positions before its last
    LAST = 1  # the prompt's last position, whose logits choose the first generated token
    GENERATED = 2  # the positions of generated tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hold:
    """An intervention that lasts through generation: ``y <- scale * y + shift`` (see `affine`) on
    a site of every layer, at prompt and generated positions. (1, 0), which changes no bit, is no
    intervention in a layer.

    Every field but `site` is an array, so that one compiled program serves all holds of a site.

    Attributes:
        site: any but `embedding`.
        scale: [L, ...], broadcastable to the site's values [L, d], [L, H, h] or [L, I].
        shift: as scale; or [B, L, ...], for each of B prompts its own.
        at_prompt: whether it is made at prompt positions before the last.
        at_last: whether at the last prompt position, whose logits choose the first token.
        at_generated: whether at generated positions.
    """

    site: Site = dataclasses.field(metadata={"static": True})
    scale: Float[Array, "L ..."]
    shift: Float[Array, "..."]
    at_prompt: Bool[Array, ""]
    at_last: Bool[Array, ""]
    at_generated: Bool[Array, ""]

    @classmethod
    def affine(
        cls, site, scale, shift, *, at_prompt=True, at_last=True, at_generated=True
    ) -> "Hold":
        """Any scale and shift; at all positions by default."""
        return cls(
            site=Site(site),
            scale=jnp.asarray(scale),
            shift=jnp.asarray(shift),
            at_prompt=jnp.asarray(at_prompt, bool),
            at_last=jnp.asarray(at_last, bool),
            at_generated=jnp.asarray(at_generated, bool),
        )

    @property
    def of_each_prompt(self) -> bool:
        """Whether each prompt has a shift of its own."""
        return self.shift.ndim > self.scale.ndim

    def apply(self, layer: Layer, parts: Int[Array, "T"], value: SiteValue) -> SiteValue:
        """The site's value in a layer of one prompt's run, whose positions are of these Parts."""
        where = jnp.stack([self.at_prompt, self.at_last, self.at_generated])[parts]
        return affine(value, _along(where, value), self.scale[layer], self.shift[layer])


def affine(
    value: SiteValue,
    where: Bool[Array, "T ..."],
    scale: Float[Array, "..."],
    shift: Float[Array, "..."],
) -> SiteValue:
    """What every change of a site's value is: ``scale * value + shift`` where the mask is true.

    ``scale = 0`` selects the shift and never multiplies: what is not finite can be replaced.
    """
    scale, shift = scale.astype(value.dtype), shift.astype(value.dtype)
    return jnp.where(where, jnp.where(scale == 0, shift, scale * value + shift), value)


def _along(positions: Valid, value: SiteValue) -> Bool[Array, "T ..."]:
    """A mask of positions, broadcastable to a site's value."""
    return jnp.expand_dims(positions, tuple(range(1, value.ndim)))


def apply(edits: list[Edit], site: Site, layer: Layer, value: SiteValue) -> SiteValue:
    """The value of a site after the edits that concern it, in their order."""
    for edit in edits:
        if edit.site == site:
            here = True if site == Site.EMBEDDING else layer == edit.layer
            value = jnp.where(here, edit.apply(value), value)
    return value


def hold(
    holds: Sequence[Hold],
    site: Site,
    layer: Layer,
    parts: Int[Array, "T"],
    value: SiteValue,
) -> SiteValue:
    """The value of a site after the holds that concern it, in their order."""
    for each in holds:
        if each.site == site:
            value = each.apply(layer, parts, value)
    return value
