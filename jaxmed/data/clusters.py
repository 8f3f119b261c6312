"""Clusters: pairs that are not independent of each other, since they share a prompt."""

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxmed.data import splits
from jaxmed.data.pairs import Pair


def clusters(pairs: Sequence[Pair]) -> list[int]:
    """The number of each pair's cluster, from 0.

    Two pairs are of one cluster if they share a prompt's text or tokens, in either role, or the
    base prompt's name; or if a chain of such pairs lies between them. Texts that differ in white
    space and letter case alone are one (`splits.fingerprints`).
    """
    shared: dict[str, int] = {}
    has: tuple[list[int], list[int]] = [], []
    for index, pair in enumerate(pairs):
        for one in _shared(pair):
            has[0].append(index)
            has[1].append(len(pairs) + shared.setdefault(one, len(shared)))
    size = len(pairs) + len(shared)
    graph = coo_array((np.ones(len(has[0])), has), (size, size))
    _, labels = connected_components(graph, directed=False)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in labels[: len(pairs)]]


def drawn(pairs: Sequence[Pair], count: int, seed: int) -> list[int]:
    """Indices of the pairs of so many clusters, which a hash of their ids draws.

    Args:
        pairs: the pairs.
        count: of clusters; all if there are no more.
        seed: of the draw.
    """
    of_each = clusters(pairs)
    names: dict[int, str] = {}
    for cluster, pair in zip(of_each, pairs, strict=True):
        names[cluster] = min(names.get(cluster, pair.id), pair.id)

    def place(cluster: int) -> bytes:
        return hashlib.sha256(f"{seed} {names[cluster]}".encode()).digest()

    chosen = set(sorted(names, key=place)[:count])
    return [index for index, cluster in enumerate(of_each) if cluster in chosen]


def _shared(pair: Pair) -> set[str]:
    """What other pairs of its cluster may have too: its prompts, and the base prompt's name."""
    prompts = splits.fingerprints(pair.prompt_text, pair.prompt_ids) | splits.fingerprints(
        pair.counterfactual_text, pair.counterfactual_ids
    )
    return prompts | {f"base {pair.base}"}
