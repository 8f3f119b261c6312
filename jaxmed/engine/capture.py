"""Base and source runs, captured once per pair; what the engine needs of them.

Shapes are named in `models.shapes`; L is the number of layers, N the padded length of a captured
run, S that of the span (the positions that are recomputed), P that of the prefix before it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxmed.engine import shard
from jaxmed.engine.shard import WHOLE
from jaxmed.question.positions import Edited
from models.decoder import Decoder, Trace
from models.layers import Cache, Span
from models.sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """A base run, cut at the span: where differences are carried through.

    Attributes:
        inputs: the residual stream before every block and after the last, [L + 1, S, d].
        middles: the residual stream between attention and MLP of every block, [L, S, d].
        prefix: keys and values of the positions before the span, [L, P, K, h]; None where there
            are none.
        span: the span's positions.
    """

    inputs: Float[Array, "*batch stages S d"]
    middles: Float[Array, "*batch L S d"]
    prefix: Cache | None
    span: Span


# Runs and prefixes of up to this many tokens share their compilations.
SHORTEST = 32


def bucket(length: int, smallest: int = 1) -> int:
    """The power of two, at least `smallest`, that holds a length of 1 or more."""
    return max(smallest, 1 << (length - 1).bit_length())


def run_length(length: int) -> int:
    """The padded length of a run of so many tokens."""
    return bucket(length, SHORTEST)


def prefix_length(start: int) -> int:
    """The padded length of the prefix of a span that begins there."""
    return run_length(start) if start else 0


def capture(
    decoder: Decoder, tokens: tuple[int, ...], branches: tuple[int, ...] | None = None
) -> Trace:
    """Every site's value in a plain run, padded on the right to a bucket's length.

    One compiled function serves all runs of a bucket, so that equal prompts give equal bits.

    Args:
        decoder: the model.
        tokens: the run's.
        branches: as in `Span`.
    """
    return _capture(decoder, *pad(tokens, branches))


def pad(
    tokens: tuple[int, ...], branches: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens padded on the right to a bucket's length, which of them are no padding, and their
    branches if they have any, [N]."""
    length = run_length(len(tokens))

    def padded(numbers: tuple[int, ...]) -> np.ndarray:
        return np.pad(np.array(numbers, np.int32), (0, length - len(numbers)))

    valid = np.arange(length) < len(tokens)
    return padded(tokens), valid, None if branches is None else padded(branches)


@jax.jit
def _capture(
    decoder: Decoder,
    tokens: Int[Array, "N"],
    valid: Bool[Array, "N"],
    branches: Int[Array, "N"] | None,
) -> Trace:
    def step(decoder, tokens, valid, branches):
        return decoder(tokens, valid=valid, branches=branches)[1]

    return shard.over(step, decoder, tokens, valid, branches, given=(WHOLE,) * 3, gives=WHOLE)


@functools.partial(jax.jit, static_argnames=("size", "prefix_size"))
def frame(
    decoder: Decoder, trace: Trace, start: Int[ArrayLike, ""], size: int, prefix_size: int
) -> Frame:
    """The run cut at the span [start, start + size), with a prefix of that padded length, or none.

    The prefix has no branches: it ends before any of them begins. Positions of the span beyond the
    run's end are padding.
    """
    rows = jnp.arange(size) + start
    embedding, residual = kept(trace, "embedding"), kept(trace, "residual")
    inputs = jnp.concatenate([embedding[None], residual])
    prefix = None
    if prefix_size:
        before = jnp.arange(prefix_size)
        prefix = Cache(
            keys=take(kept(trace, "keys"), before),
            values=take(kept(trace, "values"), before),
            positions=jnp.take(trace.positions, before, mode="clip"),
            valid=before < start,
        )
    inputs = take(inputs, rows)
    return Frame(
        inputs=inputs,
        middles=inputs[:-1] + take(kept(trace, "attention"), rows),
        prefix=prefix,
        span=decoder.span(
            jnp.take(trace.positions, rows, mode="clip"),
            jnp.take(trace.valid, rows, mode="fill", fill_value=False),
            None if trace.branches is None else jnp.take(trace.branches, rows, mode="clip"),
        ),
    )


def kept(trace: Trace, name: str) -> Array:
    """A value that a captured run has: all are kept."""
    value = getattr(trace, name)
    assert value is not None, name
    return value


def take(value: Float[Array, "L N ..."], rows: Int[Array, "S"]) -> Float[Array, "L S ..."]:
    """Positions of a captured value; beyond its end the last one, whose value does not matter."""
    return jnp.take(value, rows, axis=1, mode="clip")


def edited_difference(
    base: Trace, source: Trace, site: Site, edited: Edited, start: int, size: int
) -> Float[Array, "L S ..."]:
    """Source value minus base value of a site at the positions [start, start + size) of the base
    run; 0 where not edited."""
    return site_difference(base, source, site, *edited_rows(edited, start, size))


def edited_rows(
    edited: Edited, start: int, size: int
) -> tuple[Int[np.ndarray, "S"], Int[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """The positions [start, start + size) of the base run, those of the source run that they take
    their values from, and which of them are edited."""
    source_rows, mask = np.zeros(size, np.int32), np.zeros(size, bool)
    source_rows[edited.base - start], mask[edited.base - start] = edited.source, True
    return start + np.arange(size), source_rows, mask


@functools.partial(jax.jit, static_argnames=("site",))
def site_difference(
    base: Trace,
    source: Trace,
    site: Site,
    base_rows: Int[Array, "S"],
    source_rows: Int[Array, "S"],
    edited: Bool[Array, "S"],
) -> Float[Array, "L S ..."]:
    """Source value minus base value of a site at the span's positions; 0 where not edited."""
    before, after = (getattr(trace, site.value) for trace in (base, source))
    if site == Site.EMBEDDING:
        before, after = before[None], after[None]
    change = take(after, source_rows) - take(before, base_rows)
    return jnp.where(jnp.expand_dims(edited, tuple(range(1, change.ndim - 1))), change, 0)
