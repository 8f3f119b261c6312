"""Scouted scans: all neurons of some pairs, and of the others those that these have chosen."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import zarr
from matplotlib import pyplot

import jaxmed
import models
from jaxmed.analysis import ranking, screening, slabs, summary
from jaxmed.data import pairs as pairs_lib
from jaxmed.engine import cost, scan
from jaxmed.question.effects import Status
from jaxmed.report import mediation, plot
from jaxmed.runs import mediate
from jaxmed.runs.mediate import MediateSettings
from jaxmed.store.results import Results
from models.errors import InputError
from tests import tiny
from tests.jaxmed import fabricated

LAYERS, NEURONS = 2, 12
SHAPE = {"num_layers": LAYERS, "hidden_size": 16, "intermediate_size": NEURONS, "head_dim": 4}
# "0" and "0 again" share a base prompt: they are one cluster, in which both are scouts or none.
PAIRS = [
    {
        "id": name,
        "prompt_ids": [1, 2, 3 + number, 4],
        "counterfactual_ids": [1, 9 + len(name), 3 + number, 4],
        "harmful_ids": [7],
        "safe_ids": [10],
    }
    for name, number in [("0", 0), ("0 again", 0)] + [(str(n), n) for n in range(1, 7)]
]
TOP, AUDITED, CLUSTERS = 3, 6, 2
CHOSEN = screening.MARGIN * TOP + AUDITED


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scouts")
    tiny.save(folder / "model", **SHAPE)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return MediateSettings(
        str(folder / "model"),
        str(folder / "pairs.jsonl"),
        str(folder / "scouted"),
        granularity=("layer", "neuron"),
        scout_pairs=CLUSTERS,
        scout_top=TOP,
        scout_audit=AUDITED,
    )


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """A block has two pairs at most, and those of the scouts one layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_PAIRS", {"cpu": 2})
        patch.setattr(cost, "_TOGETHER", {"cpu": 2})
        patch.setattr(cost, "UNITS_OF_A_BLOCK", NEURONS)
        yield


@pytest.fixture(scope="module")
def scouted(asked):
    return mediate.run(asked)


@pytest.fixture(scope="module")
def whole(asked):
    """All neurons of all pairs."""
    out = asked.out.replace("scouted", "whole")
    return mediate.run(
        dataclasses.replace(asked, out=out, scout_pairs=0, scout_top=1000, scout_audit=1000)
    )


def others(results):
    return [index for index in range(len(PAIRS)) if index not in results.scouts]


def arrays(folder):
    group = zarr.open_group(folder / "effects.zarr", mode="r")
    return {
        name: array[...]
        for name, array in group.members(None)
        if isinstance(array, zarr.Array) and array.dtype.kind in "fu"
    }


