"""How a token is chosen by its logits.

B are the rows of a batch, V the vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped, UInt

from models.errors import InputError
from models.shapes import AnyArray

_ALL_BUT_SIGN = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; by default the likeliest, up to 128.

    Attributes:
        max_tokens: generated tokens at most, the stop token included.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: only the likeliest tokens are drawn which together have this probability
            (arXiv 1904.09751); 1 for all.
        top_k: only the so many likeliest tokens are drawn; 0 for all.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def check(self) -> None:
        """Raises `InputError` where a setting is out of range."""
        if self.max_tokens < 1:
            raise InputError(f"max_tokens = {self.max_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature = {self.temperature}: must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k}: must be at least 0")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """How the tokens of a batch are chosen; arrays, so that one program serves all settings.

    Attributes:
        temperature, top_p, top_k: as in `Sampling`.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]

    @classmethod
    def of(cls, sampling: Sampling) -> "Choice":
        """As the settings have it."""
        return cls(
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
            top_k=jnp.int32(sampling.top_k),
        )

    def __call__(
        self,
        logits: Float[ArrayLike, "B V"],
        seeds: UInt[AnyArray, "B"],
        steps: Int[AnyArray, "B"],
    ) -> Int[Array, "B"]:
        """The next token of each row.

        Args:
            logits: by which it is chosen.
            seeds: of the rows.
            steps: which of its tokens it is; a seed's draws differ from step to step.
        """
        logits = jnp.asarray(logits)

        def draw():
            # The likeliest has 0: by however little it is divided, nothing overflows.
            scores = logits.astype(jnp.float32)
            scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / self.temperature
            restricted = (self.top_k > 0) | (self.top_p < 1)
            scores = lax.cond(restricted, jax.vmap(self.restrict), lambda x: x, scores)
            return jax.vmap(_draw)(scores, jnp.asarray(seeds), jnp.asarray(steps))

        def likeliest():
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return lax.cond(self.temperature > 0, draw, likeliest)

    def restrict(self, scores: Float[ArrayLike, "V"]) -> Float[Array, "V"]:
        """Log-probabilities, up to a constant, with -inf where a token is not to be drawn.

        First the top k, ties with the last of them included; then, of what is left, the fewest
        tokens that reach the probability top p. That order, and which of equals go (those that come
        first in the vocabulary), are those of transformers.
        """
        scores = jnp.asarray(scores)
        last = _threshold(scores, jnp.ones_like(scores), jnp.clip(self.top_k, 1, len(scores)))
        scores = jnp.where((self.top_k > 0) & (scores < last), -jnp.inf, scores)
        chances = jax.nn.softmax(scores)
        last = _threshold(scores, chances, self.top_p)
        above, equal = scores > last, scores == last
        missing = self.top_p - jnp.sum(jnp.where(above, chances, 0))
        needed = jnp.ceil(missing / jnp.max(jnp.where(equal, chances, 0)))
        kept = above | equal & (jnp.cumsum(equal[::-1])[::-1] <= needed)
        return jnp.where(kept | (self.top_p >= 1), scores, -jnp.inf)


def _draw(scores: Float[Array, "V"], seed: UInt[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.categorical(key, scores).astype(jnp.int32)


def _threshold(
    scores: Float[Array, "V"], weights: Float[Array, "V"], amount: Shaped[ArrayLike, ""]
) -> Float[Array, ""]:
    """The largest number such that the weights of scores from it on reach an amount; -inf if there
    is none.

    Found by bisection of all float32 numbers, in their order: that takes 32 sums, which is much
    less than to sort a vocabulary.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # without overflow
        reached = jnp.sum(jnp.where(scores >= _numbered(middle), weights, 0)) >= amount
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    bounds = _number(jnp.full((), -jnp.inf)), _number(jnp.max(scores)) + 1
    return _numbered(lax.fori_loop(0, 32, halve, bounds)[0])


def _number(x: Float[Array, ""]) -> Int[Array, ""]:
    """Which float32 number it is, counted so that larger ones come later."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits)


def _numbered(number: Int[Array, ""]) -> Float[Array, ""]:
    """The float32 number that has this one."""
    bits = jnp.where(number < 0, number ^ _ALL_BUT_SIGN, number)
    return lax.bitcast_convert_type(bits, jnp.float32)
