"""The results folder: its layout, what survives a stop, and when a run may go on."""

import concurrent.futures
import itertools
import json
import resource
import threading

import numpy as np
import pytest
import xarray
import zarr

from jaxmed.files import places
from jaxmed.files.places import PlaceError
from jaxmed.question import effects, sites
from jaxmed.question.effects import Status
from jaxmed.store import results
from models.errors import InputError

SITES = ("residual", "mlp")
SIZES = effects.Sizes(layers=3, heads=2, neurons=5, positions=4, sites=SITES, directions=6)
RUN = {"model": "m", "metric": "logit_diff", "positions": "last", "precision": "float32", "seed": 1}
PAIRS = ["a", "b"]


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    """A folder that is there and empty, as text: everything here holds of both kinds."""
    if request.param == "folder":
        return str(tmp_path / "root")
    return request.getfixturevalue("bucket")


@pytest.fixture
def fetched(tmp_path):
    """A function that gives a local folder of what is in a place now, for other programs."""
    numbers = itertools.count()

    def fetch(folder):
        place = places.at(folder)
        if place.folder is not None:
            return place.folder
        local = tmp_path / f"fetched {next(numbers)}"
        for name, content, _ in place.read_all(""):
            path = local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return local

    return fetch


def start(folder, **changes):
    arguments = {"run": RUN, "sizes": SIZES, "pair_ids": PAIRS}
    arguments |= {"granularities": sites.GRANULARITIES, **changes}
    return results.Results.resume_or_create(folder, **arguments)


def random_effects(granularity, seed=0):
    shape = (2, *SIZES.shape(granularity))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_another_program_finds_the_arrays_that_are_promised(root, fetched):
    run = start(f"{root}/out")
    for granularity in sites.GRANULARITIES:
        run.write(1, granularity, *random_effects(granularity))
    run.write_totals(1, y_base=2.5, y_source=-1.5)

    group = zarr.open_group(fetched(f"{root}/out") / "effects.zarr", mode="r")
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

    described = json.loads((fetched(f"{root}/out") / "run.json").read_text())
    assert described["pair_ids"] == PAIRS and described["finished"] is False
    assert described["sizes"]["sites"] == list(SITES)
    assert RUN.items() <= described.items()


def test_reopened_results_are_those_written(root):
    start(root).write(0, "head", *random_effects("head"), status=Status.ESTIMATED)
    run = results.Results.open(root)
    nie, tie = run.effects("head")
    np.testing.assert_array_equal([nie[0], tie[0]], random_effects("head"))
    assert (run.done("head")[0] == Status.ESTIMATED).all()
    assert np.isnan(nie[1]).all()
    assert (run.sizes, run.pair_ids) == (SIZES, ("a", "b"))


def test_an_interrupted_write_is_not_done_and_not_read(root, monkeypatch):
    run = start(root)
    nie, tie = random_effects("neuron")
    write_arrays = results.Results._write

    def stops_before_done(self, arrays, where):
        if "neuron/done" in arrays:
            raise KeyboardInterrupt
        write_arrays(self, arrays, where)

    monkeypatch.setattr(results.Results, "_write", stops_before_done)
    with pytest.raises(KeyboardInterrupt):
        run.write(0, "neuron", nie, tie)
    monkeypatch.undo()

    reopened = start(root)
    assert reopened.missing("neuron") == [0, 1]
    assert np.isnan(reopened.effects("neuron")).all()
    reopened.write(0, "neuron", nie, tie)
    assert reopened.missing("neuron") == [1]


def test_missing_counts_a_failed_pair_as_tried(root):
    run = start(root)
    run.write(1, "layer", *np.full((2, *SIZES.shape("layer")), np.nan))
    assert run.missing("layer") == [0]
    assert run.missing("module") == [0, 1]
    assert (run.done("layer")[1] == Status.FAILED).all()


def test_a_unit_without_a_finite_effect_failed(root):
    run = start(root)
    nie, tie = random_effects("head")
    nie[1, 0], tie[2, 1] = np.nan, np.inf
    run.write(0, "head", nie, tie)
    failed = np.zeros((3, 2), bool)
    failed[1, 0] = failed[2, 1] = True
    np.testing.assert_array_equal(run.done("head")[0] == Status.FAILED, failed)
    np.testing.assert_array_equal(np.isnan(run.effects("head")[0][0]), failed)