def assert_same_arrays(folder, expected):
    found, wanted = arrays(folder), arrays(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def chosen(results):
    """The neurons that the scouts have chosen, from all of their effects."""
    scouts = [side[list(results.scouts)] for side in results.effects("neuron")]
    return screening.select(ranking.strength(*scouts), TOP, AUDITED, mediate.SCREEN_SEED)


def test_scouts_are_whole_clusters_and_recorded(asked, scouted):
    names = scouted.run["scouts"]
    assert [PAIRS[index]["id"] for index in scouted.scouts] == names
    assert ("0" in names) == ("0 again" in names)
    assert len(set(names) - {"0 again"}) == CLUSTERS
    assert scouted.run["seeds"]["scout"] == mediate.SCOUT_SEED
    assert scouted.run["scout_pairs"] == CLUSTERS and scouted.run["finished"]


def test_exactly_the_chosen_neurons_are_computed_of_the_other_pairs(scouted, whole):
    done, computed = scouted.done("neuron"), chosen(scouted).computed
    assert computed.sum() == CHOSEN < LAYERS * NEURONS
    assert (done[list(scouted.scouts)] == Status.EXACT).all()
    for index in others(scouted):
        expected = np.where(computed, Status.EXACT, Status.LEFT_OUT)
        np.testing.assert_array_equal(done[index], expected)
    counts, begun = slabs.statuses(scouted, "neuron")
    scouts, rest = len(scouted.scouts), len(others(scouted))
    assert counts[Status.EXACT] == scouts * LAYERS * NEURONS + rest * CHOSEN
    assert counts[Status.LEFT_OUT] == rest * (LAYERS * NEURONS - CHOSEN)
    assert counts.sum() == len(PAIRS) * LAYERS * NEURONS and begun.all()
    assert (scouted.done("layer") == Status.EXACT).all()
    for granularity in ("layer", "neuron"):
        for found, wanted in zip(
            scouted.effects(granularity), whole.effects(granularity), strict=True
        ):
            known = np.isfinite(found)
            np.testing.assert_array_equal(known, scouted.done(granularity) == Status.EXACT)
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(found[known], wanted[known], rtol=1e-4, atol=1e-6 * scale)
    np.testing.assert_allclose(scouted.te, whole.te, rtol=1e-6)


def test_few_neurons_of_other_pairs_are_not_cut_into_parts_of_the_layers(scouted):
    of_scouts, blocks = scouted.run["scout_blocks"], scouted.run["blocks"]
    assert {tuple(block["layers"]) for block in of_scouts} == {(0, 1), (1, 2)}
    assert {index for block in of_scouts for index in block["pairs"]} == set(scouted.scouts)
    of_neurons = [block for block in blocks if block["granularity"] == "neuron"]
    assert {tuple(block["layers"]) for block in of_neurons} == {(0, LAYERS)}
    assert sorted(i for block in of_neurons for i in block["pairs"]) == others(scouted)


def test_the_summary_is_that_of_the_other_pairs_with_the_same_neurons(asked, scouted):
    decoder, _ = models.load(asked.model)
    pairs = pairs_lib.read(asked.pairs)
    mask = scouted.done("neuron")[others(scouted)[0]] == Status.EXACT
    alone = jaxmed.scan(
        decoder, [pairs[index] for index in others(scouted)], chosen={"neuron": mask}
    )
    found = jaxmed.open_run(scouted.folder).summary()
    found = found[found.granularity == "neuron"].reset_index(drop=True)
    expected = alone.summary()
    expected = expected[expected.granularity == "neuron"].reset_index(drop=True)
    assert len(found) == len(expected) == len(summary.SUMMARISED) * CHOSEN
    assert found.exact.all()
    for name in ("layer", "unit", "estimand", "n_pairs"):
        assert (found[name] == expected[name]).all()
    # The base prompts of the others: one cluster of two pairs is among them, or none.
    bases = {PAIRS[index]["id"] for index in others(scouted)}
    assert set(found.n_pairs) == {len(bases)}
    scale = found["mean"].abs().max()
    for name in ("mean", "ci_low", "ci_high"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5 * scale)
    for name in ("p_value", "q_value"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0.02, atol=1e-4)
    # The total effect, which nothing was chosen by, is that of all pairs.
    whole = jaxmed.open_run(scouted.folder).summary()
    assert whole[whole.estimand == "te"].n_pairs.item() == len(PAIRS)


def test_nothing_that_is_told_of_neurons_is_of_the_scouts(scouted, tmp_path):
    """Effects of the scouts that are far too large change the choice alone."""
    shutil.copytree(scouted.place.folder, tmp_path / "out")
    later = ("finished", "pair_ids", "sizes", "granularities", "layers_together", "measured")
    spoiled = Results.resume_or_create(
        tmp_path / "out",
        {key: value for key, value in scouted.run.items() if key not in later},
        scouted.sizes,
        scouted.pair_ids,
        scouted.granularities,
    )
    for index in scouted.scouts:
        for part in range(LAYERS):
            size = (1, NEURONS)
            spoiled.write(index, "neuron", np.full(size, 99.0), np.full(size, 99.0), part=part)
    for name, scores in ranking.rankings(spoiled, "neuron").items():
        np.testing.assert_array_equal(scores, ranking.rankings(scouted, "neuron")[name])
    assert summary.summarise(spoiled) == summary.summarise(scouted)
    pages = [mediation.closing_lines(each)[1:] for each in (spoiled, scouted)]
    assert pages[0] == pages[1]
    drawn = [plot.neurons(jaxmed.open_run(each.folder)["neuron"]) for each in (spoiled, scouted)]
    assert drawn[0].dataLim.bounds == drawn[1].dataLim.bounds
    pyplot.close("all")


def test_the_audit_is_of_the_other_pairs(scouted, whole):
    audit, selection = scouted.run["audit"], chosen(scouted)
    exact = ranking.exact_strength(whole, "neuron", np.array(others(scouted)))
    candidates = np.sort(exact[selection.candidates])
    np.testing.assert_allclose(audit["threshold"], candidates[-TOP], rtol=1e-4)
    assert (audit["candidates"], audit["sampled"]) == (screening.MARGIN * TOP, AUDITED)
    missed = (exact > audit["threshold"] * (1 + 1e-4)) & ~selection.computed
    assert missed.sum() <= audit["bound"] <= audit["uncomputed"] == LAYERS * NEURONS - CHOSEN


def test_the_bound_holds_where_scouts_rank_most_of_the_strongest_low(tmp_path):
    """Of twenty strong neurons of the other pairs five are strong in the scouts as well."""
    run = {**fabricated.RUN, "scouts": [f"pair {index} <script>" for index in range(3)]}
    made = fabricated.fabricate(tmp_path / "out", run, ["neuron"])
    generator, shape = np.random.default_rng(0), made.sizes.shape("neuron")
    places = generator.permutation(np.prod(shape))[:20]
    for index in range(len(made.pair_ids)):
        nie, tie = generator.normal(size=(2, *shape)) / 10
        nie.flat[places[: 5 if index in made.scouts else 20]] += 2
        made.write(index, "neuron", nie, tie)
    scouts, exact = ranking.estimated_strength(made), ranking.exact_strength(made, "neuron")
    assert (np.sort(scouts.ravel())[-6:-4] < [1, 3]).all() and (exact > 1.5).sum() == 20
    holds, missed_some, draws = 0, 0, 200
    for seed in range(draws):
        selection = screening.select(scouts, 5, 40, seed)
        audit = mediate._audit(made, selection, 5)
        missed = int(((exact > audit["threshold"]) & ~selection.computed).sum())
        holds += missed <= audit["bound"]
        missed_some += missed > 0
        assert audit["hits"] == ((exact > audit["threshold"]) & selection.sampled).sum()
    assert holds >= 0.95 * draws and missed_some > draws / 2


def test_the_report_says_what_was_scouted(scouted):
    page = (scouted.place.folder / "report.html").read_text()
    (told,) = (line for line in mediation.closing_lines(scouted) if line.startswith("Scouts: "))
    said = (
        f"All 24 neurons were computed on {len(scouted.scouts)} pairs, the scouts; on "
        f"{len(others(scouted))} others the 6 that are strongest in the scouts, and 6 of the rest"
    )
    assert said in told and said in page and "not tested" in told
    assert f"{scouted.run['audit']['bound']} neuron" in told and "--screen" not in told
    assert "<h2>The scouts</h2>" in page and "The screen" not in page and "gradient" not in page
    assert (scouted.place.folder / "figures" / "screen.png").is_file()


@pytest.mark.parametrize("stopped_at", [2, 5, 8])
def test_a_run_that_is_stopped_in_either_phase_goes_on_to_the_same_bits(
    stopped_at, asked, scouted, tmp_path, monkeypatch
):
    settings, calls = dataclasses.replace(asked, out=str(tmp_path / "out")), []
    original = scan.Scan.effects

    def stopped(self, block, *arguments):
        calls.append(block.name)
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        return original(self, block, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scan.Scan, "effects", stopped)
        with pytest.raises(KeyboardInterrupt):
            mediate.run(settings)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    of_scouts = len(run["scout_blocks"])
    assert ("blocks" in run) == (stopped_at > of_scouts)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(scan.Scan, "effects", lambda *a: calls.append(a[1].name) or original(*a))
        found = mediate.run(settings)
    assert len(calls) == of_scouts + len(found.run["blocks"]) - stopped_at + 1
    assert_same_arrays(tmp_path / "out", scouted.place.folder)
    assert found.run["audit"] == scouted.run["audit"]


def test_a_run_does_not_go_on_with_other_neurons_than_it_began_with(asked, tmp_path, monkeypatch):
    settings, calls = dataclasses.replace(asked, out=str(tmp_path / "out")), []
    original, choose = scan.Scan.effects, screening.select

    def stopped(self, block, *arguments):
        calls.append(block.name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, block, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scan.Scan, "effects", stopped)
        with pytest.raises(KeyboardInterrupt):
            mediate.run(settings)
    monkeypatch.setattr(screening, "select", lambda strength, *rest: choose(1 / strength, *rest))
    with pytest.raises(InputError, match="neurons were chosen by other estimates"):
        mediate.run(settings)


def test_several_processes_choose_the_same(asked, scouted, tmp_path):
    """Process 1 has done what it could of both phases before process 0 came: that is all of it."""
    settings = dataclasses.replace(asked, out=str(tmp_path / "out"), processes=2)
    mediate.run(dataclasses.replace(settings, process=1))
    found = mediate.run(dataclasses.replace(settings, process=0))
    assert_same_arrays(tmp_path / "out", scouted.place.folder)
    assert found.run["audit"] == scouted.run["audit"] and found.run["finished"]


def test_a_scout_that_failed_has_no_part_in_the_choice_nor_later(
    asked, tmp_path, monkeypatch, capsys
):
    settings, original = dataclasses.replace(asked, out=str(tmp_path / "out")), scan.Scan.effects
    first = []

    def failing(self, block, *arguments):
        first.append(block.name)
        if block.name == first[0]:
            raise ValueError("no")
        return original(self, block, *arguments)

    monkeypatch.setattr(scan.Scan, "effects", failing)
    mediate.run(settings)
    monkeypatch.setattr(scan.Scan, "effects", original)
    before = arrays(tmp_path / "out")
    assert (before["neuron/done"] == Status.FAILED).sum() > 0 and np.isfinite(before["te"]).all()
    mediate.run(dataclasses.replace(settings, retry_failed=True))
    assert "settled, without the scouts' units that failed" in capsys.readouterr().err
    for name, values in arrays(tmp_path / "out").items():
        np.testing.assert_array_equal(values, before[name])


def test_a_joint_set_is_searched_on_scouts_and_confirmed_on_the_others(
    asked, tmp_path, monkeypatch
):
    seen = []

    def searched(decoder, pairs, question, single, **options):
        seen.extend(pairs)
        assert np.isfinite(single).all()  # all neurons, by the scouts
        return mediate.joint_lib.JointSet([(0, 1)], [0.5], [0.5])

    monkeypatch.setattr(mediate.joint_lib, "greedy_set", searched)
    monkeypatch.setattr(mediate.ranking, "MINIMUM_TOTAL_EFFECT", 0)
    out = str(tmp_path / "out")
    found = mediate.run(dataclasses.replace(asked, out=out, joint_size=1, joint_pairs=2))
    assert [pair.id for pair in seen] == found.run["scouts"][:2]
    assert found.run["joint"]["confirmed"]["pairs"] == len(others(found))


REFUSED = {
    "screen as well": ({"screen": 2}, "--screen and --scout_pairs: each says which"),
    "no neurons": ({"granularity": ("layer",)}, "--scout_pairs needs --granularity=neuron"),
    "more than there are": ({"scout_top": 25}, "--scout_top=25: the model has 24 neurons"),
    "no others": ({"scout_pairs": 7}, "--scout_pairs=7: that takes all of the 8 pairs"),
    "nothing scouted": ({"scout_pairs": 0}, "--scout_top needs --scout_pairs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scouted_is_refused(case, asked, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        mediate.run(dataclasses.replace(asked, out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_what_it_costs_is_told_before(asked, tmp_path, capsys):
    told = {}
    for count in (0, CLUSTERS):
        settings = dataclasses.replace(asked, scout_pairs=count, out=str(tmp_path / "out"))
        if not count:
            settings = dataclasses.replace(settings, scout_top=1000, scout_audit=1000)
        (line,) = (each for each in mediate.dry_run(settings) if each.startswith("  neuron"))
        told[count] = float(line.split()[4])
    scouts = len(mediate._scouts(asked, pairs_lib.read(asked.pairs)))
    share = CHOSEN / (LAYERS * NEURONS)
    expected = (scouts + share * (len(PAIRS) - scouts)) / len(PAIRS)
    np.testing.assert_allclose(told[CLUSTERS] / told[0], expected, rtol=0.02)
    mediate.measure(dataclasses.replace(asked, out=str(tmp_path / "out")))
    said = f"{scouts} of 8 pairs are scouts, of which all 24 neurons are computed"
    assert said in (err := capsys.readouterr().err) and f"{expected:.0%} of those of all" in err
