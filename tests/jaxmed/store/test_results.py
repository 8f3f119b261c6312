"""The results folder: its layout, what survives a stop, and when a run may go on."""

import json

import numpy as np
import pytest
import xarray
import zarr

from jaxmed.question import effects, sites
from jaxmed.question.effects import Status
from jaxmed.store import results
from models.errors import InputError

SITES = ("residual", "mlp")
SIZES = effects.Sizes(layers=3, heads=2, neurons=5, positions=4, sites=SITES, directions=6)
RUN = {"model": "m", "metric": "logit_diff", "positions": "last", "precision": "float32", "seed": 1}
PAIRS = ["a", "b"]


def start(folder, **changes):
    arguments = {"run": RUN, "sizes": SIZES, "pair_ids": PAIRS}
    arguments |= {"granularities": sites.GRANULARITIES, **changes}
    return results.Results.resume_or_create(folder, **arguments)


def random_effects(granularity, seed=0):
    shape = (2, *SIZES.shape(granularity))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_another_program_finds_the_arrays_that_are_promised(tmp_path):
    run = start(tmp_path / "out")
    for granularity in sites.GRANULARITIES:
        run.write(1, granularity, *random_effects(granularity))
    run.write_totals(1, y_base=2.5, y_source=-1.5)

    group = zarr.open_group(tmp_path / "out" / "effects.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    shapes = {"layer": (2, 3), "module": (2, 3, 2), "head": (2, 3, 2), "token": (2, 3, 3, 4)}
    shapes |= {"neuron": (2, 3, 5), "direction": (2, 3, 2, 6)}
    own = {"token": {"positions": "prompt"}, "direction": {"sites": list(SITES)}}
    for granularity, shape in shapes.items():
        nie, tie = random_effects(granularity)
        for name, written in (("nie", nie), ("tie", tie)):
            array = group[f"{granularity}/{name}"]
            assert (array.shape, array.dtype, array.chunks[0]) == (shape, np.float32, 1)
            assert np.isnan(array[0]).all() and np.isnan(array.fill_value)
            np.testing.assert_array_equal(array[1], written)
            asked = {key: RUN[key] for key in ("positions", "metric", "precision")}
            # Every aligned prompt position is edited alone, whatever is asked.
            assert dict(array.attrs) == asked | own.get(granularity, {})
        done = group[f"{granularity}/done"]
        assert (done.shape, done.dtype) == (shape, np.uint8)
        assert (done[0] == Status.NOT_RUN).all() and (done[1] == Status.EXACT).all()
    totals = {name: group[name][:].tolist()[1] for name in ("te", "y_base", "y_source")}
    assert totals == {"te": -4.0, "y_base": 2.5, "y_source": -1.5}

    assert "screen" not in group

    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert described["pair_ids"] == PAIRS and described["finished"] is False
    assert described["sizes"]["sites"] == list(SITES)
    assert RUN.items() <= described.items()


def test_reopened_results_are_those_written(tmp_path):
    start(tmp_path).write(0, "head", *random_effects("head"), status=Status.ESTIMATED)
    run = results.Results.open(tmp_path)
    nie, tie = run.effects("head")
    np.testing.assert_array_equal([nie[0], tie[0]], random_effects("head"))
    assert (run.done("head")[0] == Status.ESTIMATED).all()
    assert np.isnan(nie[1]).all()
    assert (run.sizes, run.pair_ids) == (SIZES, ("a", "b"))


def test_an_interrupted_write_is_not_done_and_not_read(tmp_path, monkeypatch):
    run = start(tmp_path)
    nie, tie = random_effects("neuron")
    write_array = zarr.Array.__setitem__

    def stops_before_done(array, index, value):
        if array.name.endswith("done"):
            raise KeyboardInterrupt
        write_array(array, index, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", stops_before_done)
    with pytest.raises(KeyboardInterrupt):
        run.write(0, "neuron", nie, tie)
    monkeypatch.undo()

    reopened = start(tmp_path)
    assert reopened.missing("neuron") == [0, 1]
    assert np.isnan(reopened.effects("neuron")).all()
    reopened.write(0, "neuron", nie, tie)
    assert reopened.missing("neuron") == [1]


def test_missing_counts_a_failed_pair_as_tried(tmp_path):
    run = start(tmp_path)
    run.write(1, "layer", *np.full((2, *SIZES.shape("layer")), np.nan))
    assert run.missing("layer") == [0]
    assert run.missing("module") == [0, 1]
    assert (run.done("layer")[1] == Status.FAILED).all()


def test_a_unit_without_a_finite_effect_failed(tmp_path):
    run = start(tmp_path)
    nie, tie = random_effects("head")
    nie[1, 0], tie[2, 1] = np.nan, np.inf
    run.write(0, "head", nie, tie)
    failed = np.zeros((3, 2), bool)
    failed[1, 0] = failed[2, 1] = True
    np.testing.assert_array_equal(run.done("head")[0] == Status.FAILED, failed)
    np.testing.assert_array_equal(np.isnan(run.effects("head")[0][0]), failed)


def test_positions_beyond_a_pair_did_not_fail(tmp_path):
    run = start(tmp_path)
    nie, tie = random_effects("token")
    nie[..., 2:] = tie[..., 2:] = np.nan
    nie[0, 1, 0] = np.nan
    run.write(0, "token", nie, tie)
    done = run.done("token")[0]
    assert (done[..., 2:] == Status.NOT_RUN).all()
    assert done[0, 1, 0] == Status.FAILED and (done[1:, :, :2] == Status.EXACT).all()
    assert run.missing("token") == [1]


def test_directions_that_do_not_exist_are_not_run_and_did_not_fail(tmp_path):
    run = start(tmp_path)
    nie, tie = random_effects("direction")
    status = np.full(SIZES.shape("direction"), Status.EXACT)
    status[1:, 0] = Status.NOT_RUN
    nie[1:, 0] = tie[1:, 0] = tie[0, 1, 2] = np.nan
    run.write(1, "direction", nie, tie, status)
    status[0, 1, 2] = Status.FAILED
    np.testing.assert_array_equal(run.done("direction")[1], status)
    assert run.missing("direction") == [0]


def test_estimates_stand_beside_exact_effects_and_can_be_left_out(tmp_path):
    run = start(tmp_path, run={**RUN, "screen": 2})
    assert run.missing_estimates() == [0, 1]
    estimates = random_effects("neuron", seed=1)
    run.write_estimates(1, *estimates)
    assert run.missing_estimates() == [0]
    nie, tie = random_effects("neuron")
    status = np.full(SIZES.shape("neuron"), Status.ESTIMATED)
    status[2, :3] = Status.EXACT
    run.write(1, "neuron", nie, tie, status)

    run = results.Results.open(tmp_path)
    np.testing.assert_array_equal(run.estimates(1), estimates)
    np.testing.assert_array_equal([side[1] for side in run.effects("neuron")], [nie, tie])
    exact = np.where(status == Status.EXACT, [nie, tie], np.nan)
    np.testing.assert_array_equal([side[1] for side in run.effects("neuron", exact=True)], exact)
    np.testing.assert_array_equal(run.estimated("neuron"), status == Status.ESTIMATED)


def test_effects_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"head/tie of pair b has shape \(3, 3\)"):
        start(tmp_path).write(1, "head", np.zeros((3, 2)), np.zeros((3, 3)))


def test_a_granularity_that_was_not_asked_for_is_refused(tmp_path):
    run = start(tmp_path, granularities=["head", "layer"])
    assert run.granularities == ("layer", "head")
    with pytest.raises(ValueError, match="not run at granularity 'neuron', only at layer, head"):
        run.effects("neuron")
    with pytest.raises(ValueError, match="granularity: neurone is none of"):
        start(tmp_path / "other", granularities=["neurone"])


def test_a_run_goes_on_where_it_stopped(tmp_path):
    start(tmp_path, run={**RUN, "device": "cpu"}).write(0, "layer", *random_effects("layer"))
    again = start(tmp_path, run={**RUN, "device": "tpu", "started": "later"})
    assert again.missing("layer") == [1]


def test_a_pair_is_its_own_base_unless_the_run_says_otherwise(tmp_path):
    assert start(tmp_path / "plain").bases == ("a", "b")
    start(tmp_path / "shared", run={**RUN, "pair_bases": ["c", "c"]})
    assert results.Results.open(tmp_path / "shared").bases == ("c", "c")


def test_a_finished_run_with_measured_extras_can_be_opened_again(tmp_path):
    run = start(tmp_path)
    run.record({"joint": {"picked": [(0, 1)], "auroc": np.float32("nan")}})
    run.finish()
    again = start(tmp_path)
    assert again.run["finished"] is True
    assert again.run["joint"] == {"picked": [[0, 1]], "auroc": None}
    again.record({"seconds": 3.5})
    assert start(tmp_path).run["measured"] == ["joint", "seconds"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"run": {**RUN, "positions": "prompt"}}, '--positions was "last", is now "prompt"'),
        ({"run": {key: RUN[key] for key in RUN if key != "seed"}}, "--seed was 1, is now null"),
        ({"run": {**RUN, "added": 2}}, "--added was null, is now 2"),
        ({"pair_ids": ["b", "a"]}, "not of the same pairs (what --pairs holds): choose"),
        (
            {"sizes": effects.Sizes(3, 2, 6, 4)},
            "not of the same sizes (of model, pairs and directions)",
        ),
        ({"granularities": ["layer"]}, "not of the same granularities"),
    ],
)
def test_another_setting_is_named_and_nothing_is_touched(tmp_path, changes, named):
    start(tmp_path).write(0, "layer", *random_effects("layer"))
    with pytest.raises(ValueError, match="choose another --out, or --overwrite") as error:
        start(tmp_path, **changes)
    assert named in str(error.value)
    assert start(tmp_path).missing("layer") == [1]


