"""Effects a few layers at a time: what is read, and that nothing else comes of it."""

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jaxmed.analysis import ranking, slabs, statistics, summary
from jaxmed.question.effects import Status
from jaxmed.report import mediation
from jaxmed.store import results
from jaxmed.validation.scoring import TRUTH_KEYS
from tests.jaxmed.analysis import whole_summary
from tests.jaxmed.fabricated import NEURONS, PAIRS, RUN, SIZES, fabricate

BASES = ["a", "b", "a", "c", "d", "b", "e", "f"]


@pytest.fixture(scope="module", params=[None, BASES], ids=["bases differ", "bases are shared"])
def made(request, tmp_path_factory):
    """A run of which some neurons are estimates, and one head has failed in one pair."""
    run = RUN | {"screen": 3} | ({"pair_bases": request.param} if request.param else {})
    made = fabricate(tmp_path_factory.mktemp("made"), run)
    generator = np.random.default_rng(1)
    status = np.where(generator.random(SIZES.shape("neuron")) < 0.3, Status.ESTIMATED, Status.EXACT)
    for pair, effects in enumerate(zip(*made.effects("neuron"), strict=True)):
        made.write(pair, "neuron", *effects, status)
        made.write_estimates(pair, *generator.normal(size=(2, *SIZES.shape("neuron"))))
    nie, tie = (side[3] for side in made.effects("head"))
    nie[1, 2] = np.nan
    made.write(3, "head", nie, tie)
    return made


@pytest.fixture
def small(monkeypatch):
    """Two layers of neurons at a time, and some of the units and rows."""
    monkeypatch.setattr(slabs, "_EFFECTS_AT_ONCE", 2 * PAIRS * NEURONS)
    monkeypatch.setattr(summary, "_EFFECTS_AT_ONCE", PAIRS * 7)
    monkeypatch.setattr(summary, "_ROWS_AT_ONCE", 50)


def assert_same(found, expected, **tolerance):
    assert found.schema.equals(expected.schema)
    for name in expected.column_names:
        if name in whole_summary.FLOATS:
            columns = (table[name].to_numpy() for table in (found, expected))
            np.testing.assert_allclose(*columns, **tolerance, err_msg=name)
        else:
            assert found[name].to_pylist() == expected[name].to_pylist()


def test_a_summary_in_one_piece_is_the_whole_arrays(made):
    expected = whole_summary.summarise(made)
    assert_same(summary.summarise(made), expected, rtol=0)
    in_memory = {name: made[name] for name in made}
    assert_same(summary.summarise(in_memory), expected, rtol=0)


def test_a_summary_in_pieces_is_the_same_but_for_the_rounding_of_sums(made, small):
    expected = whole_summary.summarise(made)
    summary.write_summary(made)
    groups = pq.ParquetFile(made.place.folder / "summary.parquet")
    assert_same(groups.read(), expected, rtol=1e-12, atol=1e-15)
    assert max(groups.metadata.row_group(i).num_rows for i in range(groups.num_row_groups)) <= 50
    for number in range(groups.num_row_groups):
        group = groups.read_row_group(number, ["granularity", "estimand"])
        assert len({*group["granularity"].to_pylist()}) == 1 or group.num_rows == 3  # totals


def test_scouts_have_no_part_in_a_summary_of_effects_in_memory(tmp_path):
    made = fabricate(tmp_path, RUN | {"scouts": ["pair 0 <script>"]})
    in_memory = summary.summarise({name: made[name] for name in made})
    assert_same(in_memory, summary.summarise(made), rtol=0)
    of_neurons = in_memory.filter(pc.field("granularity") == "neuron")
    assert max(of_neurons["n_pairs"].to_pylist()) == PAIRS - 1


def test_no_more_is_read_than_is_held_and_all_of_it_once(made, small, monkeypatch):
    read = []
    effects = results.Results.effects

    def watched(self, granularity, *args, layers=slice(None), **others):
        found = effects(self, granularity, *args, layers=layers, **others)
        read.append((granularity, layers.start, layers.stop, found[0].size))
        return found

    monkeypatch.setattr(results.Results, "effects", watched)
    summary.summarise(made)
    of_neurons = [each for each in read if each[0] == "neuron"]
    assert [each[1:3] for each in of_neurons] == [(0, 2), (2, 4), (4, 6)]
    assert all(size == 2 * PAIRS * NEURONS for *_, size in of_neurons)
    read.clear()
    mediation.closing_lines(made)  # the summary is there: what it shows are shares of few units
    assert all(size <= 2 * PAIRS * NEURONS for name, *_, size in read if name == "neuron")


def test_means_and_rankings_in_pieces_are_the_whole_arrays(made, small):
    for granularity in made.granularities:
        whole = made.effects(granularity, exact=True)
        expected = [statistics.pair_mean(side) for side in whole]
        np.testing.assert_array_equal(slabs.mean_effects(made, granularity), expected)
        if granularity in TRUTH_KEYS:
            scores = ranking.rankings(made, granularity)
            np.testing.assert_array_equal(scores["nie"], np.abs(expected[0]))
            np.testing.assert_array_equal(scores["max"], ranking.strength(*whole))
    some = ranking.exact_strength(made, "neuron", slice(3))
    expected = ranking.strength(*(side[:3] for side in made.effects("neuron", exact=True)))
    np.testing.assert_array_equal(some, expected)
    estimated = ranking.estimated_strength(made)
    np.testing.assert_array_equal(estimated, ranking.strength(*made.estimates()))


def test_statuses_in_pieces_are_counted_like_those_of_whole_arrays(made, small):
    for granularity in made.granularities:
        done = made.done(granularity)
        counts, begun = slabs.statuses(made, granularity)
        np.testing.assert_array_equal(counts, np.bincount(done.ravel(), minlength=len(Status)))
        assert begun.all()


@pytest.mark.parametrize(
    ("shape", "together", "expected"),
    [
        ((4, 6, 16), 1, [2, 2, 2]),
        ((4, 6, 16), 2, [2, 2, 2]),
        ((4, 6, 4), 2, [6]),
        ((4, 8, 5), 4, [4, 4]),  # one piece, and not one and a half
        ((4, 8, 16), 8, [2, 2, 2, 2]),  # quarters of one that does not fit
        ((4, 6), 6, [6]),
        ((4, 3, 10**6), 1, [1, 1, 1]),  # one layer at least
    ],
)
def test_whole_pieces_are_read_where_they_fit(shape, together, expected, monkeypatch):
    monkeypatch.setattr(slabs, "_EFFECTS_AT_ONCE", 2 * 4 * 16)
    parts = list(slabs._parts(shape, together))
    assert [part.stop - part.start for part in parts] == expected
    assert [part.start for part in parts] == np.cumsum([0, *expected[:-1]]).tolist()
