"""Statistics against scipy, against explicit loops, and against the definitions."""

import itertools
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from jaxmed.analysis import ranking, statistics, summary
from jaxmed.question import effects as effects_lib
from jaxmed.question import sites
from jaxmed.question.effects import Status
from jaxmed.store import results

NAN = np.nan


def values_with_gaps(pairs=9, units=6, seed=0):
    generator = np.random.default_rng(seed)
    values = generator.normal(loc=0.4, size=(pairs, units))
    values[2:5, 1] = values[0, 4] = NAN
    return values


def test_the_interval_is_that_of_an_explicit_loop_over_the_same_resamples():
    values = values_with_gaps()
    mean, low, high = statistics.mean_interval(values, level=0.9, resamples=200, seed=3)
    for unit in range(values.shape[1]):
        column = values[:, unit][~np.isnan(values[:, unit])]
        counts = statistics._draw_counts(len(column), 200, seed=3)
        means = [np.repeat(column, drawn).mean() for drawn in counts]
        assert mean[unit] == pytest.approx(column.mean(), rel=1e-12)
        expected = np.quantile(means, [0.05, 0.95])
        np.testing.assert_allclose([low[unit], high[unit]], expected, rtol=1e-10, atol=1e-12)


def test_the_interval_agrees_with_scipy():
    values = values_with_gaps(pairs=20)[:, [0, 2]]
    _, low, high = statistics.mean_interval(values, resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    width = theirs.high - theirs.low
    assert (np.abs(low - theirs.low) < 0.02 * width).all()
    assert (np.abs(high - theirs.high) < 0.02 * width).all()


def test_the_interval_does_not_depend_on_chunks_or_on_other_units(monkeypatch):
    values = np.concatenate([values_with_gaps(units=7), values_with_gaps(units=7, seed=1)], axis=1)
    whole = statistics.mean_interval(values, resamples=50)
    monkeypatch.setattr(statistics, "_VALUES_AT_ONCE", 100)
    np.testing.assert_allclose(statistics.mean_interval(values, resamples=50), whole, rtol=1e-12)
    alone = statistics.mean_interval(values[:, 3], resamples=50)
    np.testing.assert_allclose(alone, [part[3] for part in whole], rtol=1e-12)


def test_one_pair_or_none_has_no_interval():
    values = np.array([[1.0, NAN, 2.0], [3.0, NAN, NAN]])[:, :, None]
    mean, low, high = statistics.mean_interval(values)
    np.testing.assert_array_equal(mean, [[2], [NAN], [2]])
    np.testing.assert_array_equal(np.isnan(low), [[False], [True], [True]])
    np.testing.assert_array_equal(np.isnan(high), np.isnan(low))


def test_p_values_agree_with_scipy():
    values = values_with_gaps()
    expected = stats.ttest_1samp(values, 0, axis=0, nan_policy="omit").pvalue
    np.testing.assert_allclose(statistics.p_values(values), expected, rtol=1e-12)
    cube = values.reshape(9, 2, 3)
    np.testing.assert_array_equal(
        statistics.p_values(cube), statistics.p_values(values).reshape(2, 3)
    )


def test_p_values_where_a_t_test_has_none():
    # 0.1 three times has a mean that is not 0.1 in floating point.
    values = np.array([[0, 0.1, 5, NAN], [0, 0.1, NAN, NAN], [0, 0.1, NAN, NAN]])
    np.testing.assert_array_equal(statistics.p_values(values), [1, 0, NAN, NAN])


def test_q_values_are_benjamini_and_hochberg_over_what_was_tested():
    p = np.array([[0.01, NAN, 0.04], [0.03, 0.9, NAN]])
    # Sorted p: 0.01, 0.03, 0.04, 0.9, times 4 / rank, then the running minimum from the right.
    expected = [[0.04, NAN, 0.04 * 4 / 3], [0.04 * 4 / 3, 0.9, NAN]]
    np.testing.assert_allclose(statistics.q_values(p), expected)
    assert np.isnan(statistics.q_values(np.array([NAN]))).all()


def test_q_values_count_untested_units_as_if_their_p_were_1():
    p = np.array([0.01, NAN, 0.04])
    np.testing.assert_allclose(statistics.q_values(p, untested=8), [0.1, NAN, 0.2])
    with_them = statistics.q_values(np.concatenate([p, np.ones(8)]))
    np.testing.assert_array_equal(statistics.q_values(p, untested=8), with_them[:3])
    assert np.isnan(statistics.q_values(np.array([NAN]), untested=3)).all()


def test_strength_is_the_larger_of_both_mean_effects():
    nie, tie = np.array([[1, -3, NAN], [1, -1, NAN]]), np.array([[4, 1, NAN], [-4, 1, NAN]])
    np.testing.assert_array_equal(ranking.strength(nie, tie), [1, 2, NAN])


def test_a_share_is_a_ratio_of_means():
    te = np.array([1.0, 3.0, NAN])
    effects = np.array([[1.0, 1.0], [0.0, NAN], [100.0, 100.0]])
    shares = ranking.share(effects, te)
    np.testing.assert_allclose(shares, [0.5 / 2, 1 / 1])  # the mean of ratios would be 0.5 and 1


def test_no_share_is_formed_of_a_small_total():
    te = np.array([2.0, -1.9])
    effects = np.ones((2, 2))
    assert np.isnan(ranking.share(effects, te, minimum=0.1)).all()
    np.testing.assert_allclose(ranking.share(effects, te, minimum=0.05), 20)
    np.testing.assert_allclose(ranking.share(effects, -te - 1, minimum=0.1), -1 / 1.05)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs_of_units(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 5, size=(4, 6)).astype(float)  # with ties
    scores[0, 0] = NAN
    truth = generator.random((4, 6)) < 0.3
    ranked = np.nan_to_num(scores, nan=-1)
    above = [
        float(true > other) + 0.5 * float(true == other)
        for true, other in itertools.product(ranked[truth], ranked[~truth])
    ]
    assert ranking.auroc(scores, truth) == pytest.approx(np.mean(above))


@pytest.mark.parametrize("seed", range(5))
def test_precision_at_k_is_the_mean_over_all_orders_of_ties(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, size=7).astype(float)
    truth = np.zeros(7, bool)
    truth[generator.choice(7, size=3, replace=False)] = True
    precisions = []
    for order in itertools.permutations(range(7)):
        order = np.array(order)
        if (np.diff(scores[order]) <= 0).all():
            precisions.append(truth[order[:3]].mean())
    assert ranking.precision_at_k(scores, truth) == pytest.approx(np.mean(precisions))


def test_pairs_of_one_base_count_as_one():
    values = np.array([[1.0, NAN], [5.0, 2.0], [3.0, NAN], [2.0, 4.0]], np.float32)
    averaged = statistics.by_base(values, ["x", "y", "x", "y"])
    np.testing.assert_array_equal(averaged, [[2.0, NAN], [3.5, 3.0]])
    np.testing.assert_array_equal(statistics.by_base(values[:, 0], "xyxy"), [2.0, 3.5])
    assert statistics.by_base(values, "abcd") is values


def test_scores_of_a_model_with_nothing_planted():
    nothing = np.zeros(3, bool)
    assert np.isnan(ranking.auroc(np.arange(3), nothing))
    assert np.isnan(ranking.auroc(np.arange(3), ~nothing))
    assert np.isnan(ranking.precision_at_k(np.arange(3), nothing))
    truth = np.array([True, False, False])
    assert ranking.precision_at_k(np.array([NAN, 0.0, 1.0]), truth) == 0


SIZES = effects_lib.Sizes(2, 3, 4, positions=5, sites=("residual", "mlp"), directions=2)
RUN = {"metric": "logit_diff", "positions": "last", "precision": "float32", "group_size": 8}


@pytest.fixture
def run(tmp_path):
    """Three pairs of which the last is two tokens long and has no heads."""
    run = results.Results.create(tmp_path, RUN, SIZES, "abc", sites.GRANULARITIES)
    generator = np.random.default_rng(0)
    for pair in range(3):
        run.write_totals(pair, y_base=2.0, y_source=-1.0 - pair)
        for granularity in sites.GRANULARITIES:
            nie, tie = generator.normal(size=(2, *SIZES.shape(granularity)))
            if granularity == "token":
                end = 2 if pair == 2 else 4
                nie[..., end:] = tie[..., end:] = NAN
            run.write(pair, granularity, nie, tie)
    failed = np.full(SIZES.shape("head"), NAN)
    run.write(2, "head", failed, failed)
    return run


def row_of(table, **place):
    rows = [row for row in table.to_pylist() if all(row[key] == place[key] for key in place)]
    assert len(rows) == 1
    return rows[0]


def test_the_summary_has_a_row_for_every_unit_that_a_pair_has(run):
    table = summary.summarise(run)
    # Position 4 of the tokens is beyond every pair.
    units = {"layer": 2, "module": 2 * 2, "head": 2 * 3, "token": 2 * 3 * 4, "neuron": 2 * 4}
    units["direction"] = 2 * 2 * 2
    assert table.num_rows == 3 + 4 * sum(units.values())
    places = ["granularity", "layer", "site", "unit", "position", "estimand"]
    measured = ["mean", "ci_low", "ci_high", "p_value", "q_value", "n_pairs", "exact"]
    assert table["exact"].to_pylist() == [True] * table.num_rows
    assert table.column_names == places + measured
    assert set(table["site"].unique().to_pylist()) == {
        *("layer", "attention", "mlp", "head", "neuron", "residual", None)
    }


def test_a_summary_row_holds_its_units_statistics(run):
    table = summary.summarise(run)
    nie, tie = (effects.astype(float) for effects in run.effects("token"))
    row = row_of(table, granularity="token", layer=1, site="mlp", position=3, estimand="int")
    expected = (tie - nie)[:2, 1, 2, 3]
    assert (row["unit"], row["n_pairs"]) == (None, 2)
    assert row["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(expected, 0).pvalue, rel=1e-4)

    row = row_of(table, granularity="neuron", layer=0, unit=3 * 8, estimand="nde")
    expected = run.te - run.effects("neuron")[1][:, 0, 3]
    assert row["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert row["ci_low"] <= row["mean"] <= row["ci_high"]

    row = row_of(table, granularity="head", layer=1, unit=2, estimand="tie")
    assert row["n_pairs"] == 2

    row = row_of(table, granularity="direction", layer=1, site="mlp", unit=0, estimand="nie")
    expected = run.effects("direction")[0][:, 1, 1, 0].astype(float).mean()
    assert row["mean"] == pytest.approx(expected, rel=1e-6)

    row = row_of(table, granularity="total", estimand="te")
    assert (row["mean"], row["n_pairs"], row["layer"], row["site"]) == (-4.0, 3, None, None)
    assert row_of(table, granularity="total", estimand="y_base")["mean"] == 2.0


def test_a_family_of_tests_is_one_granularity_and_one_estimand(run):
    rows = summary.summarise(run).to_pylist()
    for granularity, estimand in itertools.product(sites.GRANULARITIES, summary.SUMMARISED):
        family = [
            row for row in rows if (row["granularity"], row["estimand"]) == (granularity, estimand)
        ]
        p = np.array([row["p_value"] for row in family])
        expected = stats.false_discovery_control(p)
        np.testing.assert_allclose([row["q_value"] for row in family], expected)


def test_estimates_are_not_tested_but_count_in_the_correction(run):
    whole = summary.summarise(run).to_pylist()
    status = np.full(SIZES.shape("neuron"), Status.ESTIMATED)
    status[0, 1], status[1, 3] = Status.EXACT, Status.EXACT
    for pair, effects in enumerate(zip(*run.effects("neuron"), strict=True)):
        run.write(pair, "neuron", *effects, status)
    screened = summary.summarise(run).to_pylist()
    tests = ("ci_low", "ci_high", "p_value", "q_value")
    for estimand in summary.SUMMARISED:
        family = [
            (row, full)
            for row, full in zip(screened, whole, strict=True)
            if (row["granularity"], row["estimand"]) == ("neuron", estimand)
        ]
        exact = [(row, full) for row, full in family if row["exact"]]
        places = [(row["layer"], row["unit"] // RUN["group_size"]) for row, _ in exact]
        assert len(family) == 8 and places == [(0, 1), (1, 3)]
        for row, full in family:
            assert row["mean"] == full["mean"]
            assert row["exact"] or [row[name] for name in tests] == [None] * 4
        for row, full in exact:
            assert [row[name] for name in tests[:3]] == [full[name] for name in tests[:3]]
        p = [row["p_value"] for row, _ in exact] + [1] * 6
        q = [row["q_value"] for row, _ in exact]
        np.testing.assert_allclose(q, stats.false_discovery_control(p)[:2])


def test_the_summary_file_is_read_while_it_is_newer_than_the_effects(run):
    path = run.place.folder / "summary.parquet"
    assert summary.read_summary(run).equals(pq.read_table(path))
    written = path.stat().st_mtime_ns
    summary.read_summary(run)
    assert path.stat().st_mtime_ns == written

    os.utime(path, ns=(written - 10**9, written - 10**9))
    run.write(0, "layer", np.full(2, 7.0), np.full(2, 7.0))
    table = summary.read_summary(run)
    assert table.equals(pq.read_table(path))
    mean = run.effects("layer")[0][:, 0].astype(float).mean()
    assert row_of(table, granularity="layer", layer=0, estimand="nie")["mean"] == pytest.approx(
        mean
    )


def twice(folder, run, bases):
    """A run in which every pair of another occurs twice, under the bases given."""
    double = results.Results.create(
        folder, RUN | {"pair_bases": bases}, SIZES, "abcdef", sites.GRANULARITIES
    )
    for pair in range(6):
        double.write_totals(pair, float(run.y_base[pair // 2]), float(run.y_source[pair // 2]))
        for granularity in sites.GRANULARITIES:
            nie, tie = (side[pair // 2] for side in run.effects(granularity))
            double.write(pair, granularity, nie, tie)
    return double


def test_repeating_a_base_prompt_adds_no_certainty(run, tmp_path):
    once = summary.summarise(run)
    repeated = twice(tmp_path / "repeated", run, list("aabbcc"))
    assert repeated.bases == tuple("aabbcc")
    assert summary.summarise(repeated).equals(once)
    apart = summary.summarise(twice(tmp_path / "apart", run, list("abcdef")))
    assert apart["n_pairs"].to_pylist() == [2 * count for count in once["n_pairs"].to_pylist()]
    assert apart["mean"].to_pylist() == pytest.approx(once["mean"].to_pylist(), abs=1e-12)
    assert np.mean(apart["p_value"].to_pylist()) < np.mean(once["p_value"].to_pylist())


def test_bases_that_all_differ_change_nothing(run, tmp_path):
    named = results.Results.create(
        tmp_path / "named", RUN | {"pair_bases": list("zyx")}, SIZES, "abc", sites.GRANULARITIES
    )
    for pair in range(3):
        named.write_totals(pair, float(run.y_base[pair]), float(run.y_source[pair]))
        for granularity in sites.GRANULARITIES:
            named.write(pair, granularity, *(side[pair] for side in run.effects(granularity)))
    assert summary.summarise(named).equals(summary.summarise(run))


# Rates, and their paired differences.


def test_a_rate_has_wilsons_interval():
    ten_of_twelve = np.repeat([1.0, 0.0], [10, 2])
    wanted = stats.binomtest(10, 12).proportion_ci(method="wilson")
    found = statistics.rate_interval(ten_of_twelve)
    np.testing.assert_allclose(found, (10 / 12, wanted.low, wanted.high))
    mean, low, high = statistics.rate_interval(np.ones(20))
    assert mean == high == 1 and 0.8 < low < 0.9
    assert statistics.rate_interval(np.full(20, 0.25))[0] == 0.25
    assert all(np.isnan(statistics.rate_interval(np.array([]))))


def test_a_difference_of_rates_has_the_interval_of_agresti_and_min():
    # Of 20 prompts 7 fell, 1 rose: (b - c) / (n + 2) +- 1.96 sqrt((b + c) - (b - c)^2 / (n + 2)) /
    # (n + 2), with a half added to b and c.
    differences = np.array([-1.0] * 7 + [1.0] + [0.0] * 12)
    half = 1.959964 * np.sqrt((7.5 + 1.5) - 6**2 / 22) / 22
    found = statistics.rate_difference_interval(differences)
    np.testing.assert_allclose(found, (-6 / 20, -6 / 22 - half, -6 / 22 + half), rtol=1e-6)
    mean, low, high = statistics.rate_difference_interval(np.zeros(48))
    assert mean == 0 and low == -high == pytest.approx(-1.959964 / 50, rel=1e-6)
    assert all(np.isnan(statistics.rate_difference_interval(np.array([]))))


def test_intervals_of_differences_hold_the_truth():
    """Of 2,000 draws about 95% have the true difference in their interval."""
    rng = np.random.default_rng(0)
    outcomes = rng.choice([-1.0, 0.0, 1.0], size=(2000, 40), p=[0.3, 0.6, 0.1])
    held = [
        low <= -0.2 <= high for _, low, high in map(statistics.rate_difference_interval, outcomes)
    ]
    assert 0.93 < np.mean(held) < 0.985