def test_every_other_setting_is_named_with_both_values(tmp_path):
    """And not what only follows from them."""
    start(tmp_path)
    with pytest.raises(InputError) as error:
        start(tmp_path, run={**RUN, "seed": 2, "positions": "prompt"}, pair_ids=["b", "a"])
    assert str(error.value) == (
        f'{tmp_path} holds a run with other settings: --positions was "last", is now "prompt"; '
        "--seed was 1, is now 2: give them as they were, or choose another --out, or --overwrite"
    )


def test_overwrite_deletes_only_what_a_run_wrote(tmp_path):
    start(tmp_path).write(0, "layer", *random_effects("layer"))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "layer.png").touch()
    for name in ("report.html", "summary.parquet", "notes.txt"):
        (tmp_path / name).touch()
    run = start(tmp_path, run={**RUN, "seed": 2}, overwrite=True)
    assert run.missing("layer") == [0, 1] and run.run["seed"] == 2
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run.json", "effects.zarr", "notes.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name, text", [("thesis.tex", "x"), ("run.json", '{"mine": 1}')])
def test_a_folder_of_something_else_is_left_alone(tmp_path, overwrite, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "figures").mkdir()
    with pytest.raises(ValueError, match="choose another folder"):
        start(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == text and (tmp_path / "figures").exists()


def test_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a results folder: it has no run.json"):
        results.Results.open(tmp_path)
    run = start(tmp_path)
    (tmp_path / "effects.zarr" / "head" / "tie" / "zarr.json").unlink()
    with pytest.raises(ValueError, match="effects.zarr lacks the array head/tie"):
        results.Results.open(tmp_path)
    (tmp_path / "effects.zarr").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="effects.zarr is missing or damaged"):
        results.Results.open(tmp_path)
    path = run.folder / "run.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="run.json is damaged"):
        results.Results.open(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pair_ids": []}, "at least one pair"),
        ({"pair_ids": ["a", "a"]}, "differ"),
        ({"run": {"metric": "logit_diff", "positions": "last"}}, "does not say its 'precision'"),
        ({"run": {**RUN, "finished": True}}, "finished: run.json keeps"),
        ({"run": {**RUN, "pair_bases": ["a"]}}, "not one of 'pair_bases' for each pair"),
    ],
)
def test_an_incomplete_request_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "run.json").exists()


