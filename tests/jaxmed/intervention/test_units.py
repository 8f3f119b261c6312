"""Units by name and by rank, what they are held at, and units that are like them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.behaviour import batches
from jaxmed.engine.cost import Devices
from jaxmed.intervention import likeness, units, values
from jaxmed.intervention.units import Unit
from models.edits import Part
from models.errors import InputError
from models.sites import Site
from tests import tiny
from tests.jaxmed import fabricated

DECODER = tiny.decoder()
CONFIG = DECODER.config
NEURONS = [Unit(Site.NEURON, 0, 3), Unit(Site.NEURON, 2, 39)]
HEAD = Unit(Site.HEAD, 1, 2)
MLP = Unit(Site.MLP, 1)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, length).tolist() for length in (1, 5, 9)]


def test_names_are_read_as_they_are_written():
    every = [*NEURONS, HEAD, MLP, Unit(Site.ATTENTION, 0)]
    names = ["neuron:0.3", "neuron:2.39", "head:1.2", "mlp:1", "attention:0"]
    assert list(map(str, every)) == names
    assert units.named(names, CONFIG) == every


@pytest.mark.parametrize(
    "name, message",
    [
        ("neuron:0.40", "the model has 3 layers of 40 neurons"),
        ("head:3.0", "the model has 3 layers of 4 heads"),
        ("mlp:3", "the model has 3 layers, numbered from 0"),
        ("neuron:1", "needs LAYER.INDEX"),
        ("mlp:1.2", "needs a layer"),
        ("layer:1", "name units neuron:LAYER.INDEX"),
        ("neuron:1.-2", "name units neuron:LAYER.INDEX"),
        ("", "name units neuron:LAYER.INDEX"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(InputError, match=f"unit '{name}': {message}"):
        units.named([name], CONFIG)


def test_a_unit_is_named_once():
    with pytest.raises(InputError, match="units: one is named twice"):
        units.named(["mlp:1", "mlp:1"], CONFIG)


def test_the_strongest_units_of_a_run(tmp_path):
    run = fabricated.RUN | {"joint": fabricated.JOINT, "group_size": 1}
    results = fabricated.fabricate(tmp_path / "run", run)

    def strongest(*asked):
        return [str(unit) for unit in units.strongest(results, *asked)]

    gates = {f"neuron:5.{index}" for _, index in fabricated.GATES}
    detectors = {f"neuron:0.{index}" for _, index in fabricated.DETECTORS}
    assert set(strongest("neuron", "nie", 4)) == gates
    assert set(strongest("neuron", "tie", 3)) == detectors
    assert set(strongest("neuron", "max", 7)) == gates | detectors
    assert strongest("neuron", "joint", 0) == ["neuron:5.3", "neuron:1.2"]
    assert strongest("neuron", "joint", 1) == ["neuron:5.3"]
    assert strongest("head", "max", 1) == ["head:2.1"]
    assert set(strongest("module", "max", 3)) == {"mlp:0", "attention:2", "mlp:5"}
    with pytest.raises(InputError, match="top=3: the joint set of .* has 2"):
        strongest("neuron", "joint", 3)
    with pytest.raises(InputError, match="no joint set of heads"):
        strongest("head", "joint", 1)
    with pytest.raises(InputError, match="top=25: .* ranks 24 heads"):
        strongest("head", "max", 25)
    alone = fabricated.fabricate(tmp_path / "alone", granularities=("head",))
    with pytest.raises(InputError, match="no effects of single neurons: .*granularity 'neuron'"):
        units.strongest(alone, "neuron", "max", 1)


def test_modules_of_units():
    assert units.modules_of([*NEURONS, NEURONS[0], HEAD]) == [
        Unit(Site.ATTENTION, 1),
        Unit(Site.MLP, 0),
        Unit(Site.MLP, 2),
    ]
    assert units.modules_of([MLP]) == [MLP]


def values_of(sites, number):
    sizes = {Site.NEURON: (40,), Site.HEAD: (4, 8), Site.MLP: (24,)}
    return {
        site: tuple(np.full((3, *sizes[site]), number + part) for part in (0.0, 0.5))
        for site in sites
    }


@pytest.mark.parametrize("positions", values.POSITIONS)
@pytest.mark.parametrize("strength", [1.0, 0.25, 0.0])
def test_holds_move_units_by_a_share_of_the_way(positions, strength):
    held_units = [NEURONS[0], HEAD, MLP]
    at = values_of([unit.site for unit in held_units], 2.0)
    made = values.holds(held_units, at, strength, positions, CONFIG)
    sizes = {Site.NEURON: (40,), Site.HEAD: (4, 8), Site.MLP: (24,)}
    parts = jnp.array([Part.PROMPT, Part.LAST, Part.GENERATED])
    for unit in held_units:
        before = jnp.asarray(RNG.normal(size=(3, *sizes[unit.site])), jnp.float32)
        for layer in range(3):
            after = before
            for hold in made:
                if hold.site == unit.site:
                    after = hold.apply(layer, parts, after)
            expected = np.array(before)
            if layer == unit.layer:
                for place, held in enumerate(values.POSITIONS[positions]):
                    value = 2.0 if place == 0 else 2.5
                    inside = (place,) if unit.index is None else (place, unit.index)
                    if held:
                        moved = (1 - strength) * expected[inside] + strength * value
                        expected[inside] = moved
            np.testing.assert_allclose(after, expected, rtol=1e-6)
            if strength == 0:
                assert (np.asarray(after) == np.asarray(before)).all()


def test_activations_are_those_of_a_plain_run():
    sites = [Site.NEURON, Site.HEAD, Site.MLP]
    found = values.activations(DECODER, [[tokens] for tokens in PROMPTS], sites)
    for number, tokens in enumerate(PROMPTS):
        trace = DECODER(np.array(tokens))[1]
        for site, (before, last) in found.items():
            value = np.asarray(getattr(trace, site.value))
            np.testing.assert_allclose(last[number], value[:, -1], atol=1e-6)
            earlier = value[:, :-1] if len(tokens) > 1 else value
            np.testing.assert_allclose(before[number], earlier.mean(axis=1), atol=1e-6)
    both = values.activations(DECODER, [PROMPTS[:2], PROMPTS[2:]], sites)
    for site, places in both.items():
        for place, found_there in enumerate(places):
            alone = found[site][place]
            np.testing.assert_allclose(found_there, [alone[:2].mean(axis=0), alone[2]], rtol=1e-6)


def test_groups_have_the_means_of_their_prompts():
    sites = [Site.NEURON, Site.HEAD]
    found = values.activations(DECODER, [[tokens] for tokens in PROMPTS], sites)
    groups = {
        "two": np.array([True, False, True]),
        "all": np.ones(3, bool),
        "none": np.zeros(3, bool),
    }
    means = values.group_means(DECODER, PROMPTS, groups, sites)
    assert list(means) == ["two", "all"]
    for name, own in means.items():
        for site, places in own.items():
            for place, found_there in enumerate(places):
                want = found[site][place][groups[name]].mean(axis=0)
                np.testing.assert_allclose(found_there, want, rtol=1e-5, atol=1e-7)


def test_prompts_of_like_length_are_run_together(monkeypatch):
    """As many as fit the memory, and one by one they give the same."""
    shapes, means = [], values._means

    def counted(decoder, tokens, *others):
        shapes.append(tokens.shape)
        return means(decoder, tokens, *others)

    monkeypatch.setattr(values, "_means", counted)
    prompts = [RNG.integers(0, 61, length).tolist() for length in (3, 40, 9, 5, 33, 1, 12)]
    sites, groups = [Site.NEURON, Site.MLP], {"all": np.ones(len(prompts), bool)}
    told = []
    together = values.group_means(DECODER, prompts, groups, sites, progress=told.append)["all"]
    assert [length for _, length in shapes] == [64, 32] and sum(told) == len(prompts)

    least = batches.sizes(DECODER, (), prompts, batch_size=1)
    monkeypatch.setattr(batches, "sizes", lambda *args, **kwargs: least)
    shapes.clear()
    alone = values.group_means(DECODER, prompts, groups, sites)["all"]
    assert {rows for rows, _ in shapes} == {1} and len(shapes) == len(prompts)
    for site, places in alone.items():
        np.testing.assert_allclose(together[site], places, rtol=1e-5, atol=1e-6)


def test_values_that_do_not_fit_the_memory_are_refused():
    with pytest.raises(InputError, match="too little for a single prompt of 32 tokens"):
        values.activations(DECODER, [PROMPTS], [Site.NEURON], memory=10_000)


def test_memory_counts_what_is_kept_of_every_position():
    runs = [[1] * 40]
    without, kept = (
        batches.sizes(DECODER, (), runs, kept=numbers, memory=2**22)[64] for numbers in (0, 2000)
    )
    assert kept < without


def test_memory_counts_the_weights_that_are_gathered(monkeypatch):
    def rows(memory, storing):
        monkeypatch.setattr(Devices, "of", lambda mesh: Devices(2, storing))
        return batches.sizes(DECODER, (), [[1] * 40], memory=memory)[64]

    whole, in_parts = ([rows(n * 2**14, storing) for n in range(128, 256)] for storing in (1, 2))
    assert np.all(np.array(in_parts) <= whole) and in_parts != whole


def test_zero_is_the_value_of_every_site():
    zeros = values.zero([Site.NEURON, Site.HEAD, Site.MLP], CONFIG)
    made = values.holds([NEURONS[0], HEAD, MLP], zeros, 1.0, "all", CONFIG)
    assert all(not hold.shift.any() for hold in made)


def test_differences_are_the_larger_of_both_places():
    left = {
        Site.NEURON: (np.array([[1.0, 5.0]]), np.array([[0.0, 0.0]])),
        Site.HEAD: (np.array([[[3.0, 4.0]]]), np.array([[[0.0, 1.0]]])),
    }
    right = {site: tuple(np.zeros_like(part) for part in both) for site, both in left.items()}
    right[Site.NEURON][1][0, 0] = -2.0
    assert likeness.difference(left, right, Site.NEURON).tolist() == [[2.0, 5.0]]
    assert likeness.difference(left, right, Site.HEAD).tolist() == [[5.0]]


def test_output_norms_are_those_of_what_a_unit_writes():
    neuron = likeness.output_norms(DECODER, Site.NEURON)
    head = likeness.output_norms(DECODER, Site.HEAD)
    assert neuron.shape == (3, 40) and head.shape == (3, 4)
    block = DECODER.block(2)
    one = jnp.zeros((1, 40)).at[0, 7].set(1)
    np.testing.assert_allclose(neuron[2, 7], np.linalg.norm(block.mlp.write(one)), rtol=1e-5)
    written = [
        np.asarray(block.attention.write(jnp.eye(32)[i].reshape(1, 4, 8))) for i in range(8, 16)
    ]
    np.testing.assert_allclose(head[2, 1], np.linalg.norm(written), rtol=1e-5)


def test_matched_units_are_of_the_layer_like_the_given_and_others():
    like = RNG.uniform(1, 2, (3, 40))
    like[0, 10:20] = like[0, 3] * np.linspace(1.001, 1.002, 10)
    traits = {Site.NEURON: [like, np.ones((3, 40))]}
    drawn = [likeness.matched(NEURONS, traits, np.random.default_rng(seed)) for seed in range(20)]
    for draw in drawn:
        assert [unit.layer for unit in draw] == [0, 2]
        assert not set(draw) & set(NEURONS)
        assert 10 <= draw[0].index < 20
    assert len({draw[0] for draw in drawn}) > 3


def test_traits_far_below_the_largest_do_not_spread_a_layer():
    tiny_values = np.full((1, 6), 1e-30)
    tiny_values[0, :3] = 1.0, 1.1, 0.5
    unit = Unit(Site.NEURON, 0, 0)
    distance = likeness._distances(unit, [tiny_values])
    assert np.argsort(distance, kind="stable")[:3].tolist() == [0, 1, 2]


def test_where_a_layer_has_too_few_others_nothing_is_matched():
    heads = [Unit(Site.HEAD, 0, index) for index in range(3)]
    traits = {Site.HEAD: [np.ones((3, 4))]}
    assert likeness.matched(heads, traits, RNG) is None
    assert likeness.matched(heads[:2], traits, RNG) is not None
    assert likeness.matched([MLP], {}, RNG) is None


def test_few_units_have_few_controls():
    """Two of four heads leave one draw, and no draw counts twice."""
    heads = [Unit(Site.HEAD, 0, 0), Unit(Site.HEAD, 0, 1)]
    traits = {Site.HEAD: [np.ones((1, 4))]}
    first = likeness.another(heads, traits, [], seed=0)
    assert [str(unit) for unit in first] == ["head:0.2", "head:0.3"]
    assert likeness.another(heads, traits, [first], seed=0) is None
