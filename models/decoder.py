"""The instrumented decoder: one module for every family, with edits as an argument.

Shapes are named in `models.shapes`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from models import edits as editing
from models import layers, placement, products
from models.config import DecoderConfig
from models.edits import Edit
from models.errors import InputError
from models.layers import Cache, Span, Tap, Traits
from models.products import Products
from models.shapes import (
    AnyArray,
    Branches,
    GivenBranches,
    GivenPositions,
    GivenTokens,
    GivenValid,
    KeyValues,
    Layer,
    Positions,
    Residual,
    Rows,
    SiteValue,
    Stacked,
    Tokens,
    Valid,
)
from models.sites import Site
from models.weights import Path

# What a run can keep.
KEPT = (*(site.value for site in Site), "keys", "values")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The sites' values in one run, after its edits; None where they were not asked for.

    `trace["residual"]`, or by any other name, is the value itself, and an error where it is None.

    Attributes:
        positions: rotary position of each token, [T].
        valid: which of them are tokens and not padding, [T].
        branches: as in `Span`, [T].
        embedding: what enters the first block, [T, d].
        residual, layer, attention, mlp: [L, T, d].
        head: [L, T, H, h].
        neuron: [L, T, I].
        keys, values: [L, T, K, h], after the rotary embedding.
    """

    positions: Int[Array, "*batch T"]
    valid: Bool[Array, "*batch T"]
    branches: Int[Array, "*batch T"] | None = None
    embedding: Float[Array, "*batch T d"] | None = None
    residual: Float[Array, "*batch L T d"] | None = None
    layer: Float[Array, "*batch L T d"] | None = None
    attention: Float[Array, "*batch L T d"] | None = None
    mlp: Float[Array, "*batch L T d"] | None = None
    head: Float[Array, "*batch L T H h"] | None = None
    neuron: Float[Array, "*batch L T I"] | None = None
    keys: Float[Array, "*batch L T K h"] | None = None
    values: Float[Array, "*batch L T K h"] | None = None

    def __getitem__(self, name: str) -> Float[Array, "..."]:
        """The value of a `Site`, or "keys" or "values"; ValueError if the run did not keep it."""
        value = getattr(self, name) if name in KEPT else None
        if value is None:
            raise ValueError(f"the run did not keep {name!r}: name it among the run's sites")
        return value

    @property
    def cache(self) -> Cache:
        """The run as the prefix of another; ValueError if it did not keep keys and values."""
        return Cache(self["keys"], self["values"], self.positions, self.valid)


class Block(nnx.Module):
    """One layer: attention and MLP, each between norms as far as the model has them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        shared = dict(rngs=rngs, dtype=dtype)

        def norm(wanted):
            return layers.norm(config, config.hidden_size, dtype) if wanted else None

        self.parallel = config.parallel
        self.attention_norm = norm(config.pre_norm)
        self.attention = layers.Attention(config, **shared)
        self.attention_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm)
        self.mlp = layers.MLP(config, **shared)
        self.mlp_post_norm = norm(config.post_norm)

    def run(
        self,
        x: Residual,
        at: Span,
        traits: Traits,
        prefix: Cache | None,
        tap: Tap,
    ) -> tuple[Residual, KeyValues, KeyValues]:
        """The block's output; and this span's keys and values."""
        attention, key, value = self.attend(x, at, traits, prefix, tap)
        mlp = self.feed(x if self.parallel else x + attention, tap)
        return tap(Site.RESIDUAL, x + tap(Site.LAYER, attention + mlp)), key, value

    def attend(
        self,
        x: Residual,
        at: Span,
        traits: Traits,
        prefix: Cache | None,
        tap: Tap,
        rows: Rows | None = None,
    ) -> tuple[Float[Array, "R d"], KeyValues, KeyValues]:
        """What attention adds to the block's input x, at some rows of the span or at all; and this
        span's keys and values."""
        normed = _normed(self.attention_norm, x)
        written, key, value = self.attention(normed, at, traits, prefix, tap, rows)
        return tap(Site.ATTENTION, _normed(self.attention_post_norm, written)), key, value

    def feed(self, x: Residual, tap: Tap) -> Residual:
        """What the MLP adds; x is the residual stream that it reads."""
        written = self.mlp(_normed(self.mlp_norm, x), tap)
        return tap(Site.MLP, _normed(self.mlp_post_norm, written))