def test_positions_beyond_a_pair_did_not_fail(root):
    run = start(root)
    nie, tie = random_effects("token")
    nie[..., 2:] = tie[..., 2:] = np.nan
    nie[0, 1, 0] = np.nan
    run.write(0, "token", nie, tie)
    done = run.done("token")[0]
    assert (done[..., 2:] == Status.NOT_RUN).all()
    assert done[0, 1, 0] == Status.FAILED and (done[1:, :, :2] == Status.EXACT).all()
    assert run.missing("token") == [1]


def test_directions_that_do_not_exist_are_not_run_and_did_not_fail(root):
    run = start(root)
    nie, tie = random_effects("direction")
    status = np.full(SIZES.shape("direction"), Status.EXACT)
    status[1:, 0] = Status.NOT_RUN
    nie[1:, 0] = tie[1:, 0] = tie[0, 1, 2] = np.nan
    run.write(1, "direction", nie, tie, status)
    status[0, 1, 2] = Status.FAILED
    np.testing.assert_array_equal(run.done("direction")[1], status)
    assert run.missing("direction") == [0]


def test_estimates_stand_beside_exact_effects_and_can_be_left_out(root):
    run = start(root, run={**RUN, "screen": 2})
    assert run.missing_estimates() == [0, 1]
    estimates = random_effects("neuron", seed=1)
    run.write_estimates(1, *estimates)
    assert run.missing_estimates() == [0]
    nie, tie = random_effects("neuron")
    status = np.full(SIZES.shape("neuron"), Status.ESTIMATED)
    status[2, :3] = Status.EXACT
    run.write(1, "neuron", nie, tie, status)

    run = results.Results.open(root)
    np.testing.assert_array_equal(run.estimates(1), estimates)
    np.testing.assert_array_equal([side[1] for side in run.effects("neuron")], [nie, tie])
    exact = np.where(status == Status.EXACT, [nie, tie], np.nan)
    np.testing.assert_array_equal([side[1] for side in run.effects("neuron", exact=True)], exact)
    np.testing.assert_array_equal(run.estimated("neuron"), status == Status.ESTIMATED)


def test_effects_of_another_shape_are_refused(root):
    with pytest.raises(ValueError, match=r"head/tie of pair b has shape \(3, 3\)"):
        start(root).write(1, "head", np.zeros((3, 2)), np.zeros((3, 3)))


def test_a_granularity_that_was_not_asked_for_is_refused(root):
    run = start(root, granularities=["head", "layer"])
    assert run.granularities == ("layer", "head")
    with pytest.raises(ValueError, match="not run at granularity 'neuron', only at layer, head"):
        run.effects("neuron")
    with pytest.raises(ValueError, match="granularity: neurone is none of"):
        start(f"{root}/other", granularities=["neurone"])


def test_a_run_goes_on_where_it_stopped(root):
    start(root, run={**RUN, "device": "cpu"}).write(0, "layer", *random_effects("layer"))
    again = start(root, run={**RUN, "device": "tpu", "started": "later"})
    assert again.missing("layer") == [1]


def test_a_pair_is_its_own_base_unless_the_run_says_otherwise(root):
    assert start(f"{root}/plain").bases == ("a", "b")
    start(f"{root}/shared", run={**RUN, "pair_bases": ["c", "c"]})
    assert results.Results.open(f"{root}/shared").bases == ("c", "c")


def test_a_finished_run_with_measured_extras_can_be_opened_again(root):
    run = start(root)
    run.record({"joint": {"picked": [(0, 1)], "auroc": np.float32("nan")}})
    run.finish()
    again = start(root)
    assert again.run["finished"] is True
    assert again.run["joint"] == {"picked": [[0, 1]], "auroc": None}
    again.record({"seconds": 3.5})
    assert start(root).run["measured"] == ["joint", "seconds"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"run": {**RUN, "positions": "prompt"}}, '--positions was "last", is now "prompt"'),
        ({"run": {key: RUN[key] for key in RUN if key != "seed"}}, "--seed was 1, is now null"),
        ({"run": {**RUN, "added": 2}}, "--added was null, is now 2"),
        ({"pair_ids": ["b", "a"]}, "not of the same pairs (what --pairs holds): choose"),
        ({"run": {**RUN, "scouts": ["a"]}}, "not of the same pairs (what --pairs holds): choose"),
        (
            {"sizes": effects.Sizes(3, 2, 6, 4)},
            "not of the same sizes (of model, pairs and directions)",
        ),
        ({"granularities": ["layer"]}, "not of the same granularities"),
    ],
)
def test_another_setting_is_named_and_nothing_is_touched(root, changes, named):
    start(root).write(0, "layer", *random_effects("layer"))
    with pytest.raises(ValueError, match="choose another --out, or --overwrite") as error:
        start(root, **changes)
    assert named in str(error.value)
    assert start(root).missing("layer") == [1]


