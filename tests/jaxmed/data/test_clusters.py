"""Pairs that share a prompt are of one cluster."""

from jaxmed.data import clusters
from jaxmed.data.pairs import Pair


def pair(name, base, source, **changes):
    return Pair(name, tuple(base), tuple(source), **changes)


PAIRS = [
    pair("a", [1, 2], [1, 3], prompt_text="One  more", harmful_ids=(7,)),
    pair("b", [4, 2], [4, 3], harmful_ids=(7,)),  # the same answer joins nothing
    pair("c", [5, 6], [1, 2]),  # its source is a's base
    pair("d", [5, 7], [5, 6]),  # and c's base
    pair("e", [8, 1], [8, 2], base_id="b"),  # b's base by its name
    pair("f", [9, 9, 9], [9, 1], counterfactual_text="one more"),  # a's text, other tokens
    pair("g", [9, 2], [9, 3]),
]


def test_a_chain_of_shared_prompts_in_either_role_is_one_cluster():
    assert clusters.clusters(PAIRS) == [0, 1, 0, 0, 1, 0, 2]
    assert clusters.clusters(PAIRS[:2]) == [0, 1]
    # Without c nothing lies between a and d.
    assert clusters.clusters([PAIRS[0], PAIRS[3]]) == [0, 1]


def test_clusters_are_drawn_whole_and_whatever_the_order():
    draws = [clusters.drawn(PAIRS, 1, seed) for seed in range(30)]
    assert {tuple(drawn) for drawn in draws} == {(0, 2, 3, 5), (1, 4), (6,)}
    for seed, drawn in enumerate(draws):
        two = clusters.drawn(PAIRS, 2, seed)
        assert set(drawn) < set(two)
        backwards = clusters.drawn(PAIRS[::-1], 1, seed)
        assert {PAIRS[::-1][index].id for index in backwards} == {PAIRS[i].id for i in drawn}
    # Every cluster is as likely as any other, however many pairs it has.
    assert 4 <= draws.count([6]) <= 18
    assert clusters.drawn(PAIRS, 0, 0) == [] and len(clusters.drawn(PAIRS, 9, 0)) == len(PAIRS)