def in_xarray(folder, group=None):
    """The group as xarray opens it by the consolidated metadata, which it must find."""
    return xarray.open_zarr(folder / "effects.zarr", group=group, consolidated=True).load()


def test_xarray_opens_every_group_by_names_and_coordinates(tmp_path):
    run = start(tmp_path, run={**RUN, "screen": 2, "group_size": 8})
    along = {
        "layer": [0, 1, 2],
        "head": [0, 1],
        "neuron": [0, 8, 16, 24, 32],
        "position": [0, 1, 2, 3],
        "direction": [0, 1, 2, 3, 4, 5],
    }
    sites_of = {
        "module": ["attention", "mlp"],
        "token": ["residual", "attention", "mlp"],
        "direction": list(SITES),
    }
    dimensions = {
        "layer": ("pair", "layer"),
        "module": ("pair", "layer", "site"),
        "head": ("pair", "layer", "head"),
        "token": ("pair", "layer", "site", "position"),
        "neuron": ("pair", "layer", "neuron"),
        "direction": ("pair", "layer", "site", "direction"),
        "screen": ("pair", "layer", "neuron"),
    }
    for group, names in dimensions.items():
        nie, tie = random_effects("neuron" if group == "screen" else group)
        if group == "screen":
            run.write_estimates(1, nie, tie)
        else:
            run.write(1, group, nie, tie)
        opened = in_xarray(tmp_path, group)
        assert opened["nie"].dims == names and opened["nie"].dtype == np.float32
        np.testing.assert_array_equal(opened["tie"].sel(pair="b"), tie)
        assert np.isnan(opened["tie"].sel(pair="a")).all()
        for name in names:
            wanted = {"pair": PAIRS, "site": sites_of.get(group)}.get(name, along.get(name))
            assert opened[name].values.tolist() == wanted
        if group != "screen":
            assert opened["done"].dtype == np.uint8
            assert (opened["done"].sel(pair="b") == Status.EXACT).all()
    run.write_totals(0, y_base=1.0, y_source=4.0)
    opened = in_xarray(tmp_path)
    assert opened["te"].sel(pair="a") == 3 and np.isnan(opened["te"].sel(pair="b"))
    assert {"te", "y_base", "y_source"} == set(opened.data_vars)
    assert opened["pair"].values.tolist() == PAIRS


