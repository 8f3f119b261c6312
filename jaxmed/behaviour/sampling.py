"""How a token is chosen by its logits.

B are the rows of a batch, V the vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from models.errors import InputError


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
        keys: of each row, from its seed.
        temperature, top_p, top_k: as in `Sampling`.
    """

    keys: Key[Array, "B"]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]

    def __call__(
        self, logits: Float[ArrayLike, "B V"], step: Int[ArrayLike, ""]
    ) -> Int[Array, "B"]:
        """The tokens of a step; where nothing is drawn, nothing is sorted."""
        logits = jnp.asarray(logits)

        def draw():
            scores = logits.astype(jnp.float32) / self.temperature
            restricted = (self.top_k > 0) | (self.top_p < 1)
            scores = jax.lax.cond(restricted, jax.vmap(self.restrict), lambda x: x, scores)
            keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(self.keys)
            return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

        def likeliest():
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.cond(self.temperature > 0, draw, likeliest)

    def restrict(self, scores: Float[ArrayLike, "V"]) -> Float[Array, "V"]:
        """Log-probabilities, up to a constant, with -inf where a token is not to be drawn.

        First the top k, ties with the last of them included; then, of what is left, the fewest
        tokens that reach the probability top p. That order, and which of equals go, are those of
        transformers.
        """
        scores = jnp.asarray(scores)
        size = len(scores)
        ascending = jnp.argsort(scores)
        last = scores[ascending[size - jnp.clip(self.top_k, 1, size)]]
        scores = jnp.where((self.top_k > 0) & (scores < last), -jnp.inf, scores)
        below = jnp.cumsum(jax.nn.softmax(scores[ascending]))
        dropped = (below <= 1 - self.top_p) & (jnp.arange(size) < size - 1) & (self.top_p < 1)
        return jnp.where(jnp.zeros(size, bool).at[ascending].set(dropped), -jnp.inf, scores)