def test_every_other_setting_is_named_with_both_values(root):
    """And not what only follows from them."""
    start(root)
    with pytest.raises(InputError) as error:
        start(root, run={**RUN, "seed": 2, "positions": "prompt"}, pair_ids=["b", "a"])
    assert str(error.value) == (
        f'{root} holds a run with other settings: --positions was "last", is now "prompt"; '
        "--seed was 1, is now 2: give them as they were, or choose another --out, or --overwrite"
    )


def test_overwrite_deletes_only_what_a_run_wrote(root):
    start(root).write(0, "layer", *random_effects("layer"))
    place = places.at(root)
    for name in ("figures/layer.png", "report.html", "summary.parquet", "notes.txt", "sweep/x/y"):
        place.write(name, b"")
    run = start(root, run={**RUN, "seed": 2}, overwrite=True)
    assert run.missing("layer") == [0, 1] and run.run["seed"] == 2
    assert np.isnan(run.effects("layer")).all()
    left = {name.partition("/")[0] for name in place.names()}
    assert left == {"run.json", "effects.zarr", "notes.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name, text", [("thesis.tex", b"x"), ("run.json", b'{"mine": 1}')])
def test_a_folder_of_something_else_is_left_alone(root, overwrite, name, text):
    place = places.at(root)
    place.write(name, text)
    place.write("figures/mine.png", b"")
    with pytest.raises(ValueError, match="choose another folder"):
        start(root, overwrite=overwrite)
    assert place.read(name) == text and place.exists("figures/mine.png")


def test_damage_is_named(root):
    with pytest.raises(ValueError, match="is not a results folder: it has no run.json"):
        results.Results.open(root)
    place = start(root).place
    place.delete("effects.zarr/head/tie/zarr.json")
    for opened in (results.Results.open, start):
        with pytest.raises(ValueError, match="effects.zarr lacks the array head/tie"):
            opened(root)
    place.write("effects.zarr/head/tie/zarr.json", b"{")
    with pytest.raises(ValueError, match="effects.zarr is missing or damaged .*head/tie"):
        results.Results.open(root)
    place.delete("effects.zarr")
    with pytest.raises(ValueError, match="effects.zarr is missing or damaged"):
        results.Results.open(root)
    place.write("run.json", place.read("run.json")[:100])
    with pytest.raises(ValueError, match="run.json is damaged"):
        results.Results.open(root)


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
def test_an_incomplete_request_is_refused(root, changes, message):
    with pytest.raises(ValueError, match=message):
        start(f"{root}/out", **changes)
    assert places.at(root).names() == []


def in_xarray(folder, group=None):
    """The group as xarray opens it by the consolidated metadata, which it must find."""
    return xarray.open_zarr(folder / "effects.zarr", group=group, consolidated=True).load()


def test_xarray_opens_every_group_by_names_and_coordinates(root, fetched):
    run = start(root, run={**RUN, "screen": 2, "group_size": 8})
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
        opened = in_xarray(fetched(root), group)
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
    opened = in_xarray(fetched(root))
    assert opened["te"].sel(pair="a") == 3 and np.isnan(opened["te"].sel(pair="b"))
    assert {"te", "y_base", "y_source"} == set(opened.data_vars)
    assert opened["pair"].values.tolist() == PAIRS


def test_an_opened_folder_is_read_and_never_written(root):
    start(f"{root}/out").write(0, "layer", *random_effects("layer"))

    def state():
        return list(places.at(f"{root}/out").read_all(""))

    before = state()
    run = results.Results.open(f"{root}/out")
    assert run.missing("layer") == [1]
    for attempt in (
        lambda: run.write(1, "layer", *random_effects("layer")),
        lambda: run.write_totals(1, 1.0, 2.0),
        lambda: run.record({"seconds": 1}),
        lambda: run.settle("blocks", []),
        lambda: run.add_up({"seconds": 1}),
        lambda: run.begin("neuron-0", 0),
        run.finish,
    ):
        with pytest.raises(ValueError, match="read-only"):
            attempt()
    assert state() == before


