"""Certification, of an organism that trains fast and of one with nothing planted."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxmed.analysis import circuits
from jaxmed.report import certificate
from jaxmed.runs import certify, mediate
from jaxmed.runs.certify import CertifySettings
from jaxmed.validation import outcomes
from models import organisms
from models.errors import InputError
from models.organisms import organism, training
from tests import shared_organism

FAST = {
    "decoys": shared_organism.RECIPE,
    "null": dataclasses.replace(organisms.RECIPES["null"], steps=1),
}
PAIRS, SEARCHED = 5, 3


CONTRAST = "topic"


@pytest.fixture(scope="module", autouse=True)
def fast(tmp_path_factory):
    """One that was trained already, one that stays untrained, few pairs and one contrast; the
    folder of organisms."""
    folder = tmp_path_factory.mktemp("organisms")
    truth = shared_organism.organism(folder / "decoys-0", tmp_path_factory).truth
    for drawn in truth["drawn"]["contrasts"].values():
        del drawn[PAIRS:]
    (folder / "decoys-0" / organism.TRUTH).write_text(json.dumps(truth))

    def untrained(decoder, roles, rng, recipe, **options):
        assert recipe.is_null
        return decoder

    with pytest.MonkeyPatch.context() as patch:
        for name, recipe in FAST.items():
            patch.setitem(organisms.RECIPES, name, recipe)
        patch.setattr(organism, "_NUM_PAIRS", PAIRS)
        patch.setattr(organisms, "CONTRASTS", (CONTRAST,))
        patch.setattr(training, "train", untrained)
        yield folder


@pytest.fixture(scope="module")
def settings(fast, tmp_path_factory):
    return CertifySettings(
        organism=tuple(FAST),
        organisms=str(fast),
        out=str(tmp_path_factory.mktemp("certified") / "out"),
        joint_size=10,
        joint_pairs=SEARCHED,
    )


def run(settings):
    return certify.run(settings, progress=False)


@pytest.fixture(scope="module")
def found(settings):
    return run(settings)


@pytest.fixture(scope="module")
def rows(found):
    return {
        (row["organism"], row["contrast"], row["granularity"], row["method"]): row
        for row in found.table.to_pylist()
    }


def test_every_method_is_scored_at_every_granularity_that_it_has(rows):
    of_neurons = {"joint", "groups"}
    for granularity in ("module", "head", "neuron"):
        methods = set(outcomes.METHODS) - (set() if granularity == "neuron" else of_neurons)
        here = {method for *place, method in rows if place == ["decoys", CONTRAST, granularity]}
        assert here == methods


def test_causal_methods_find_what_was_planted_and_a_difference_finds_the_decoys(rows):
    def of(granularity, method, column):
        return rows["decoys", CONTRAST, granularity, method][column]

    assert of("module", "max", "auroc") == of("head", "max", "auroc") == 1
    assert of("neuron", "max", "precision_at_k") == of("neuron", "joint", "precision_at_k") == 1
    assert of("neuron", "activation", "precision_at_k") < 0.5
    # Of eight neurons in a group one is planted, and all eight score alike.
    assert of("neuron", "groups", "precision_at_k") < 0.5
    assert of("neuron", "max", "cpr") > of("neuron", "activation", "cpr")
    assert of("neuron", "max", "cmd") < of("neuron", "activation", "cmd")


def test_margins_say_how_far_planted_units_stand_out(rows):
    for method in outcomes.METHODS:
        row = rows["decoys", CONTRAST, "neuron", method]
        known = row["weakest_planted"] is not None
        assert known == (method in outcomes.EFFECTS)
        if method in ("nie", "tie", "max"):
            assert row["weakest_planted"] > row["strongest_other"] > 0
    row = rows["null", CONTRAST, "neuron", "max"]
    assert row["weakest_planted"] is None and row["strongest_other"] < 0.05


def test_the_joint_set_is_no_larger_than_what_was_planted(rows):
    row = rows["decoys", CONTRAST, "neuron", "joint"]
    assert row["true_size"] == 3  # detectors; the four gates alone carry it too
    assert row["joint_share"] >= 0.9 and row["joint_size"] <= 1.5 * row["true_size"]
    assert row["joint_planted"] == row["joint_size"]


def test_nothing_is_discovered_where_nothing_is_planted(rows):
    for place, row in rows.items():
        if place[0] == "null":
            assert row["auroc"] is row["precision_at_k"] is row["joint_share"] is None
        if place[3] == "max":
            assert row["false_discoveries"] == 0
            assert (row["discoveries"] > 0) == (place[0] == "decoys")


def test_curves_begin_with_few_neurons_and_end_with_all(found):
    curves = found.curves.to_pylist()
    assert {row["fraction"] for row in curves} == set(circuits.CIRCUIT_SIZES)
    whole = [row["faithfulness"] for row in curves if row["fraction"] == 1]
    assert len(whole) == 2 * len(outcomes.METHODS)  # by both estimands
    np.testing.assert_allclose(whole, 1, atol=1e-5)


def test_files_hold_what_was_found(found):
    assert pq.read_table(found.folder / certificate.TABLE) == found.table
    assert pq.read_table(found.folder / certificate.CURVES) == found.curves
    for name in (certificate.SCORES_FIGURE, certificate.CURVES_FIGURE):
        assert (found.folder / name).read_bytes().startswith(b"\x89PNG")


def test_lines_are_tables_and_sentences(found):
    lines = certificate.lines(found)
    assert any(line.startswith("| decoys | groups of 8 neurons |  |  | ") for line in lines)
    text = "\n".join(lines)
    assert "Least module AUROC by the larger effect: 1.000 (decoys 0, topic)." in text
    assert f"Discoveries where nothing is planted: 0 of {8 + 16 + 640} units (0.0%)." in text
    assert lines[0].startswith("By the settings --metric=logit_diff ")
    assert lines[-1].endswith(
        "(certify.parquet, faithfulness.parquet, organisms.parquet, certify.png, faithfulness.png)"
    )


def test_where_nothing_is_planted_there_are_no_empty_tables(found, tmp_path):
    null = [row for row in found.table.to_pylist() if row["organism"] == "null"]
    about = [row for row in found.organisms.to_pylist() if row["organism"] == "null"]
    alone = outcomes.Certificate.of(null, [], about, {"positions": "prompt"}, tmp_path)
    certificate.write(alone)
    lines = certificate.lines(alone)
    assert sum(line.startswith("| ---") for line in lines) == 2  # organisms and discoveries
    assert lines[-1].endswith("(certify.parquet, faithfulness.parquet, organisms.parquet)")


def test_what_was_scored_is_not_run_again_unless_something_changed(
    found, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(mediate, "measure", refuse_to_run)
    again = run(settings)
    assert again.table == found.table and again.curves == found.curves
    assert again.organisms == found.organisms
    other = dataclasses.replace(settings, joint_share=0.5)
    with pytest.raises(InputError, match="settings: --joint_share was 0.95, is now 0.5: choose"):
        run(other)
    folder = shutil.copytree(settings.out, tmp_path / "out")
    other = dataclasses.replace(other, out=str(folder), overwrite=True)
    with pytest.raises(HasRunError):
        run(other)
    monkeypatch.setitem(certify._CONSTANTS, "draws", 1)
    with pytest.raises(InputError, match="draws was 19, is now 1"):
        run(settings)
    monkeypatch.undo()


def test_a_truth_that_changed_or_damaged_scores_are_scored_again(
    found, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(mediate, "measure", refuse_to_run)
    kept = shutil.copytree(found.folder, tmp_path / "out")
    asked = dataclasses.replace(settings, out=str(kept)).of_a_run
    folder = pathlib.Path(settings.organisms) / "decoys-0"
    truth = organisms.truth(folder)
    made = organisms.Organism(folder, truth)
    assert certify.measure(made, CONTRAST, asked)["rows"]
    truth["contrasts"][CONTRAST]["neurons"].pop()
    with pytest.raises(HasRunError):
        certify.measure(made, CONTRAST, asked)
    truth["contrasts"][CONTRAST] = organisms.truth(folder)["contrasts"][CONTRAST]
    assert certify.measure(made, CONTRAST, asked)["rows"]
    for damaged in ('{"rows": [', "[1]"):
        (kept / "runs" / f"decoys-0-{CONTRAST}" / "scores.json").write_text(damaged)
        with pytest.raises(HasRunError):
            certify.measure(made, CONTRAST, asked)


def test_a_screen_and_no_joint_set(found, settings, tmp_path):
    """Of screened neurons the others have no score; without a joint set its true size is known."""
    folder = pathlib.Path(settings.organisms) / "decoys-0"
    asked = dataclasses.replace(
        settings, out=str(tmp_path), joint_size=0, joint_pairs=8, screen=90, screen_audit=10
    ).of_a_run
    made = organisms.Organism(folder, organisms.truth(folder))
    rows = certify.measure(made, CONTRAST, asked)["rows"]
    of_neurons = {row["method"]: row for row in rows if row["granularity"] == "neuron"}
    assert of_neurons["max"]["units"] == 2 * 90 + 10
    assert of_neurons["max"]["uncomputed"] == 640 - 2 * 90 - 10
    assert 0 < of_neurons["max"]["missed_bound"] <= 450
    missed = certificate.worst(outcomes.table_of(rows)).missed
    assert missed.row["missed_bound"] == of_neurons["max"]["missed_bound"]
    assert (missed.row["uncomputed"], missed.row["seed"], missed.ties) == (450, 0, 0)
    assert of_neurons["max"]["precision_at_k"] == 1
    assert of_neurons["max"]["weakest_planted"] > of_neurons["max"]["strongest_other"]
    assert of_neurons["joint"] == {
        "organism": "decoys",
        "seed": 0,
        "contrast": CONTRAST,
        "granularity": "neuron",
        "method": "joint",
        "true_size": 3,
    }
    assert len(certificate.method_lines(outcomes.table_of(rows))) == 2 + 7


class HasRunError(Exception):
    """Something was run."""


def refuse_to_run(*_, **__):
    raise HasRunError


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"positions": "response"}, "--positions=response: what is planted"),
        ({"align": "span"}, "--align=span: the organisms' pairs name no spans"),
        ({"joint_share": 1.5}, "--joint_share=1.5: must be a number, and at most 1"),
        ({"screen": 100}, "--screen=100 --screen_audit=1000: computes 1200 neurons exactly"),
        ({"joint_size": 0, "joint_share": 0.5}, "--joint_share needs --joint_size"),
        ({"joint_size": 641}, "--joint_size=641: the model has 640 neurons"),
        ({"screen_audit": 3}, "--screen_audit needs --screen"),
    ],
)
def test_settings_are_checked_before_anything_is_trained(settings, changes, message, monkeypatch):
    monkeypatch.setattr(organisms, "build", refuse_to_run)
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(settings, **changes))


def test_another_metric_than_that_of_the_planted_truth_is_refused(settings, monkeypatch):
    monkeypatch.setattr(mediate, "measure", refuse_to_run)
    asked = dataclasses.replace(settings.of_a_run, metric="response_logprob_diff")
    made = organisms.Organism(pathlib.Path("decoys-0"), {})
    with pytest.raises(InputError, match="--metric=response_logprob_diff: the planted truth"):
        certify.measure(made, CONTRAST, asked)


def test_folders_are_made_before_anything_is_trained(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(organisms, "build", refuse_to_run)
    (tmp_path / "file").write_text("")
    below_a_file = str(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="--out=.*file/out: cannot be made"):
        run(dataclasses.replace(settings, out=below_a_file, organisms=str(tmp_path / "organisms")))
    with pytest.raises(InputError, match="--organisms=.*file/out: cannot be made"):
        run(dataclasses.replace(settings, out=str(tmp_path / "out"), organisms=below_a_file))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--organism: name any of late-mlp, "):
        run(dataclasses.replace(settings, organism=()))


def test_an_organism_that_is_unfit_is_named_and_left_out(found, settings, tmp_path, monkeypatch):
    build, unfit = organisms.build, {1}

    def unlucky(folder, seed, **options):
        if seed in unfit:
            raise organisms.UnfitError("leaks")
        return build(folder, seed, **options)

    monkeypatch.setattr(organisms, "build", unlucky)
    out = str(shutil.copytree(settings.out, tmp_path / "out"))
    settings = dataclasses.replace(settings, organism=("decoys",), seeds=2, out=out)
    both = run(settings)
    assert set(both.table["seed"].to_pylist()) == {0}
    assert "Not certified: decoys 1: leaks" in certificate.lines(both)
    unfit.add(0)
    with pytest.raises(InputError, match="no organism is fit: leaks; leaks"):
        run(settings)


def test_intervals_are_over_seeds():
    assert str(outcomes.Interval.of([])) == ""
    assert str(outcomes.Interval.of([0.5])) == "0.500"
    assert str(outcomes.Interval.of([1.0, 1.0, 1.0])) == "1.000"
    interval = outcomes.Interval.of([0.0, 0.5, 1.0])
    # Of three seeds, 0.5 +- 4.303 * 0.5 / sqrt(3).
    assert (interval.mean, interval.low) == (0.5, 0.0)
    assert interval.high == pytest.approx(1.742, abs=1e-3)
    assert outcomes.Interval.of([0.0, 0.5, 1.0], (0.0, 1.0)).high == 1


def test_the_mean_over_contrasts_comes_before_seeds():
    rows = [
        {"organism": "o", "seed": seed, "granularity": "neuron", "method": "nie", "auroc": auroc}
        for seed, auroc in ((0, 0.0), (0, 1.0), (1, 0.5), (1, None))
    ]
    table = outcomes.Certificate.of(rows, [], [], {}, ".").table
    mean = outcomes.over_seeds(table, "neuron")["o", "nie"]["auroc"]
    assert mean.mean == mean.low == mean.high == 0.5
