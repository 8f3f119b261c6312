"""Names of the shapes that run through a decoder, those of one sequence.

T positions of the span that is computed, P of its prefix, d hidden size, H query heads, K key/value
heads, h head size, I neurons, V vocabulary; L layers are stacked in front. Batches are made with
`jax.vmap`: a function sees one sequence; a dataclass may have the axes of a batch in front.
"""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray  # what a compiled function is called with, and then sees as a tracer

Residual = Float[Array, "T d"]  # the residual stream, and what is added to it
Heads = Float[Array, "T H h"]  # outputs of query heads
KeyValues = Float[Array, "T K h"]  # keys or values, which query heads share
Neurons = Float[Array, "T I"]  # hidden units of an MLP
SiteValue = Float[Array, "T ..."]  # of any site
Stacked = Float[Array, "L T ..."]  # of any site, in all layers

Tokens = Int[Array, "T"]  # token ids
Positions = Int[Array, "T"]  # rotary positions
Valid = Bool[Array, "T"]  # which positions are tokens, and not padding
Branches = Int[AnyArray, "T"]  # which continuation each token belongs to; 0 for what all continue
Rows = Int[Array, "R"]  # some of the positions of a span
Layer = Int[ArrayLike, ""]  # index of a layer, which may be known only at run time

# What a user gives: NumPy's arrays or lists as well, of one sequence or of a batch.
GivenTokens = Int[ArrayLike, "*B T"] | Sequence[int] | Sequence[Sequence[int]]
GivenPositions = Int[ArrayLike, "*B P"] | Sequence[int] | Sequence[Sequence[int]]
GivenBranches = Int[ArrayLike, "N"] | Sequence[int]
GivenValid = Bool[ArrayLike, "*B T"] | Sequence[bool] | Sequence[Sequence[bool]]
