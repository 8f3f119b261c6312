"""Direct effects, interactions, and the greedy joint set on a hand-made model."""

import math
import types

import numpy as np
import pytest
from flax import nnx

from jaxmed.analysis import circuits, estimands
from jaxmed.analysis import joint as joint_lib
from jaxmed.data.pairs import Pair
from jaxmed.engine import cost
from jaxmed.question import effects
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.question import Question
from models.decoder import Decoder
from tests import tiny

SHAPE = (3, 5)  # layers, neurons
# What is asked of a model that is replaced: it has no weights.
DECODER = nnx.eval_shape(lambda: Decoder(tiny.config("llama"), rngs=nnx.Rngs(0)))
PAIRS = [Pair("0", (1,), (2,)), Pair("1", (1,), (2,))]
QUESTION = Question(LogitDifference())


def test_direct_effect_and_interaction_by_hand():
    te = np.array([10.0, -2.0])
    nie = np.array([[[1.0, 2.0]], [[0.5, -2.0]]])
    tie = np.array([[[4.0, 2.0]], [[-1.0, 0.0]]])
    np.testing.assert_array_equal(
        estimands.natural_direct_effect(te, tie), [[[6.0, 8.0]], [[-1.0, -2.0]]]
    )
    np.testing.assert_array_equal(estimands.interaction(nie, tie), [[[3.0, 0.0]], [[-1.5, 2.0]]])


def test_direct_effect_is_what_the_opposite_patch_leaves():
    """NDE = Y(x', Z<-Z(x)) - Y(x) by the design; here of a model Y = a z + b x + c z x."""
    a, b, c = 2.0, 3.0, 5.0
    (x, z), (x_source, z_source) = (1.0, 1.0), (2.0, 4.0)

    def y(x, z):
        return a * z + b * x + c * z * x

    te = y(x_source, z_source) - y(x, z)
    nie = y(x, z_source) - y(x, z)
    tie = y(x_source, z_source) - y(x_source, z)
    te, nie, tie = (np.array([number]) for number in (te, nie, tie))
    assert estimands.natural_direct_effect(te, tie) == y(x_source, z) - y(x, z)
    # Only the product of z and x interacts.
    assert estimands.interaction(nie, tie) == c * (z_source - z) * (x_source - x)


# The hand-made model: half of TE goes through three redundant detectors, and half of it through
# two saturated gates. Patching detectors into the base run alone does nothing before all three are
# in; undoing any one of them in the source run undoes their half. Either gate alone is enough.
DETECTORS = [(0, 1), (0, 4), (1, 2)]
GATES = [(2, 0), (2, 3)]
TE = np.array([-4.0, -8.0])


def share_nie(members):
    return 0.5 * all(members[d] for d in DETECTORS) + 0.5 * any(members[g] for g in GATES)


def share_tie(members):
    return 0.5 * any(members[d] for d in DETECTORS) + 0.5 * all(members[g] for g in GATES)


@pytest.fixture
def set_model(monkeypatch):
    """Replaces the engine; what it was asked is in `asked`."""
    model = types.SimpleNamespace(nie=share_nie, tie=share_tie, asked=[])

    def joint_pair(decoder, pair, question, sets, memory):
        number = int(pair.id)
        model.asked.append((number, sets.copy()))
        shares = ({"joint": np.array([side(s) for s in sets])} for side in (model.nie, model.tie))
        nie, tie = ({"joint": TE[number] * share["joint"]} for share in shares)
        return effects.PairEffects(1.0, 1.0 + TE[number], nie, tie)

    monkeypatch.setattr(joint_lib, "joint_pair", joint_pair)
    return model


ALL = 2.0  # a share that no set reaches: the search goes on to its size


def search(single, size, share=ALL, **options):
    return joint_lib.greedy_set(DECODER, PAIRS, QUESTION, single, size=size, share=share, **options)


def single_effects():
    """What single effects say: the larger of |NIE| and |TIE|, in shares of TE."""
    single = np.full(SHAPE, 0.01)
    for unit in (*DETECTORS, *GATES):
        single[unit] = 0.5
    single[0, 1] = 0.6  # the first of equals
    return single


def test_greedy_set_finds_redundant_and_saturated_units(set_model):
    found = search(single_effects(), 5)
    assert set(found.picked) == {*DETECTORS, *GATES}
    assert found.share_nie[-1] == found.share_tie[-1] == 1.0


def test_greedy_set_adds_the_unit_that_raises_the_sum_of_both_shares_most(set_model):
    # Every detector and every gate adds 0.5 at first, and the candidates' order breaks ties. After
    # (0, 1), a gate alone adds to the NIE; after it, the other gate to the TIE; the detectors last.
    found = search(single_effects(), 5)
    assert found.picked == [(0, 1), (2, 0), (2, 3), (0, 4), (1, 2)]
    np.testing.assert_allclose(found.share_nie, [0.0, 0.5, 0.5, 0.5, 1.0])
    np.testing.assert_allclose(found.share_tie, [0.5, 0.5, 1.0, 1.0, 1.0])


