"""What a user in Python meets: names, one results object, files, figures."""

import inspect
import json
import pathlib
import subprocess
import sys

import matplotlib
import numpy as np
import pandas
import pytest
import xarray
import zarr
from matplotlib import pyplot
from matplotlib.figure import Figure

import jaxmed
from jaxmed.analysis import summary
from jaxmed.question.effects import Status
from jaxmed.report import mediation
from jaxmed.store.results import Results
from models.errors import InputError
from tests import tiny
from tests.jaxmed import scans
from tests.jaxmed.fabricated import DETECTORS, fabricate

matplotlib.use("Agg")

HEAVY = {"flax", "jax", "matplotlib", "pandas", "transformers", "xarray", "zarr"}
LIGHT = ("jaxmed", "jaxmed.data", "jaxmed.data.pairs", "jaxmed.data.prompts", "jaxmed.data.sets")
NAMES = ("layer", "module", "head", "token", "neuron")
PAIRS = [scans.UNEQUAL, scans.pair(9, 12, seed=1), scans.pair(12, 12, seed=2)]


def imported(program):
    """What a fresh Python prints, and which modules it has loaded then."""
    program = f"import sys, time\n{program}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    *said, modules = done.stdout.splitlines()
    return said, set(modules.split())


def test_the_face_is_there_at_once_and_loads_nothing_heavy():
    seconds, modules = imported(
        "began = time.perf_counter()\nimport jaxmed\nprint(time.perf_counter() - began)"
    )
    assert float(seconds[0]) < 0.3
    assert not modules & (HEAVY | {"numpy"})


@pytest.mark.parametrize("name", LIGHT)
def test_reading_pairs_and_prompts_loads_nothing_heavy(name):
    _, modules = imported(f"import {name}")
    assert name in modules and not modules & HEAVY