def test_effects_by_granularity_are_what_the_folder_holds(root):
    run = start(root, run={**RUN, "group_size": 8, "metric_unit": "logits"})
    nie, tie = random_effects("neuron")
    status = np.full(SIZES.shape("neuron"), Status.LEFT_OUT)
    status[1, 2] = Status.EXACT
    run.write(
        1, "neuron", *(np.where(status == Status.EXACT, x, np.nan) for x in (nie, tie)), status
    )
    run.write_totals(1, y_base=2.5, y_source=-1.5)
    assert list(run) == list(sites.GRANULARITIES) and run.missing("neuron") == [0]

    found = results.Results.open(root)["neuron"]
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


def test_a_total_effect_that_is_known_better_is_kept(root):
    run = start(root)
    run.write_totals(0, y_base=1e8, y_source=1e8, te=1.5)
    assert run.te[0] == 1.5


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_copy_is_the_same_run_elsewhere(root, kind, bucket, tmp_path):
    run = start(f"{root}/out")
    run.write(0, "head", *random_effects("head"))
    copy = str(tmp_path / "copy") if kind == "folder" else f"{bucket}/copy"
    run.copy(copy)
    copied = results.Results.open(copy)
    np.testing.assert_array_equal(copied.effects("head"), run.effects("head"))
    assert copied.run == run.run
    with pytest.raises(InputError, match="is not an empty folder: choose another"):
        run.copy(copy)


# Parts: some layers of a granularity, each committed by itself.


def test_parts_are_written_committed_and_read_by_themselves(root, fetched):
    run = start(root, layers_together={"neuron": 2, "head": 7})
    assert [run.layers_together(name) for name in ("neuron", "head", "layer")] == [2, 3, 3]
    nie, tie = random_effects("neuron")
    run.write(0, "neuron", nie[2:], tie[2:], part=1)
    np.testing.assert_array_equal(run.committed("neuron"), [[False, True], [False, False]])
    assert run.missing("neuron") == [0, 1] and run.committed("head").shape == (2, 1)
    run.write(0, "neuron", nie[:2], tie[:2], Status.ESTIMATED, part=0)
    run.write(1, "neuron", tie, nie)
    np.testing.assert_array_equal(run.committed("neuron"), np.ones((2, 2)))

    run = results.Results.open(root)
    np.testing.assert_array_equal(run.effects("neuron"), [[nie, tie], [tie, nie]])
    for layers in (slice(1, 2), slice(2, None), slice(0, 0)):
        some = [[side[layers] for side in pair] for pair in ([nie, tie], [tie, nie])]
        np.testing.assert_array_equal(run.effects("neuron", layers=layers), some)
        assert run.done("neuron", layers=layers).shape == np.shape(some[0])
        assert run.of_layers("neuron", layers).coordinates["layer"].tolist() == [0, 1, 2][layers]
    exact = run.effects("neuron", exact=True, layers=slice(1, 3), pairs=slice(0, 1))[0]
    assert np.isnan(exact[0, 0]).all() and (exact[0, 1] == nie[2]).all()
    chunks = zarr.open_group(fetched(root) / "effects.zarr", mode="r")["neuron/done"].chunks
    assert chunks == (1, 2, 5)
    with pytest.raises(
        ValueError, match=r"has shape \(2, 5\), the results folder expects \(1, 5\)"
    ):
        start(root).write(0, "neuron", nie[:2], tie[:2], part=1)
    with pytest.raises(ValueError, match="neuron has no part 2"):
        start(root).write(0, "neuron", nie[:2], tie[:2], part=2)


def test_a_run_that_is_gone_on_with_keeps_its_parts(root):
    start(root, layers_together={"neuron": 1}).write(0, "neuron", *random_effects("neuron"))
    again = start(root, layers_together={"neuron": 3})
    assert again.layers_together("neuron") == 1
    np.testing.assert_array_equal(again.committed("neuron"), [[True] * 3, [False] * 3])