def _normed(norm: nnx.Module | None, x: Residual) -> Residual:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder-only language model whose every site can be read and edited.

    Block parameters are stacked along a leading layer axis. A module is a pytree: it is passed to
    compiled functions as an argument, and its weights are never closed over.

    Args:
        config: the shape of the model.
        rngs: for the random weights; build under `nnx.eval_shape` to have none.
        dtype: of the parameters; the checkpoint's own by default. Activations are float32 at
            least, also for a bfloat16 checkpoint: its effects are defined on unrounded activations.

    Attributes:
        config: the shape of the model.
        dtype: of the parameters.
        compute_dtype: of the activations.
        products: how it multiplies by its weights; see `at_precision`.
        mesh: the devices that its parameters are placed on, by `models.placement`; None for one.
        parts: the parameters of which a device that runs a function has a part alone, and the axis
            that is cut, counted from the last: of a decoder that is inside a function which runs on
            each device by itself, as `jaxmed.engine.shard` has them. They are gathered as they are
            needed. Nothing for any other decoder, whose arrays are whole however they are placed.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=None):
        dtype = jnp.dtype(dtype or config.dtype)
        self.config = config
        self.dtype = dtype
        self.compute_dtype = jnp.promote_types(dtype, jnp.float32)
        self.products = Products()
        self.mesh: Mesh | None = None
        self.parts: tuple[tuple[Path, int], ...] = ()
        init = nnx.initializers.normal(stddev=0.02)
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(products.stored(init(rngs.params(), table, dtype)))
        positions = (config.max_positions, config.hidden_size)
        self.positions = (
            nnx.Param(init(rngs.params(), positions, dtype)) if config.learned_positions else None
        )
        self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key), dtype=dtype))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.final_norm = layers.norm(config, config.hidden_size, dtype)
        self.unembedding = (
            None
            if config.tie_embeddings
            else nnx.Param(products.stored(init(rngs.params(), table, dtype)))
        )

    def at_precision(self, precision: str, platform: str | None = None) -> "Decoder":
        """The same model, with its weights multiplied in another precision; they are not copied.

        Args:
            precision: one of `products.PRECISIONS`, in which differences are multiplied; values
                are multiplied as exactly as in float32.
            platform: JAX's name of the kind of device that programs are compiled for; that of the
                default device by default.

        Raises:
            InputError: the precision is not known, or is none of a float64 model's, which
                multiplies in float64 under the name of "float32".
        """
        if self.compute_dtype == jnp.float64 and precision != "float32":
            raise InputError(
                f"{precision!r} (--matmul_precision): a model in float64 multiplies in float64 "
                "only; take float32, by which it does, or another dtype (--dtype)"
            )
        copy = nnx.clone(self)
        copy.set_attributes(products=Products(precision, platform or jax.default_backend()))
        return copy

    @property
    def traits(self) -> Traits:
        """What layers differ in beside their weights, stacked."""
        return layers.traits(self.config, self.compute_dtype)

    def block(self, layer: Layer) -> Block:
        """The block of a layer that may be known only at run time."""
        return self.whole(
            jax.tree.map(
                lambda stacked: jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False),
                self.blocks,
            )
        )

    def whole(self, block: Block) -> Block:
        """A layer's block, its parameters gathered from the devices that have parts of them."""
        if not self.parts:
            return block

        def gathered(keys, leaf):
            return self._gathered(("blocks", *placement.path_of(keys)), leaf)

        return jax.tree_util.tree_map_with_path(gathered, block)

    def _gathered(self, path: Path, part: Array) -> Array:
        """All of what devices have a part of: of a parameter, of one layer, or of some rows."""
        axis = dict(self.parts).get(path)
        if axis is None:
            return part
        return jax.lax.all_gather(part, placement.MODEL, axis=part.ndim + axis, tiled=True)

    def ready(self, block: Block) -> Block:
        """A block whose weights are as they are multiplied, so that none is converted in a loop
        over what is multiplied by them."""
        block = jax.tree.map(lambda leaf: leaf, block)
        for _, module in nnx.iter_modules(block):
            if isinstance(module, layers.Linear):
                weight = products.ready(module.kernel[...], self.products, self.compute_dtype)
                module.kernel = nnx.Param(weight)
        return block

    def span(self, positions: Positions, valid: Valid, branches: Branches | None = None) -> Span:
        """What the blocks must know of the positions that they compute."""
        return layers.span(self.config, positions, valid, self.compute_dtype, branches)

    def unembed(
        self,
        residual: Float[Array, "R d"],
        tokens: Int[AnyArray, "K"] | None = None,
        *,
        alike: bool = False,
    ) -> Float[Array, "R K"]:
        """Logits of the given tokens (default: all) at rows of the last block's output.

        In a function that runs on each device by itself, `alike` says that the tokens are the same
        on all of them, so that no more vectors are gathered than these.
        """
        name = "embedding" if self.unembedding is None else "unembedding"
        rows = self._vectors(name, tokens, alike)
        hidden = self.final_norm(residual)
        weight = products.ready(rows, self.products, hidden.dtype).swapaxes(-1, -2)
        logits = products.multiplied(hidden, weight, self.products.of_values)
        cap = self.config.logit_cap
        return logits if cap is None else layers.capped(logits, cap)

    def embed(self, tokens: Tokens, at: Span) -> Residual:
        """What enters the first block."""
        embedding = products.numbers(self._vectors("embedding", tokens)).astype(self.compute_dtype)
        if self.config.scale_embedding:
            embedding = embedding * self.config.hidden_size**0.5
        if self.positions is not None:
            # Padding may be numbered beyond the last position; its values are never read.
            learned = jnp.take(self.positions[...], at.positions, axis=0, mode="clip")
            embedding = embedding + learned.astype(self.compute_dtype)
        return embedding

    def _vectors(self, name: str, tokens: Int[AnyArray, "K"] | None, alike: bool = False) -> Array:
        """A table's vectors of the tokens, or of all, as they are stored."""
        table, path = getattr(self, name)[...], (name,)
        if tokens is None or alike or path not in dict(self.parts):
            return self._gathered(path, table if tokens is None else table[tokens])
        of_all = jax.lax.all_gather(tokens, placement.MODEL)
        return self._gathered(path, table[of_all])[jax.lax.axis_index(placement.MODEL)]

    def run_blocks(
        self,
        x: Residual,
        at: Span,
        change: Callable[[Any, Site, SiteValue], SiteValue],
        *,
        layers: Any = None,
        prefix: Cache | None = None,
        keep: Sequence[str] = (),
        recomputed: bool = False,
    ) -> tuple[Residual, dict[str, Stacked]]:
        """Runs all blocks on one sequence: the one loop over layers.

        Args:
            x: what enters the first block.
            at: its positions.
            change: called with what `layers` holds for the layer, a site and its value; returns
                the value that the run goes on with.
            layers: a pytree of arrays with a leading axis of layers; by default their indices, [L].
            prefix: keys and values of a prefix that the sequence continues.
            keep: the values that are returned, after any change: names of `Site` but "embedding",
                and "keys" and "values". What is not named is not kept.
            recomputed: whether a backward pass computes each block again: it then needs memory for
                one residual stream a layer, and not for every value of every block.

        Returns:
            The last block's output; and what is kept, by name, stacked along layers.
        """

        def run_layer(x, inputs):
            layer, block, traits, keys, values = inputs
            block = self.whole(block)
            cache = None if prefix is None else Cache(keys, values, prefix.positions, prefix.valid)
            seen = {}

            def tap(site, value):
                seen[site.value] = change(layer, site, value)
                return seen[site.value]

            x, seen["keys"], seen["values"] = block.run(x, at, traits, cache, self.tap(tap))
            return x, {name: seen[name] for name in keep}

        layers = jnp.arange(self.config.num_layers) if layers is None else layers
        keys, values = (None, None) if prefix is None else (prefix.keys, prefix.values)
        inputs = (layers, self.blocks, self.traits, keys, values)
        return jax.lax.scan(jax.checkpoint(run_layer) if recomputed else run_layer, x, inputs)

    def tap(self, change: Tap) -> Tap:
        """A tap that replaces sites' values; a change to the same value then changes no bit."""

        def tap(site, value):
            if self.config.post_norm and site in (Site.ATTENTION, Site.MLP):
                value = _kept_apart(value)
            return change(site, value)

        return tap

    def __call__(
        self,
        tokens: GivenTokens,
        *,
        edits: list[Edit] | None = None,
        cache: Cache | None = None,
        valid: GivenValid | None = None,
        branches: GivenBranches | None = None,
        positions: GivenPositions | None = None,
        sites: Sequence[str] | None = None,
    ) -> tuple[Float[Array, "*B P V"], Trace]:
        """Runs the model.

        Args:
            tokens: token ids, [T] or [B, T].
            edits: interventions, made together; shared by the rows of a batch.
            cache: keys and values of a prefix that these tokens continue; with a batch, one per
                row (a leading axis B).
            valid: which tokens are not padding; all by default. Padding may stand on either side.
            branches: which of several continuations each token belongs to, [T], from 1; 0 for what
                all of them continue. A token sees those of its own branch and those of 0 that
                stand before it, and is numbered as if there were no others. Shared by the rows of
                a batch.
            positions: indices of the tokens whose logits are wanted, [P], or with a batch [B, P];
                all by default. The logits of a long text are large, and few of them are read. The
                trace has all positions.
            sites: what the trace holds: any of `Site`, and "keys" and "values", which make a
                `Trace.cache`; all by default.

        Returns:
            Logits [P, V] and a `Trace`, both with the leading axis of a batch. What was not asked
            for is not computed for its own sake, and not kept.

        Raises:
            TypeError: the tokens are text, or something else than token ids.
            ValueError: a token id, a position, a site or an edit's layer does not exist, a mask
                has another length, or there are more tokens than positions
                (what is being traced by `jax.jit` or `jax.vmap` is not checked for its values).
        """
        tokens = _token_ids(tokens)
        edits = edits or []
        sites = KEPT if sites is None else tuple(sites)
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        if branches is not None:
            branches = jnp.asarray(branches, int)
        if positions is not None:
            positions = jnp.asarray(positions, int)
            positions = jnp.broadcast_to(positions, tokens.shape[:-1] + positions.shape[-1:])
        self._check(tokens, edits, valid, cache, branches)
        self._check_asked(tokens, positions, sites)
        # In one order, so that one program serves all.
        sites = tuple(name for name in KEPT if name in sites)
        if tokens.ndim == 1:
            return _run(self, tokens, edits, cache, valid, branches, positions, sites)
        return jax.vmap(lambda t, c, v, p: _run(self, t, edits, c, v, branches, p, sites))(
            tokens, cache, valid, positions
        )

    def _check_asked(self, tokens, positions, sites: tuple[str, ...]) -> None:
        """Refuses positions and sites that are not there."""
        if unknown := [name for name in sites if name not in KEPT]:
            raise ValueError(f"{unknown[0]!r} is no site; a run can keep {', '.join(KEPT)}")
        if positions is not None and not _known_inside(positions, tokens.shape[-1]):
            outside = positions[(positions < 0) | (positions >= tokens.shape[-1])]
            raise ValueError(
                f"logits are wanted at position {outside[0]}, and there are {tokens.shape[-1]} "
                "tokens, counted from 0"
            )

    def _check(self, tokens, edits: list[Edit], valid, cache: Cache | None, branches) -> None:
        """Refuses what array indexing and broadcasting would silently take for something else."""
        config = self.config
        units = {Site.HEAD: config.num_heads, Site.NEURON: config.intermediate_size}
        for edit in edits:
            if edit.positions.shape != tokens.shape[-1:]:
                raise ValueError(
                    f"the edit of {edit.site} has a mask of {edit.positions.shape} positions, the "
                    f"run has {tokens.shape[-1]} tokens"
                )
            if edit.units is not None and edit.units.shape != (units.get(edit.site),):
                raise ValueError(
                    f"the edit of {edit.site} has a mask of {edit.units.shape} units, the site has "
                    f"{units.get(edit.site, 'none')}"
                )
            if not _known_inside(edit.layer, config.num_layers):
                raise ValueError(
                    f"the edit of {edit.site} is in layer {edit.layer}, the model has "
                    f"{config.num_layers} layers"
                )
        if not _known_inside(tokens, config.vocab_size):
            raise ValueError(f"a token id is outside the vocabulary of {config.vocab_size}")
        if branches is not None and branches.shape != tokens.shape[-1:]:
            raise ValueError(
                f"there are branches of {branches.shape} tokens, the run has {tokens.shape[-1]}"
            )
        longest = jnp.sum(valid, axis=-1)
        if branches is not None:
            longest = 1 + jnp.max(_numbered(jnp.asarray(valid), branches), axis=-1)
        longest = longest if cache is None else longest + jnp.sum(cache.valid, axis=-1)
        if not _known_inside(longest, config.max_positions + 1):
            raise ValueError(
                f"a run has {int(jnp.max(longest))} tokens, and the model has "
                f"{config.max_positions} positions"
            )

    def _run(self, tokens, edits, cache, valid, branches, positions, sites):
        """One sequence."""
        first = 0 if cache is None else jnp.sum(cache.valid)
        at = self.span(first + jnp.maximum(_numbered(valid, branches), 0), valid, branches)
        embedding = self.embed(tokens, at)
        embedding = editing.apply(edits, Site.EMBEDDING, jnp.zeros((), int), embedding)
        x, kept = self.run_blocks(
            embedding,
            at,
            lambda layer, site, value: editing.apply(edits, site, layer, value),
            prefix=cache,
            keep=[name for name in sites if name != Site.EMBEDDING],
        )
        if Site.EMBEDDING in sites:
            kept |= {"embedding": embedding}
        x = x if positions is None else jnp.take(x, positions, axis=0, mode="clip")
        return self.unembed(x), Trace(at.positions, valid, branches, **kept)