def test_each_estimand_alone_would_miss_half_of_the_set(set_model):
    set_model.tie = lambda members: 0.0
    only_nie = search(single_effects(), 2).picked
    set_model.nie, set_model.tie = (lambda members: 0.0), share_tie
    only_tie = search(single_effects(), 1).picked
    assert only_nie[0] in GATES and only_tie[0] in DETECTORS


def test_overshoot_is_no_gain(set_model):
    # (0, 0) triples the effect of the first pick; (0, 2) adds the missing fifth.
    worth = {(0, 0): 3.0, (0, 1): 0.9, (0, 2): 0.1}

    def shares(members):
        return sum(value for unit, value in worth.items() if members[unit])

    set_model.nie = shares
    set_model.tie = lambda members: 0.2 * members[0, 2] + 0.1 * members[0, 1]
    single = np.zeros(SHAPE)
    single[0, :3] = 3, 2, 1
    # At first min(3, 1) + 0 equals 0.9 + 0.1, and (0, 0) is tried first; then only the TIE counts.
    assert search(single, 3).picked == [(0, 0), (0, 2), (0, 1)]


def test_shares_are_of_the_mean_effect_and_te_not_means_of_ratios(set_model, monkeypatch):
    by_pair = {0: 1.0, 1: 0.25}
    original = joint_lib.joint_pair

    def uneven(decoder, pair, question, sets, memory):
        found = original(decoder, pair, question, sets, memory)
        scaled = (
            {"joint": by_pair[int(pair.id)] * side["joint"]} for side in (found.nie, found.tie)
        )
        return effects.PairEffects(found.y_base, found.y_source, *scaled)

    monkeypatch.setattr(joint_lib, "joint_pair", uneven)
    set_model.nie = set_model.tie = lambda members: float(members[1, 1])
    single = np.zeros(SHAPE)
    single[1, 1] = 1
    found = search(single, 1)
    # (1.0 * -4 + 0.25 * -8) / 2 over (-4 - 8) / 2; the mean of ratios would be 0.625.
    np.testing.assert_allclose(found.share_nie, [0.5])
    np.testing.assert_allclose(found.share_tie, [0.5])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_set_stops_at_its_size_and_says_each_step(size, set_model):
    steps = []
    found = search(single_effects(), size, on_step=lambda: steps.append(None))
    assert len(found.picked) == len(found.share_nie) == len(found.share_tie) == size
    assert len(steps) == size


def test_greedy_set_is_at_most_all_neurons(set_model):
    found = search(single_effects(), 100)
    assert len(found.picked) == len(set(found.picked)) == np.prod(SHAPE)


@pytest.mark.parametrize(
    "share, picked",
    [(0.5, [(0, 1), (2, 0)]), (1.0, [(0, 1), (2, 0), (2, 3), (0, 4), (1, 2)])],
)
def test_greedy_set_stops_when_both_shares_are_reached(share, picked, set_model):
    found = search(single_effects(), 15, share=share)
    assert found.picked == picked
    assert min(found.share_nie[-1], found.share_tie[-1]) >= share


def test_what_the_set_does_not_need_is_taken_out_again(set_model):
    # (0, 0) is the strongest alone, and worth nothing beside the other two.
    def shares(members):
        return max(0.6 * members[0, 0], 0.5 * (members[0, 1] + 1.0 * members[0, 2]))

    set_model.nie = set_model.tie = shares
    single = np.zeros(SHAPE)
    single[0, :3] = 3, 2, 1
    kept = search(single, 15)
    assert kept.picked[:3] == [(0, 0), (0, 1), (0, 2)]
    found = search(single, 15, share=0.95)
    assert found.picked == [(0, 1), (0, 2)]
    # The path is that of what is left.
    assert found.share_nie == found.share_tie == [0.5, 1.0]


def test_noise_does_not_hide_units_that_show_only_together(set_model):
    """Three units do everything together and nothing before; all others do a little."""
    needed = [(1, 0), (1, 3), (2, 4)]

    def shares(members):
        return float(all(members[unit] for unit in needed)) + 1e-3 * members.sum()

    set_model.nie = set_model.tie = shares
    single = np.full(SHAPE, 1e-3)
    for unit in needed:
        single[unit] = 1.0  # as found by one estimand
    assert set(search(single, 15, share=0.95).picked) == set(needed)


def additive(weights):
    """A model in which every neuron has its own share of both effects."""
    return lambda members: float(np.sum(weights * members))