def test_parts_of_which_nothing_is_known_or_all_is_zero_are_written_all_the_same(root):
    run = start(root, run={**RUN, "screen": 1})
    nothing = np.full(SIZES.shape("neuron"), np.nan)
    run.write(0, "neuron", nothing, nothing, Status.LEFT_OUT)
    run.write(1, "neuron", nothing, nothing, Status.NOT_RUN)  # all bytes of this `done` are 0
    run.write(0, "layer", np.zeros(3), np.zeros(3))
    run.write_estimates(0, nothing, nothing)
    assert run.missing("neuron") == [] and run.missing("layer") == [1]
    assert run.missing_estimates() == [1]
    assert (run.done("neuron")[0] == Status.LEFT_OUT).all()
    assert (run.effects("layer")[0][0] == 0).all()


def test_a_folder_in_which_layers_were_not_stored_by_parts_is_refused(root):
    place = start(root).place
    run = json.loads(place.read("run.json"))
    del run["layers_together"]
    place.write("run.json", json.dumps(run | {"versions": {"jaxmed": "0.0.1"}}).encode())
    for opened in (results.Results.open, start):
        with pytest.raises(InputError, match=r"written by a jaxmed \(0.0.1\) that did not store"):
            opened(root)
    assert start(root, overwrite=True).missing("layer") == [0, 1]


# Several processes.


def together(count, do):
    """What `do(index)` returned, called by several threads at one time."""
    ready = threading.Barrier(count)

    def one(index):
        ready.wait()
        return do(index)

    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def test_of_several_that_start_at_once_one_creates_and_all_go_on(root):
    made = together(6, lambda index: start(f"{root}/out", run={**RUN, "started": str(index)}))
    assert len({run.run["started"] for run in made}) == 1
    for run in made:
        run.write(0, "layer", *random_effects("layer"))
    with pytest.raises(InputError, match="--seed was 1, is now 2"):
        start(f"{root}/out", run={**RUN, "seed": 2})


def test_who_began_may_have_died_before_the_arrays_were_there(root):
    place = start(root).place
    for name in place.names("effects.zarr/"):
        if "head" in name or name == "effects.zarr/zarr.json":
            place.delete(name)
    start(root).write(0, "head", *random_effects("head"))
    assert results.Results.open(root).missing("head") == [1]


def test_what_several_add_to_a_run_is_all_kept(root):
    runs = [start(root) for _ in range(4)]

    def add(index):
        for number in range(3):
            runs[index].record({f"of {index}, {number}": index})
            runs[index].add_up({"seconds": 2})

    together(4, add)
    run = results.Results.open(root).run
    assert run["seconds"] == 24 and len(run["measured"]) == 13
    assert all(run[f"of {index}, {number}"] == index for index in range(4) for number in range(3))
    runs[0].refresh()
    assert runs[0].run == run
    start(root)  # the same settings


def test_what_is_chosen_once_is_what_the_first_chose(root):
    runs = [start(root) for _ in range(4)]
    settled = together(4, lambda index: runs[index].settle("blocks", [index]))
    assert settled == [settled[0]] * 4 and settled[0] in ([0], [1], [2], [3])
    assert results.Results.open(root).run["blocks"] == settled[0]
    assert start(root).settle("blocks", None) == settled[0]
    assert start(root).settle("seed", 7) == 1


def test_a_unit_is_begun_once(root):
    runs = [start(root) for _ in range(4)]
    assert runs[0].begun() == {}
    assert sorted(together(4, lambda index: runs[index].begin("head-3", index)))[2:] == [0, 1]
    assert runs[2].begin("head-4", 2)
    begun = results.Results.open(root).begun()
    assert begun["head-4"] == 2 and set(begun) == {"head-3", "head-4"}


def test_the_state_is_another_one_after_every_write(root):
    run = start(root)
    states = [run.state()]
    for _ in range(2):
        run.write(1, "head", *random_effects("head"))
        states.append(run.state())
    assert len(set(states)) == 3 and results.Results.open(root).state() == states[-1]


# Failure.