def _numbered(valid: Bool[Array, "*B T"], branches: Branches | None) -> Int[Array, "*B T"]:
    """The number of each token among those that it sees, from 0; for padding that of the token
    before it, -1 where there is none."""
    if branches is None:
        return jnp.cumsum(valid, axis=-1) - 1
    seen = jnp.tril(layers.same_branch(branches, branches))
    return jnp.sum(valid[..., None, :] & seen, axis=-1) - 1


def _token_ids(given) -> AnyArray:
    """What a user gives as tokens, as an array of whole numbers.

    Raises:
        TypeError: it is something else.
    """
    kind = type(given).__name__
    if not isinstance(given, jax.Array):
        try:
            given = np.asarray(given)
        except ValueError:
            raise TypeError("tokens: rows of a batch must be of one length, [B, T]") from None
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(
            f"tokens: these are {kind} ({given.dtype}), and a decoder takes token ids, whole "
            "numbers [T] or [B, T]; tokenizer(text)['input_ids'] makes them of text"
        )
    return jnp.asarray(given)


@jax.custom_jvp
def _kept_apart(x: Residual) -> Residual:
    """x, computed so that compilers do not see that it is.

    They merge the product that ends a norm into the sum that follows (and drop barriers), but not
    where an edit stands between: a run with an edit of nothing would then round as no run without.
    """
    return jnp.where(x < 0, x, jnp.abs(x))


_kept_apart.defjvps(lambda tangent, value, x: tangent)


def _known_inside(value, size: int) -> bool:
    """Whether all values are in [0, size); a value that is being traced is not known."""
    if isinstance(value, Tracer):
        return True
    return bool(jnp.all((value >= 0) & (value < size)))


# Compiled once for each shape, also where the caller compiles nothing.
_run = jax.jit(Decoder._run, static_argnames="sites")