def test_an_opened_folder_is_read_and_never_written(tmp_path):
    start(tmp_path / "out").write(0, "layer", *random_effects("layer"))

    def state():
        files = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = state()
    run = results.Results.open(tmp_path / "out")
    assert run.missing("layer") == [1]
    for attempt in (
        lambda: run.write(1, "layer", *random_effects("layer")),
        lambda: run.write_totals(1, 1.0, 2.0),
        lambda: run.record({"seconds": 1}),
        run.finish,
    ):
        with pytest.raises(ValueError, match="read-only"):
            attempt()
    assert state() == before


def test_effects_by_granularity_are_what_the_folder_holds(tmp_path):
    run = start(tmp_path, run={**RUN, "group_size": 8, "metric_unit": "logits"})
    nie, tie = random_effects("neuron")
    status = np.full(SIZES.shape("neuron"), Status.LEFT_OUT)
    status[1, 2] = Status.EXACT
    run.write(
        1, "neuron", *(np.where(status == Status.EXACT, x, np.nan) for x in (nie, tie)), status
    )
    run.write_totals(1, y_base=2.5, y_source=-1.5)
    assert list(run) == list(sites.GRANULARITIES) and run.missing("neuron") == [0]

    found = results.Results.open(tmp_path)["neuron"]
    np.testing.assert_array_equal(found.done[1], status)
    assert (found.nie[1, 1, 2], found.tie[1, 1, 2]) == (nie[1, 2], tie[1, 2])
    assert np.isfinite(found.nie).sum() == np.isfinite(found.tie).sum() == 1
    assert found.te[1] == -4 and np.isnan(found.te[0])
    assert found.totals.bases == ("a", "b")
    assert found.attributes == {
        "metric": "logit_diff",
        "metric_unit": "logits",
        "positions": "last",
        "precision": "float32",
    }
    assert run["token"].attributes["positions"] == "prompt"
    places = found.places()
    assert places["unit"].reshape(SIZES.shape("neuron"))[1].tolist() == [0, 8, 16, 24, 32]
    assert (places["position"] == -1).all() and (places["site"] == "neuron").all()


def test_a_total_effect_that_is_known_better_is_kept(tmp_path):
    run = start(tmp_path)
    run.write_totals(0, y_base=1e8, y_source=1e8, te=1.5)
    assert run.te[0] == 1.5


def test_a_copy_is_the_same_run_elsewhere(tmp_path):
    run = start(tmp_path / "out")
    run.write(0, "head", *random_effects("head"))
    (tmp_path / "copy").mkdir()
    run.copy(tmp_path / "copy")
    copied = results.Results.open(tmp_path / "copy")
    np.testing.assert_array_equal(copied.effects("head"), run.effects("head"))
    assert copied.run == run.run