def test_faithfulness_is_what_the_best_neurons_do_alone(set_model):
    # 15 neurons: the smallest circuits are 1 neuron, then 2 (10% is 1.5), 3, 8 (7.5) and 15.
    weights = np.arange(15.0).reshape(SHAPE) / 105
    set_model.nie, set_model.tie = additive(weights), additive(weights)
    sizes = [math.ceil(fraction * 15) for fraction in circuits.CIRCUIT_SIZES]
    found = circuits.faithfulness(
        DECODER,
        PAIRS,
        QUESTION,
        {"best": weights, "worst": -weights, "unknown": np.where(weights > 0.1, weights, np.nan)},
    )
    descending = np.sort(weights, axis=None)[::-1]
    np.testing.assert_allclose(found["best"], [[descending[:n].sum() for n in sizes]] * 2)
    np.testing.assert_allclose(found["worst"], [[descending[15 - n :].sum() for n in sizes]] * 2)
    # Where only the four strongest are known, they come first.
    np.testing.assert_allclose(found["unknown"][:, :8], found["best"][:, :8])


def test_faithfulness_tells_the_estimands_apart(set_model):
    """Either gate is enough in the base run, so what is kept of one alone hides there."""
    scores = np.zeros(SHAPE)
    scores[2, 0], scores[2, 3] = 2, 1
    set_model.nie = lambda members: float(members[2, 0] or members[2, 3])
    set_model.tie = lambda members: float(members[2, 0] and members[2, 3])
    base, source = circuits.faithfulness(DECODER, PAIRS, QUESTION, {"found": scores})["found"]
    # Sizes 1 and then 2 neurons; patching the other gate alone undoes the base run's answer.
    assert base[0] == 0 and source[0] == 1
    assert base[7] == 1 and source[7] == 1


def test_areas_under_and_beside_a_curve():
    sizes = np.array(circuits.CIRCUIT_SIZES)
    cpr, cmd = circuits.circuit_areas(np.stack([sizes, np.full(10, 1.5), np.ones(10)]))
    span = sizes[-1] - sizes[0]
    np.testing.assert_allclose(cpr, [(1 - sizes[0] ** 2) / 2, 1.5 * span, span])
    np.testing.assert_allclose(cmd, [span**2 / 2, 0.5 * span, 0])


def test_only_the_strongest_are_candidates(set_model):
    single = np.zeros(SHAPE)
    single[0, 0], single[1, 1], single[1, 2], single[2, 2] = 1.0, np.nan, 0.5, 0.9
    found = search(single, 3, candidates=3)
    tried = np.any([sets.any(axis=0) for _, sets in set_model.asked], axis=0)
    assert set(found.picked) == {(0, 0), (1, 2), (2, 2)}
    np.testing.assert_array_equal(np.argwhere(tried), [[0, 0], [1, 2], [2, 2]])


def test_a_trial_is_the_set_so_far_and_one_more_for_every_pair(set_model):
    found = search(single_effects(), 2, candidates=4)
    assert [pair for pair, _ in set_model.asked] == [0, 1, 0, 1]
    for step, (_, sets) in enumerate(set_model.asked[::2]):
        so_far = np.zeros(SHAPE, bool)
        for unit in found.picked[:step]:
            so_far[unit] = True
        tried = sets[: 4 - step]
        assert tried[:, so_far].all() and (tried.sum(axis=(1, 2)) == step + 1).all()
    # One shape of sets at all steps: one compilation.
    assert len({sets.shape for _, sets in set_model.asked}) == 1


def test_scores_rank_the_set_first_in_its_order_then_single_effects():
    single = np.array([[0.1, 7.0, 0.0], [5.0, 0.3, np.nan]])
    joint = joint_lib.JointSet([(1, 1), (0, 0)], [0.5, 1.0], [0.5, 1.0])
    scores = joint.scores(single)
    ranked = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None)[:5]
    units = [tuple(int(i) for i in np.unravel_index(flat, single.shape)) for flat in ranked]
    assert units == [(1, 1), (0, 0), (0, 1), (1, 0), (0, 2)]
    assert np.isnan(scores[1, 2])
    assert single[1, 1] == 0.3  # the effects themselves are left alone


def test_a_set_costs_as_much_as_one_neuron_of_the_first_layer_and_its_mlp():
    """However many neurons the model has."""
    config = tiny.config("llama")
    pair = Pair("0", tuple(range(1, 9)), tuple(range(2, 10)), (3,), (4,))
    one = np.zeros((config.num_layers, config.intermediate_size), bool)
    one[0, 0] = True
    alone = cost.operations(config, pair, QUESTION, ["neuron"], {"neuron": one})
    mlp = 2 * 2 * 3 * config.hidden_size * config.intermediate_size  # of both estimands
    assert joint_lib.operations(config, pair, QUESTION) == alone + mlp