def test_every_name_of_the_face_is_there():
    assert set(jaxmed.__all__) <= set(dir(jaxmed))
    for name in jaxmed.__all__:
        assert getattr(jaxmed, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(jaxmed, "lod")  # noqa: B009 (as an expression it would be one of no use)


@pytest.fixture(scope="module")
def decoder():
    return tiny.decoder("qwen2")


@pytest.fixture(scope="module")
def found(decoder):
    return jaxmed.scan(decoder, PAIRS, NAMES, positions="prompt", progress=False)


def test_a_scan_of_several_granularities_is_that_of_each(decoder, found):
    assert list(found) == list(NAMES)
    for name in ("head", "token"):
        alone = jaxmed.scan(decoder, PAIRS, name, positions="prompt", progress=False)
        for side in ("nie", "tie"):
            together, apart = getattr(found[name], side), getattr(alone[name], side)
            np.testing.assert_array_equal(together, apart)
            assert together.dtype == np.float32
    assert found["neuron"].nie.shape == (3, 3, 40)
    neuron = found["neuron"]
    np.testing.assert_allclose(neuron.te, neuron.y_source - neuron.y_base, rtol=1e-5)


def test_a_position_that_a_pair_has_not_is_not_run(found):
    tokens = found["token"]
    assert tokens.nie.shape == (3, 3, 3, 12)
    for pair, length in enumerate((11, 9, 12)):
        assert (tokens.done[pair, ..., :length] == Status.EXACT).all()
        assert (tokens.done[pair, ..., length:] == Status.NOT_RUN).all()
        assert np.isnan(tokens.nie[pair, ..., length:]).all()


def test_chosen_units_are_those_of_the_whole_scan_and_the_others_are_left_out(decoder, found):
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    chosen = {
        "layer": [2],
        "module": [(0, "mlp"), (1, "attention")],
        "head": mask,
        "token": [(1, "mlp", 0), (2, "residual", 11)],
        "neuron": np.argwhere(np.eye(3, 40)),
    }
    some = jaxmed.scan(decoder, PAIRS, NAMES, positions="prompt", chosen=chosen, progress=False)
    kept = {
        "layer": [(2,)],
        "module": [(0, 1), (1, 0)],
        "head": [(1, 2)],
        "token": [(1, 2, 0), (2, 0, 11)],
        "neuron": [(0, 0), (1, 1), (2, 2)],
    }
    for name, places in kept.items():
        wanted = np.zeros(found[name].nie.shape[1:], bool)
        for place in places:
            wanted[place] = True
        exists = found[name].done == Status.EXACT
        done = np.where(wanted, np.where(exists, Status.EXACT, Status.NOT_RUN), Status.LEFT_OUT)
        np.testing.assert_array_equal(some[name].done[exists], done[exists])
        assert not (some[name].done == Status.EXACT)[~exists].any()
        scale = np.nanmax(np.abs(found[name].nie))
        for side in ("nie", "tie"):
            got, full = getattr(some[name], side), getattr(found[name], side)
            assert np.isnan(got[done != Status.EXACT]).all()
            np.testing.assert_allclose(
                got[done == Status.EXACT], full[done == Status.EXACT], atol=1e-5 * scale
            )


def test_a_group_of_neurons_is_chosen_by_any_of_its_neurons(decoder):
    some = jaxmed.scan(
        decoder, PAIRS[:1], group_size=16, chosen={"neuron": [(1, 18)]}, progress=False
    )
    assert some["neuron"].coordinates["neuron"].tolist() == [0, 16, 32]
    assert np.argwhere(some["neuron"].done == Status.EXACT).tolist() == [[0, 1, 1]]


def test_a_metric_is_no_name(decoder):
    scan = inspect.unwrap(jaxmed.scan)  # annotations are not checked where users run it
    with pytest.raises(InputError, match=r"metric='logit': give a metric, as jaxmed.LogitDiff"):
        scan(decoder, PAIRS, metric="logit")


def test_effects_that_are_not_there_are_told(found):
    with pytest.raises(KeyError, match="no effects of 'direction'; there are those of layer, mod"):
        found["direction"]


def test_effects_in_xarray_have_names_and_coordinates(found):
    heads = found["head"].to_xarray()
    assert heads["nie"].dims == ("pair", "layer", "head")
    assert heads["nie"].sel(pair=PAIRS[1].id, layer=2, head=3) == found["head"].nie[1, 2, 3]
    assert heads.attrs["metric"] == "logit_diff" and heads.attrs["positions"] == "prompt"
    tokens = found["token"].to_xarray()
    assert tokens["tie"].dims == ("pair", "layer", "site", "position")
    last = tokens["tie"].sel(site="mlp", position=0)
    np.testing.assert_array_equal(last, found["token"].tie[:, :, 2, 0])
    np.testing.assert_array_equal(tokens["te"], found["token"].te)
    assert {"y_base", "y_source", "done"} <= set(tokens.data_vars)


def test_effects_in_a_frame_have_a_row_for_each_unit_and_pair(found):
    frame = found["module"].to_frame()
    assert len(frame) == 3 * 3 * 2
    row = frame[(frame.pair == PAIRS[2].id) & (frame.layer == 1) & (frame.site == "mlp")]
    assert row.nie.tolist() == [found["module"].nie[2, 1, 1]]
    assert row.te.tolist() == [found["module"].te[2]]


def test_the_summary_is_that_of_the_file(found, tmp_path):
    found.save(tmp_path / "run")
    opened = jaxmed.open_run(tmp_path / "run")
    summary.write_summary(Results.open(tmp_path / "run"))
    written = pandas.read_parquet(tmp_path / "run" / "summary.parquet")
    for one in (found, opened):
        pandas.testing.assert_frame_equal(one.summary(), written, check_dtype=False)
    assert not list((tmp_path / "run").glob("*.html"))


def test_the_top_units_have_the_largest_means(found):
    top = found.top(5, estimand="tie", granularity="neuron")
    means = np.abs(found["neuron"].tie.astype(float).mean(axis=0))
    order = np.argsort(-means, axis=None, kind="stable")[:5]
    layer, unit = np.unravel_index(order, means.shape)
    assert (top["layer"].tolist(), top["unit"].tolist()) == (layer.tolist(), unit.tolist())
    assert set(top["estimand"]) == {"tie"}
    everything = found.top(2)
    assert everything["granularity"].tolist() == [name for name in NAMES for _ in range(2)]
    assert "residual" not in set(everything["site"])
    with pytest.raises(InputError, match="estimand='te': not one of nie, tie, nde, int"):
        found.top(estimand="te")
    with pytest.raises(InputError, match="granularity='neurons': not one of layer"):
        found.top(granularity="neurons")


def test_the_representation_says_shapes_and_what_is_missing(found, decoder):
    lines = repr(found).splitlines()
    assert lines[0].startswith(
        "Findings of 3 pairs: logit_diff (logits), positions=prompt; mean TE"
    )
    assert "nie, tie [pair 3, layer 3, neuron 40]" in lines[-1]
    assert "[pair 3, layer 3, site 3, position 12]" in repr(found["token"])
    some = jaxmed.scan(decoder, PAIRS, "head", chosen={"head": [(0, 1)]}, progress=False)
    assert "33 left out" in repr(some)


def state(folder):
    """All that a folder holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_scan_is_saved_and_opened_at_home(found, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found.save("~/run")
    assert list(jaxmed.open_run("~/run")) == list(found) and (tmp_path / "run").is_dir()


def test_a_saved_scan_is_opened_and_copied_bit_for_bit(found, decoder, tmp_path):
    some = jaxmed.scan(decoder, PAIRS, NAMES[2:], chosen={"head": [(1, 3)]}, progress=False)
    for name, saved in (("whole", found), ("some", some)):
        folder = tmp_path / name
        saved.save(folder)
        before = state(folder)
        opened = jaxmed.open_run(folder)
        opened.save(tmp_path / "copies" / name)
        assert list(opened) == list(saved)
        for again in (opened, jaxmed.open_run(tmp_path / "copies" / name)):
            for granularity, effects in saved.items():
                for field in ("nie", "tie", "done", "te", "y_base", "y_source"):
                    written = getattr(again[granularity], field)
                    np.testing.assert_array_equal(written, getattr(effects, field))
                xarray.testing.assert_identical(again[granularity].to_xarray(), effects.to_xarray())
        repr(opened), opened.summary(), opened.top()
        assert state(folder) == before  # opening only reads
        with pytest.raises(InputError, match="is not an empty folder: choose another"):
            found.save(folder)


def test_a_report_is_made_of_a_saved_scan(decoder, tmp_path):
    found = jaxmed.scan(
        decoder, PAIRS, ("layer", "head"), chosen={"head": [(0, 1)]}, progress=False
    )
    found.save(tmp_path)
    page = pathlib.Path(mediation.write(tmp_path)).read_text()
    assert "qwen2 decoder in memory" in page
    assert (tmp_path / "figures" / "layer.png").exists()
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is True


def test_an_unfinished_run_gives_nan_for_what_is_not_there(tmp_path):
    fabricate(tmp_path, pairs=2)
    done = zarr.open_group(tmp_path / "effects.zarr", mode="r+")["neuron/done"]
    done[1] = np.zeros_like(done[1])  # as if it had stopped before it wrote this
    found = jaxmed.open_run(tmp_path)
    assert np.isnan(found["neuron"].nie[1]).all() and np.isfinite(found["neuron"].nie[0]).all()
    assert (found["neuron"].done[1] == Status.NOT_RUN).all()
    assert "not run" in repr(found["neuron"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"granularity": "neurons"}, "granularity 'neurons' is not one of layer, module"),
        ({"granularity": ()}, "granularity names none of"),
        ({"positions": "first"}, "positions=first: not one of last"),
        ({"align": "middle"}, "align=middle: not one of end"),
        ({"group_size": 0}, "group_size=0"),
        ({"granularity": "direction"}, "directions=FILE.npz go together"),
        ({"directions": "some.npz"}, "directions=FILE.npz go together"),
        ({"pairs": []}, "pairs: at least one"),
        ({"pairs": [scans.UNEQUAL] * 2}, "ids that differ"),
        ({"chosen": {"head": [(0, 1)]}}, r"chosen\['head'\]: the granularities are neuron"),
        ({"chosen": {"neuron": np.ones((3, 4), bool)}}, r"of shape \(3, 4\).*have \(3, 40\)"),
        ({"chosen": {"neuron": [(0, 40)]}}, r"\(0, 40\), which is no \(layer, neuron\)"),
        ({"chosen": {"neuron": [7]}}, "has 7, which is no"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(decoder, arguments, message):
    asked = {"pairs": PAIRS, "progress": False} | arguments
    with pytest.raises(InputError, match=message):
        jaxmed.scan(decoder, **asked)


def test_a_scan_of_directions_reads_their_file(decoder, tmp_path):
    given = scans.some_directions(decoder.config, tmp_path)
    found = jaxmed.scan(
        decoder, PAIRS, "direction", directions=tmp_path / "some.npz", progress=False
    )
    effects = found["direction"]
    exists = np.broadcast_to(given.given, effects.done.shape)
    assert (effects.done == np.where(exists, Status.EXACT, Status.NOT_RUN)).all()
    assert effects.coordinates["site"].tolist() == [str(site) for site in given.sites]


DRAWN = {
    "layer": jaxmed.plot.layers,
    "module": jaxmed.plot.modules,
    "head": jaxmed.plot.heads,
    "token": jaxmed.plot.tokens,
    "neuron": jaxmed.plot.neurons,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    fabricate(folder)
    return jaxmed.open_run(folder)


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_drawn_on_the_axes_that_are_given(planted, name):
    own = Figure().subplots()
    assert DRAWN[name](planted[name], ax=own) is own
    own.figure.canvas.draw()
    made = DRAWN[name](planted[name])
    assert made.figure.number in pyplot.get_fignums() and made is not own
    pyplot.close(made.figure)
    other = "layer" if name != "layer" else "head"
    with pytest.raises(InputError, match=f"granularity '{other}': '{name}' is drawn here"):
        DRAWN[name](planted[other])


def test_figures_show_the_means(planted):
    heads = jaxmed.plot.heads(planted["head"], ax=Figure().subplots(), estimand="tie")
    mean = planted["head"].tie.astype(float).mean(axis=0)
    np.testing.assert_allclose(heads.images[0].get_array(), mean)
    tokens = jaxmed.plot.tokens(planted["token"], ax=Figure().subplots(), site="attention")
    mean = np.nanmean(planted["token"].nie[:, :, 1].astype(float), axis=0)
    np.testing.assert_allclose(tokens.images[0].get_array(), mean)
    layers = jaxmed.plot.layers(planted["layer"], ax=Figure().subplots())
    mean = planted["layer"].nie.astype(float).mean(axis=0)
    np.testing.assert_allclose(layers.containers[0].lines[0].get_ydata(), mean)

    neurons = jaxmed.plot.neurons(planted["neuron"], ax=Figure().subplots(), count=9)
    names = [text.get_text() for text in neurons.get_yticklabels()]
    assert len(names) == 9 and {f"L{layer}.n{unit}" for layer, unit in DETECTORS} <= set(names)
    with pytest.raises(InputError, match="estimand='te' is not one of nie, tie"):
        jaxmed.plot.heads(planted["head"], estimand="te")
    with pytest.raises(InputError, match="site='head' is not one of residual"):
        jaxmed.plot.tokens(planted["token"], site="head")