def test_a_write_that_fails_half_way_is_told_and_not_taken_for_done(tmp_path):
    run = start(tmp_path)
    run.write(0, "neuron", *random_effects("neuron"))
    before = run.place.read("run.json")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # as a disk that is full
    try:
        for attempt in (
            lambda: run.write(1, "neuron", *random_effects("neuron")),
            lambda: run.record({"seconds": 1}),
            lambda: run.begin("neuron-0", 0),
        ):
            with pytest.raises(PlaceError) as error:
                attempt()
            assert str(error.value).startswith(f"{tmp_path}: cannot be written to (")
            assert "the same command" in str(error.value) and "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.place.read("run.json") == before
    again = start(tmp_path)
    assert again.missing("neuron") == [1] and np.isnan(again.effects("neuron")[0][1]).all()
    again.write(1, "neuron", *random_effects("neuron"))
    assert again.missing("neuron") == [] and again.begin("neuron-0", 0)


def test_what_a_killed_writer_has_left_is_no_file(tmp_path):
    run = start(tmp_path / "out")
    half = tmp_path / "out" / "effects.zarr" / "neuron" / "done" / "c" / "1" / "0" / "0.__lock"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half of it, and more than the whole" * 9)
    assert run.missing("neuron") == [0, 1]
    run.write(1, "neuron", *random_effects("neuron"))
    assert run.missing("neuron") == [0] and not half.exists()
    np.testing.assert_array_equal(
        [side[1] for side in run.effects("neuron")], random_effects("neuron")
    )
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json.__lock").write_bytes(b"half")
    assert start(tmp_path / "new").missing("layer") == [0, 1]


def test_a_folder_that_cannot_be_had_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file", r"file: cannot be made \(File exists\)"),
        (tmp_path / "file" / "out", r"out: cannot be made \(Not a directory\)"),
        ("s3://bucket/out", "s3://bucket/out: neither a local path nor gs://bucket/path"),
        ("gs://", "neither a local path"),
        ("gs://B/out", "gs://B/out: cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            start(folder)


def test_a_bucket_that_vanishes_is_told(bucket, buckets):
    run = start(f"{bucket}/out")
    run.write(0, "layer", *random_effects("layer"))
    kept = buckets.objects.pop(bucket.removeprefix("gs://"))
    for attempt in (
        lambda: run.write(1, "layer", *random_effects("layer")),
        lambda: run.committed("layer"),
        lambda: run.record({"seconds": 1}),
        run.refresh,
        lambda: start(f"{bucket}/out"),
    ):
        with pytest.raises(PlaceError, match=f"^{bucket}/out"):
            attempt()
    buckets.objects[bucket.removeprefix("gs://")] = kept
    assert start(f"{bucket}/out").missing("layer") == [1]


def test_requests_that_fail_for_a_while_are_repeated(bucket, buckets):
    every = itertools.count()

    def now_and_then(method, name):
        return {0: 503, 3: 429}.get(next(every) % 5, 0)

    with buckets.troubled(now_and_then):
        runs = together(3, lambda index: start(bucket, layers_together={"neuron": 1}))
        for pair, run in enumerate(runs[:2]):
            run.write(pair, "neuron", *random_effects("neuron"))
            run.add_up({"pairs": 1})
        assert runs[2].missing("neuron") == []
        runs[2].refresh()
        assert runs[2].run["pairs"] == 2
        np.testing.assert_array_equal(
            runs[2].effects("neuron")[0], [random_effects("neuron")[0]] * 2
        )
    assert next(every) > 50


def test_an_answer_that_is_lost_changes_nothing(bucket, buckets):
    """The request was done, and is repeated on a generation that is no more."""
    lost = set()

    def once(method, name):
        if method == "write" and name.endswith(("run.json", "head-0")) and name not in lost:
            lost.add(name)
            return -503
        return 0

    with buckets.troubled(once):
        run = start(bucket)
        assert run.begin("head-0", 0) and not run.begin("head-0", 0)
        lost.clear()
        run.record({"seconds": 3})
    assert len(lost) == 1 and start(bucket).run["seconds"] == 3


def test_a_connection_that_stays_away_is_told(bucket, buckets):
    run = start(bucket)
    run.write(0, "layer", *random_effects("layer"))
    with buckets.troubled(lambda method, name: 503):
        with pytest.raises(PlaceError, match=f"^{bucket}: cannot be written to "):
            run.write(1, "layer", *random_effects("layer"))
        with pytest.raises(PlaceError, match=f"^{bucket}: cannot be read "):
            run.committed("layer")
    assert start(bucket).missing("layer") == [1]
