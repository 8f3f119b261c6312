"""The sites of a decoder: where a mediator may sit. Needs no JAX."""

import enum


class Site(enum.StrEnum):
    """Where a mediator sits. T positions, d hidden size, H query heads, h head size, I neurons."""

    EMBEDDING = "embedding"  # [T, d]     the token embeddings, before the first block
    RESIDUAL = "residual"  # [T, d]     a block's output
    LAYER = "layer"  # [T, d]     all that a block adds to the residual stream
    ATTENTION = "attention"  # [T, d]     what the attention module adds
    MLP = "mlp"  # [T, d]     what the MLP adds
    HEAD = "head"  # [T, H, h]  a query head's output, before the output projection
    NEURON = "neuron"  # [T, I]     a hidden unit of the MLP: the input of the down projection
