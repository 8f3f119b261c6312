"""Real runs on a tiny checkpoint: what they write, what stops them, and how they go on."""

import dataclasses
import datetime
import json
import pathlib
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

import jaxmed
import models
from jaxmed.analysis import joint as joint_lib
from jaxmed.analysis import ranking, screening
from jaxmed.data import pairs as pairs_lib
from jaxmed.data import splits
from jaxmed.engine import cost, memory, rates, scan
from jaxmed.files import reading
from jaxmed.question import directions
from jaxmed.question.effects import Status
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.question import Question
from jaxmed.report import mediation
from jaxmed.runs import loading, mediate, report, sweep
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.report import ReportSettings
from jaxmed.store import results
from models import checkpoint, organisms
from models.errors import InputError
from tests import chats, lora, tiny, words

LAYERS, HEADS, NEURONS = 2, 4, 12
SHAPE = {
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "intermediate_size": NEURONS,
    "num_kv_heads": 2,
    "hidden_size": 16,
    "head_dim": 4,
}
# Prompts of 5 and 5, 7 and 6, 3 and 3 tokens: so many positions pair up.
ALIGNED = (5, 6, 3)
PAIRS = [
    {
        "id": "even",
        "prompt_ids": [1, 2, 3, 4, 5],
        "counterfactual_ids": [1, 2, 9, 4, 5],
        "harmful_ids": [7, 8],
        "safe_ids": [10],
    },
    {
        "id": "longer",
        "prompt_ids": [1, 2, 3, 4, 5, 6, 7],
        "counterfactual_ids": [3, 9, 4, 5, 5, 6],
        "harmful_ids": [7],
        "safe_ids": [10, 11],
    },
    {
        "id": "short",
        "prompt_ids": [3, 4, 1],
        "counterfactual_ids": [3, 4, 2],
        "harmful_ids": [12],
        "safe_ids": [13],
    },
]
AXES = ("pair", "layer", "site", "head", "position", "neuron")
TOTALS = ("te", "y_base", "y_source")
UNITS = {
    "layer": (LAYERS,),
    "module": (LAYERS, 2),
    "head": (LAYERS, HEADS),
    "token": (LAYERS, 3, max(ALIGNED)),
    "neuron": (LAYERS, NEURONS),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint without tokenizer."""
    folder = tmp_path_factory.mktemp("sweep") / "model"
    tiny.save(folder, **SHAPE)
    return folder


def write(file, *lines):
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return file


@pytest.fixture(scope="module")
def asked(model):
    """Settings of a run of all granularities, on a file of pairs that no test changes."""
    file = write(model.parent / "pairs.jsonl", *PAIRS)
    return MediateSettings(str(model), str(file), str(model.parent / "out"))


@pytest.fixture(scope="module")
def finished(asked):
    """The run that nothing disturbed."""
    return mediate.run(asked)


def to(asked, folder, **changes):
    """The same settings with other results; the folder does not exist yet."""
    return dataclasses.replace(asked, out=str(folder / "out"), **changes)


def arrays(found):
    """Every array of measured values in a results folder by name."""
    group = zarr.open_group(found / "effects.zarr", mode="r")
    members = {name: array for name, array in group.members(None) if hasattr(array, "shape")}
    return {
        name: array[...] for name, array in members.items() if name.rpartition("/")[2] not in AXES
    }


def described(folder):
    return json.loads((folder / "run.json").read_text())


# What a run writes.


@pytest.mark.parametrize(
    ("categories", "found"),
    [
        (["topic"] * 3, "topic"),
        (["unlock"] * 3, "unlock"),
        (["unlock", "unlock", "topic"], None),
        (["fraud"] * 3, None),
        ([None] * 3, None),
    ],
)
def test_an_organism_is_scored_by_the_truth_of_its_pairs_contrast(
    categories, found, asked, tmp_path
):
    folder = shutil.copytree(asked.model, tmp_path / "organism")
    contrasts = {name: {"contrast": name, "heads": [[0, 1]]} for name in ("unlock", "topic")}
    (folder / organisms.TRUTH).write_text(json.dumps({"contrasts": contrasts}))
    lines = [pair | {"category": c} for pair, c in zip(PAIRS, categories, strict=True)]
    file = write(tmp_path / "pairs.jsonl", *lines)
    made = mediate.run(
        to(asked, tmp_path, model=str(folder), pairs=str(file), granularity=("head",))
    )
    assert described(made.place.folder)["truth"] == contrasts.get(found)
    assert (found is not None) == (
        "planted truth" in (made.place.folder / "report.html").read_text()
    )


def test_a_run_writes_the_files_of_the_contract(finished):
    group = zarr.open_group(finished.place.folder / "effects.zarr", mode="r")
    names = {f"{name}/{leaf}" for name in UNITS for leaf in ("nie", "tie", "done")}
    found = {name: array for name, array in group.members(None) if hasattr(array, "shape")}
    coordinates = {name for name in found if name.rpartition("/")[2] in AXES}
    assert set(found) - coordinates == {*TOTALS, *names}
    assert coordinates == {"pair"} | {
        f"{name}/{axis}" for name in UNITS for axis in found[f"{name}/nie"].metadata.dimension_names
    }
    for name in set(found) - coordinates:
        array = found[name]
        granularity, _, leaf = name.rpartition("/")
        assert array.shape == (3, *UNITS.get(granularity, ()))
        assert array.metadata.zarr_format == 3
        assert dict(array.attrs) == {
            "positions": "prompt" if granularity == "token" else "last",
            "metric": "logit_diff",
            "precision": "float32",
        }
        if leaf == "done":
            assert (array.dtype, array.fill_value) == (np.uint8, 0)
        else:
            assert array.dtype == np.float32 and np.isnan(array.fill_value)
    for name in ("summary.parquet", "report.html", "figures/neuron.png"):
        assert (finished.place.folder / name).stat().st_size > 0


def test_pairs_of_the_asked_splits_alone_are_used(asked, tmp_path, capsys):
    lines = [pair | {"split": split} for pair, split in zip(PAIRS, "ABC", strict=True)]
    file = str(write(tmp_path / "pairs.jsonl", *lines))
    some = to(asked, tmp_path, pairs=file, granularity=("layer",), split=("C", "A"))
    found = mediate.measure(some)[0]
    assert found.pair_ids == ("even", "short") and found.run["split"] == ["C", "A"]
    assert "2 of 3 pairs are in split C or A" in capsys.readouterr().err
    used = [(3, 4, 1), (3, 4, 2), (1, 2, 3, 4, 5), (1, 2, 9, 4, 5)]
    hashes = set().union(*(splits.fingerprints(None, ids) for ids in used))
    assert found.run["prompt_hashes"] == sorted(hashes) and len(hashes) == 4
    with pytest.raises(InputError, match="--split=D: not one of A, B, C"):
        mediate.run(dataclasses.replace(some, split=("D",)))
    write(tmp_path / "pairs.jsonl", *lines[:1])
    with pytest.raises(InputError, match="--split=B: none of the 1 pairs of"):
        mediate.run(dataclasses.replace(some, split=("B",)))


def test_so_many_pairs_are_drawn_and_another_number_is_another_run(asked, tmp_path, capsys):
    lines = [PAIRS[0] | {"id": str(number)} for number in range(9)]
    file = str(write(tmp_path / "pairs.jsonl", *lines))
    some = to(asked, tmp_path, pairs=file, granularity=("layer",), most_pairs=4)
    found = mediate.measure(some)[0]
    assert found.run["most_pairs"] == len(found.pair_ids) == 4
    assert "4 of 9 pairs are drawn (--most_pairs)" in capsys.readouterr().err
    # Not the first, and in the file's order; fewer are among more.
    assert found.pair_ids != ("0", "1", "2", "3") and sorted(found.pair_ids) == list(found.pair_ids)
    more = mediate.measure(dataclasses.replace(some, out=str(tmp_path / "more"), most_pairs=5))[0]
    assert set(found.pair_ids) < set(more.pair_ids)
    with pytest.raises(InputError, match="other settings: --most_pairs was 4, is now 5: give them"):
        mediate.measure(dataclasses.replace(some, most_pairs=5))
    all_of_them = dataclasses.replace(some, out=str(tmp_path / "all"), most_pairs=9)
    assert len(mediate.measure(all_of_them)[0].pair_ids) == 9


def test_run_json_says_what_was_asked_and_how_it_was_computed(asked, finished):
    run = described(finished.place.folder)
    flags = json.loads(json.dumps(dataclasses.asdict(asked)))
    today = datetime.date.today().isoformat()
    settled = {"date": today, "matmul_precision": "float32", "mesh": "1x1"}
    assert {name: run[name] for name in flags} == flags | settled
    assert run["pair_bases"] == run["pair_ids"] == ["even", "longer", "short"]
    assert run["finished"] is True and run["skipped"] == 0 and run["seconds"] > 0
    assert run["device"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    assert run["precision"] == run["matmul_precision"] == "float32"
    assert run["versions"]["jax"] == jax.__version__
    assert run["weights_hash"] == checkpoint.weights_hash(checkpoint.resolve(asked.model))
    assert run["seeds"] == {"bootstrap": 0, "screen": 0, "draw": 0, "scout": 0}


def test_a_summary_has_a_row_for_every_unit_and_estimand(finished):
    rows = pq.read_table(finished.place.folder / "summary.parquet").to_pylist()
    columns = {"granularity", "layer", "site", "unit", "position", "estimand"}
    columns |= {"mean", "ci_low", "ci_high", "p_value", "q_value", "n_pairs"}
    assert columns <= rows[0].keys()
    per_granularity = {name: sum(row["granularity"] == name for row in rows) for name in UNITS}
    assert per_granularity == {name: 4 * np.prod(shape) for name, shape in UNITS.items()}
    nie = {
        (row["layer"], row["unit"]): row["mean"]
        for row in rows
        if (row["granularity"], row["estimand"]) == ("neuron", "nie")
    }
    np.testing.assert_allclose(nie[1, 7], finished.effects("neuron")[0][:, 1, 7].mean(), rtol=1e-6)


def test_effects_are_those_that_python_gets_from_scan(asked, finished):
    decoder, tokenizer = models.load(asked.model)
    assert tokenizer is None
    pairs = pairs_lib.read(asked.pairs)
    for granularity in UNITS:
        scanned = jaxmed.scan(decoder, pairs, granularity, LogitDifference())[granularity]
        for name in ("nie", "tie"):
            written = arrays(finished.place.folder)[f"{granularity}/{name}"]
            # Other batches round otherwise; effects that cancel do so relative to the others.
            scale = np.nanmax(np.abs(written))
            expected = getattr(scanned, name)
            np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-6 * scale)
        for name in TOTALS:
            np.testing.assert_allclose(
                arrays(finished.place.folder)[name], getattr(scanned, name), rtol=1e-5
            )


def test_te_is_the_source_run_minus_the_base_run(finished):
    found = arrays(finished.place.folder)
    np.testing.assert_allclose(found["te"], found["y_source"] - found["y_base"], rtol=1e-5)
    assert (np.abs(found["te"]) > 1e-3).all()


def test_tokens_count_from_the_prompts_end_and_are_nan_beyond_its_aligned_positions(finished):
    found = arrays(finished.place.folder)
    for index, length in enumerate(ALIGNED):
        for name in ("nie", "tie"):
            token = found[f"token/{name}"][index]
            assert np.isfinite(token[..., :length]).all() and np.isnan(token[..., length:]).all()
        done = found["token/done"][index]
        assert (done[..., :length] == Status.EXACT).all()
        assert (done[..., length:] == Status.NOT_RUN).all()
    # Patching the residual of the last token of the last layer is the total effect.
    np.testing.assert_allclose(found["token/nie"][:, -1, 0, 0], found["te"], rtol=1e-5)
    for name in set(UNITS) - {"token"}:
        assert (found[f"{name}/done"] == Status.EXACT).all()


def test_tokens_are_nan_where_alignment_from_the_start_leaves_the_end_out(asked, tmp_path):
    # 7 and 6 tokens: the base prompt's last one has no partner.
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[1])
    question = {"align": "start", "positions": "prompt", "granularity": ("token",)}
    found = arrays(mediate.run(to(asked, tmp_path, pairs=str(pairs), **question)).place.folder)
    assert found["token/nie"].shape == (1, LAYERS, 3, 7)
    assert np.isnan(found["token/nie"][..., 0]).all()
    assert (found["token/done"][..., 0] == Status.NOT_RUN).all()
    assert np.isfinite(found["token/nie"][..., 1:]).all()


# A run that is stopped.


@pytest.fixture
def scans(monkeypatch):
    """Counts the blocks that are scanned: (granularity, ids of the pairs)."""
    calls, effects = [], scan.Scan.effects

    def counted(self, block, *arguments):
        calls.append((block.granularity, tuple(PAIRS[index]["id"] for index in block.pairs)))
        return effects(self, block, *arguments)

    monkeypatch.setattr(scan.Scan, "effects", counted)
    return calls


@pytest.fixture(scope="module")
def in_two_blocks(asked, tmp_path_factory):
    """A run in blocks of two pairs at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "_PAIRS", {"cpu": 2})
        return mediate.run(to(asked, tmp_path_factory.mktemp("blocks")))


# Its blocks: pairs of like length together.
BLOCKS = (("short", "even"), ("longer",))


def assert_same_arrays(folder, expected):
    found, wanted = arrays(folder), arrays(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_blocks_and_the_sizes_of_their_batches_are_recorded(in_two_blocks):
    blocks = in_two_blocks.run["blocks"]
    assert [(block["granularity"], block["pairs"]) for block in blocks] == [
        (name, [index for id in ids for index in range(3) if PAIRS[index]["id"] == id])
        for ids in BLOCKS
        for name in UNITS
    ]
    # Runs that are patched together, batches of a chunk, and units of a batch.
    assert all(np.shape(block["batches"])[1:] == (3,) for block in blocks)
    runs = {block["granularity"]: block["batches"][0][0] for block in blocks[: len(UNITS)]}
    assert runs["layer"] == runs["head"] == 4  # two pairs by both estimands


def test_a_run_that_is_stopped_between_blocks_goes_on_with_the_missing_ones(
    asked, in_two_blocks, scans, tmp_path, monkeypatch
):
    settings = to(asked, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cost, "_PAIRS", {"cpu": 2})
        original = scan.Scan.effects

        def stopped(self, block, *arguments):
            if block.granularity == "token":
                raise KeyboardInterrupt
            return original(self, block, *arguments)

        patch.setattr(scan.Scan, "effects", stopped)
        with pytest.raises(KeyboardInterrupt):
            mediate.run(settings)

    out = tmp_path / "out"
    assert described(out)["finished"] is False
    assert {path.name for path in out.iterdir()} == {"run.json", "effects.zarr", "sweep"}
    done = arrays(out)["layer/done"]
    assert (done[[0, 2]] == Status.EXACT).all() and (done[1] == Status.NOT_RUN).all()
    assert np.isnan(arrays(out)["te"][1]) and np.isfinite(arrays(out)["te"][[0, 2]]).all()

    scans.clear()
    # Blocks and batches are those that run.json holds, not what would be chosen now.
    monkeypatch.setattr(cost, "_FEW", 1)
    mediate.run(settings)
    first = [(name, BLOCKS[0]) for name in ("token", "neuron")]
    assert scans == [*first, *((name, BLOCKS[1]) for name in UNITS)]
    assert described(out)["finished"] is True
    assert (out / "summary.parquet").exists() and (out / "report.html").exists()
    assert_same_arrays(out, in_two_blocks.place.folder)


def test_a_block_of_which_a_pair_is_missing_is_computed_whole(
    asked, in_two_blocks, scans, tmp_path, monkeypatch
):
    """So that no bit depends on where the run was stopped."""
    settings = to(asked, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cost, "_PAIRS", {"cpu": 2})
        original = results.Results.write

        def stopped(self, index, granularity, *effects_of_pair, **part):
            if (index, granularity) == (0, "token"):
                raise KeyboardInterrupt
            original(self, index, granularity, *effects_of_pair, **part)

        patch.setattr(results.Results, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            mediate.run(settings)
    done = arrays(tmp_path / "out")["token/done"]
    assert (done[2] == Status.EXACT).any() and (done[0] == Status.NOT_RUN).all()
    scans.clear()
    mediate.run(settings)
    first = [(name, BLOCKS[0]) for name in ("token", "neuron")]
    assert scans == [*first, *((name, BLOCKS[1]) for name in UNITS)]
    assert_same_arrays(tmp_path / "out", in_two_blocks.place.folder)


def test_long_lists_are_computed_and_stored_in_parts_of_the_layers(
    asked, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(cost, "UNITS_OF_A_BLOCK", NEURONS)
    monkeypatch.setattr(cost, "_TOGETHER", {"cpu": 2})  # which one layer's neurons fill
    found = mediate.run(to(asked, tmp_path, granularity=("layer", "neuron")))
    of_neurons = [block for block in found.run["blocks"] if block["granularity"] == "neuron"]
    assert [block["layers"] for block in of_neurons] == [[0, 1], [1, 2]] * 3
    assert found.layers_together("neuron") == 1 and found.layers_together("layer") == LAYERS
    written, expected = arrays(tmp_path / "out"), arrays(finished.place.folder)
    assert (written["neuron/done"] == Status.EXACT).all()
    for name in ("nie", "tie"):
        whole = expected[f"neuron/{name}"]
        np.testing.assert_allclose(
            written[f"neuron/{name}"], whole, rtol=1e-4, atol=1e-6 * np.abs(whole).max()
        )
    names = sorted(path.name for path in (tmp_path / "out" / "sweep" / "begun").iterdir())
    assert names[0] == "layer-00002-000"  # of all pairs
    of_layers = [f"neuron-{pair:05d}-{layer:03d}" for pair in range(3) for layer in range(2)]
    assert names[1:] == of_layers


# Several processes.


def test_one_process_does_what_others_have_left_and_the_first_writes_the_report(
    asked, in_two_blocks, scans, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cost, "_PAIRS", {"cpu": 2})
    settings, out = to(asked, tmp_path), tmp_path / "out"
    mediate.run(dataclasses.replace(settings, process=1, processes=2))
    units = [(name, pairs) for pairs in BLOCKS for name in UNITS]
    assert scans == [*units[1::2], *units[::2][::-1]]
    assert described(out)["finished"] is False and not (out / "summary.parquet").exists()
    said = capsys.readouterr().err
    assert "This is process 1 of 2; " in said
    assert "Process 1: module-00002-000 (module of pair 'short' and 1 more) done in " in said
    assert "Nothing is left for process 1 of 2. Process 0 writes summary and report" in said
    seconds = described(out)["seconds"]
    scans.clear()
    mediate.run(dataclasses.replace(settings, process=0, processes=2))
    assert scans == [] and described(out)["finished"] is True
    assert (out / "report.html").exists() and described(out)["seconds"] > seconds > 0
    assert_same_arrays(out, in_two_blocks.place.folder)


def test_processes_that_find_another_precision_the_faster_take_that_of_the_first(
    asked, scans, tmp_path, monkeypatch
):
    settings = to(asked, tmp_path, granularity=("layer",))
    mediate.run(settings)
    # As if the other had begun after this one looked.
    date = datetime.date.today().isoformat()
    monkeypatch.setattr(loading, "settled", lambda given: dataclasses.replace(given, date=date))
    monkeypatch.setattr(rates, "exact_precision", lambda decoder, rows=None: "split3")
    scans.clear()
    found, asked_again = mediate.measure(settings)
    assert asked_again.decoder.products.precision == found.run["precision"] == "float32"
    assert scans == []
    with pytest.raises(InputError, match='precision was "float32", is now "split3"'):
        mediate.measure(dataclasses.replace(settings, matmul_precision="split3"))


# What fails.


def faulty(monkeypatch, fault):
    """Scans, but raises what `fault` gives for a block, if it gives anything."""
    effects = scan.Scan.effects

    def tried(self, block, *arguments):
        if error := fault(block):
            raise error
        return effects(self, block, *arguments)

    monkeypatch.setattr(scan.Scan, "effects", tried)


def test_blocks_that_fail_have_no_effects_until_they_are_tried_again(
    asked, in_two_blocks, scans, tmp_path, monkeypatch
):
    settings, out = to(asked, tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(cost, "_PAIRS", {"cpu": 2})
        failing = ("layer-00002-000", "token-00002-000")  # of the first two pairs
        faulty(patch, lambda block: ValueError("no") if block.name in failing else None)
        mediate.run(settings)
    assert len(scans) == 8 and described(out)["finished"] is True
    found, expected = arrays(out), arrays(in_two_blocks.place.folder)
    assert np.isfinite(found["te"]).all()  # though the block failed that measures it first
    assert (found["layer/done"][[0, 2]] == Status.FAILED).all()
    has_unit = expected["token/done"][[0, 2]] == Status.EXACT
    failed = np.where(has_unit, Status.FAILED, Status.NOT_RUN)
    np.testing.assert_array_equal(found["token/done"][[0, 2]], failed)
    assert np.isnan(found["token/nie"][[0, 2]]).all()
    np.testing.assert_array_equal(found["neuron/nie"], expected["neuron/nie"])
    scans.clear()
    mediate.run(settings)
    assert scans == []
    mediate.run(dataclasses.replace(settings, retry_failed=True))
    assert scans == [("layer", BLOCKS[0]), ("token", BLOCKS[0])]
    assert_same_arrays(out, in_two_blocks.place.folder)


def test_a_block_for_which_the_memory_does_not_suffice_is_computed_in_smaller_batches(
    asked, finished, tmp_path, monkeypatch, capsys
):
    out_of_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def fault(block):
        large = block.granularity == "neuron" and block.batches[0].rows > 4
        return out_of_memory if large else None

    faulty(monkeypatch, fault)
    found = mediate.run(to(asked, tmp_path, granularity=("neuron",)))
    assert "neuron-00002-000: out of memory; tried again" in capsys.readouterr().err
    assert (found.done("neuron") == Status.EXACT).all()
    for written, whole in zip(found.effects("neuron"), finished.effects("neuron"), strict=True):
        np.testing.assert_allclose(written, whole, rtol=1e-4, atol=1e-6 * np.abs(whole).max())
    # What is recorded is what was planned.
    assert found.run["blocks"][0]["batches"][0][2] > 4


def test_gradients_that_fail_leave_the_selection_to_the_other_pairs(
    asked, scans, tmp_path, monkeypatch
):
    changes = {"granularity": ("neuron",), "screen": TOP, "screen_audit": AUDITED}
    settings, scores = to(asked, tmp_path, **changes), screening.scores

    def failing(decoder, pair, *arguments, **options):
        if pair.id == "longer":
            raise ValueError("no")
        return scores(decoder, pair, *arguments, **options)

    monkeypatch.setattr(screening, "scores", failing)
    found = mediate.run(settings)
    computed = found.done("neuron")[0] == Status.EXACT
    assert computed.any() and not computed.all()
    # Neurons of that pair that were not computed have no estimate either.
    expected = np.where(computed, Status.EXACT, Status.FAILED)
    np.testing.assert_array_equal(found.done("neuron")[1], expected)
    monkeypatch.setattr(screening, "scores", scores)
    scans.clear()
    mediate.run(dataclasses.replace(settings, retry_failed=True))
    assert scans == []  # others would be selected now


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be spoiled."""
    return shutil.copytree(finished.place.folder, tmp_path / "out")


def test_a_finished_run_is_not_computed_again(asked, copied, scans, finished, tmp_path):
    mediate.run(to(asked, tmp_path))
    assert scans == []
    assert_same_arrays(copied, finished.place.folder)


def test_totals_that_failed_and_that_a_block_has_measured_since_are_no_failure(
    asked, copied, tmp_path
):
    failure = copied / "sweep" / "failed" / "total-00000"
    failure.parent.mkdir(parents=True)
    failure.write_text("{}")
    sweep.check_failed(mediate.run(to(asked, tmp_path)))
    assert not failure.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("positions", "prompt"),
        ("metric", "response_logprob_diff"),
        ("group_size", 3),
        ("granularity", ("layer",)),
        ("harmful_tokens", ("id:1",)),
        ("dtype", "bfloat16"),
        ("matmul_precision", "bfloat16"),
    ],
)
def test_another_setting_in_the_same_folder_is_refused_by_name(
    name, value, asked, copied, scans, tmp_path
):
    before = described(copied)
    with pytest.raises(InputError, match=f"other settings: --{name} was .*--overwrite"):
        mediate.run(to(asked, tmp_path, **{name: value}))
    assert scans == [] and described(copied) == before


@pytest.mark.parametrize(
    "change", [{"prompt_ids": [2, 2, 3, 4, 5]}, {"safe_ids": [9]}, {"prompt_span": [1, 2]}]
)
def test_other_pairs_under_the_same_name_are_refused(change, asked, copied, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[0] | change, *PAIRS[1:])
    run = described(copied) | {"pairs": str(pairs)}
    (copied / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"not of the same pairs \(what --pairs holds\): choose"):
        mediate.run(to(asked, tmp_path, pairs=str(pairs)))


def test_an_ignored_key_of_config_json_is_recorded(asked, finished, tmp_path):
    shutil.copytree(asked.model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_in": 0.5}))
    other = to(asked, tmp_path, model=str(tmp_path / "model"), granularity=("layer",))
    with pytest.raises(InputError, match="config.json: .* --ignore_config=trained_in"):
        mediate.run(other)
    found = mediate.run(dataclasses.replace(other, ignore_config=("trained_in",)))
    assert described(found.place.folder)["ignore_config"] == ["trained_in"]
    assert described(finished.place.folder)["ignore_config"] == []


def test_other_weights_under_the_same_name_are_refused(asked, copied, tmp_path):
    tiny.save(tmp_path / "model", seed=1, **SHAPE)
    run = described(copied) | {"model": str(tmp_path / "model")}
    (copied / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"not of the same weights \(what --model holds\)"):
        mediate.run(to(asked, tmp_path, model=str(tmp_path / "model")))


def test_another_config_of_the_same_weights_is_refused(asked, copied, tmp_path):
    model = shutil.copytree(asked.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    run = described(copied) | {"model": str(model)}
    (copied / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"not of the same config \(config.json in --model\)"):
        mediate.run(to(asked, tmp_path, model=str(model)))
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    mediate.run(to(asked, tmp_path, model=str(model)))  # says nothing of the computation


def test_another_adapter_under_the_same_name_is_refused(asked, model, tmp_path):
    """It is part of what the results are of; the base's weights are the same."""
    modules = [f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS)]
    tensors, name = lora.random_lora(model, modules), tmp_path / "adapter"
    options = {"target_modules": ["up_proj"]}
    adapter = lora.write(name, tensors, **options)
    settings = to(asked, tmp_path, adapter=str(adapter), granularity=("layer",))
    run = described(mediate.run(settings).place.folder)
    assert run["adapter"] == str(adapter)
    assert run["adapter_hash"] == checkpoint.adapter_hash(adapter)
    assert run["weights_hash"] == checkpoint.weights_hash(model)
    plain = mediate.run(to(asked, tmp_path / "plain", granularity=("layer",)))
    assert described(plain.place.folder)["adapter_hash"] is None
    assert np.abs(plain.te - results.Results.open(settings.out).te).max() > 1e-3
    lora.write(name, tensors, lora_alpha=1, **options)
    with pytest.raises(InputError, match=r"not of the same adapter \(what --adapter holds\)"):
        mediate.run(settings)
    with pytest.raises(InputError, match="other settings: --adapter was"):
        mediate.run(dataclasses.replace(settings, adapter=""))


def test_a_run_whose_report_failed_is_not_finished(asked, tmp_path, monkeypatch):
    settings = to(asked, tmp_path, granularity=("layer",))
    with monkeypatch.context() as patch:
        patch.setattr(mediation, "write", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            mediate.run(settings)
    assert described(tmp_path / "out")["finished"] is False
    assert described(mediate.run(settings).place.folder)["finished"] is True


def test_overwrite_starts_again(asked, copied, scans, tmp_path):
    mediate.run(to(asked, tmp_path, overwrite=True, granularity=("layer",)))
    assert scans == [("layer", ("short", "even", "longer"))]
    assert set(arrays(copied)) == {*TOTALS, "layer/nie", "layer/tie", "layer/done"}
    assert not (copied / "figures" / "neuron.png").exists()


# A report that is written again.


def test_a_report_needs_neither_the_model_nor_the_pairs(copied, tmp_path):
    gone = {"model": str(tmp_path / "gone"), "pairs": str(tmp_path / "gone.jsonl")}
    (copied / "run.json").write_text(json.dumps(described(copied) | gone))
    (copied / "report.html").unlink()
    report.run(ReportSettings(str(copied)))
    assert str(tmp_path / "gone") in (copied / "report.html").read_text()
    with pytest.raises(InputError, match="gone"):
        report.run(ReportSettings(str(copied), show_text=True))


def test_text_is_not_shown_where_the_pairs_are_others(asked, copied, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", *PAIRS[:2])
    (copied / "run.json").write_text(json.dumps(described(copied) | {"pairs": str(pairs)}))
    with pytest.raises(InputError, match="no longer has pair 'short'"):
        report.run(ReportSettings(str(copied), show_text=True))


def test_text_is_shown_where_bad_pairs_were_left_out(copied, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", "{", *PAIRS)
    said = described(copied) | {"pairs": str(pairs)}
    (copied / "run.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="pairs.jsonl:1: not JSON"):
        report.run(ReportSettings(str(copied), show_text=True))
    (copied / "run.json").write_text(json.dumps(said | {"skip_bad_pairs": True}))
    report.run(ReportSettings(str(copied), show_text=True))


# Pairs that cannot be used.

BAD_PAIRS = [
    "{",
    PAIRS[0] | {"id": "outside", "safe_ids": [61]},
    PAIRS[0] | {"id": "long", "prompt_ids": [1] * 65},
    PAIRS[0] | {"id": "same", "safe_ids": [7]},
]


def test_bad_pairs_are_left_out_said_and_counted_if_asked_to(asked, finished, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[0], *BAD_PAIRS, *PAIRS[1:])
    settings = to(asked, tmp_path, pairs=str(pairs), skip_bad_pairs=True)
    run = mediate.run(settings)
    assert described(run.place.folder)["skipped"] == 4
    assert run.pair_ids == ("even", "longer", "short")
    assert_same_arrays(run.place.folder, finished.place.folder)
    said = capsys.readouterr().err
    for line, fault in ((2, "not JSON"), (3, "token id 61"), (4, "65 tokens"), (5, "same first")):
        assert any(
            text.startswith(f"Skipped: {pairs}:{line}: ") and fault in text
            for text in said.splitlines()
        ), said
    assert "Skipped 4 of 7 pairs" in said


@pytest.mark.parametrize("bad", BAD_PAIRS, ids=["json", "vocabulary", "long", "same token"])
def test_a_bad_pair_stops_a_run_before_it_writes(bad, asked, scans, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", *PAIRS, bad)
    with pytest.raises(reading.DataError, match=f"^{pairs}:4: "):
        mediate.run(to(asked, tmp_path, pairs=str(pairs)))
    assert scans == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [BAD_PAIRS[:1], BAD_PAIRS[1:]])
def test_a_file_without_a_usable_pair_is_refused_though_bad_pairs_may_be_skipped(
    bad, asked, tmp_path, capsys
):
    pairs = write(tmp_path / "pairs.jsonl", *bad)
    with pytest.raises(reading.DataError, match=str(pairs)):
        mediate.run(to(asked, tmp_path, pairs=str(pairs), skip_bad_pairs=True))
    assert capsys.readouterr().err.count("Skipped: ") == len(bad)  # and so it is said why
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positions": "first"}, "--positions=first: not one of last, differing"),
        ({"align": "middle"}, "--align=middle: not one of end, start, span"),
        ({"metric": "loss"}, "--metric=loss: not one of logit_diff"),
        ({"response_part": "half"}, "--response_part=half: not one of all"),
        ({"granularity": ("layer", "atom")}, "--granularity=atom: not one of layer"),
        ({"granularity": ()}, "--granularity=: not one of layer"),
        ({"positions": "response"}, "--positions=response: logit_diff reads the last prompt"),
        ({"granularity": ("direction",)}, "--granularity=direction needs --directions=FILE.npz"),
        ({"screen_audit": 5}, "--screen_audit needs --screen=K"),
        ({"screen_steps": 2}, "--screen_steps needs --screen=K"),
        ({"screen": 2, "granularity": ("layer",)}, "--screen needs --granularity=neuron"),
        ({"screen": -1}, "--screen=-1: must be a number, and at least 0"),
        ({"matmul_precision": "highest"}, "--matmul_precision=highest: not one of auto, float32"),
        ({"memory_gb": float("nan")}, "--memory_gb=nan: must be a number, and at least 0.001"),
        ({"memory_gb": float("inf")}, "--memory_gb=inf: must be a number"),
        ({"mesh": "8"}, "--mesh=8: must be two numbers of devices, as 8x1"),
        ({"mesh": "3x1"}, "--mesh=3x1: has 3 devices, and this process has 1: give one of 1x1"),
        ({"joint_size": 1, "group_size": 2}, "--joint_size needs"),
        ({"joint_size": 1, "granularity": ("layer",)}, "--joint_size needs"),
        ({"joint_share": 0.5}, "--joint_share needs --joint_size"),
        ({"joint_pairs": 3}, "--joint_pairs needs --joint_size"),
        ({"date": "31.1.2026"}, "--date=31.1.2026: must be a day"),
        ({"template_args": "[1]"}, "--template_args=[1]: must be a JSON object"),
        ({"pairs": "gone.jsonl"}, "gone.jsonl: there is no such file"),
        ({"pairs": __file__}, f"{__file__}:1: not JSON"),
        ({"directions": "gone.npz"}, "gone.npz: there is no such file"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_model_is_loaded(
    changes, said, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(InputError) as caught:
        mediate.run(to(asked, tmp_path, **changes))
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "out").exists()


def test_a_run_in_a_bucket_is_that_of_a_folder(asked, finished, scans, bucket, tmp_path):
    settings = dataclasses.replace(asked, out=f"{bucket}/a/run")
    in_bucket = mediate.run(settings)
    for name in ("report.html", "summary.parquet", "figures/neuron.png"):
        assert in_bucket.place.exists(name)
    in_bucket.copy(tmp_path / "copy")
    assert_same_arrays(tmp_path / "copy", finished.place.folder)
    scans.clear()
    assert mediate.run(settings).run["finished"] and scans == []
    assert not pathlib.Path("gs:").exists()


@pytest.mark.parametrize("out", ["pairs.jsonl", "pairs.jsonl/out", "taken"])
def test_a_folder_that_cannot_be_the_results_is_refused(out, asked, scans, tmp_path):
    write(tmp_path / "pairs.jsonl", *PAIRS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=out):
        mediate.run(dataclasses.replace(asked, out=str(tmp_path / out), overwrite=True))
    assert scans == [] and (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"screen": 25}, "--screen=25: the model has 24 neurons"),
        ({"screen": 9, "group_size": 3}, "--screen=9: the model has 8 groups of neurons"),
        ({"joint_size": 25}, "--joint_size=25: the model has 24 neurons"),
        ({"memory_gb": 0.001}, "memory_gb=0.001 (--memory_gb): model and program take"),
    ],
)
def test_settings_that_the_model_does_not_allow_are_refused_before_anything_is_written(
    changes, said, asked, scans, tmp_path
):
    with pytest.raises(InputError) as caught:
        mediate.run(to(asked, tmp_path, **changes))
    assert str(caught.value).startswith(said)
    assert scans == [] and not (tmp_path / "out").exists()


def test_the_budget_and_the_precision_reach_the_engine(asked, tmp_path, monkeypatch):
    given = []
    original = scan.Scan.blocks

    def heard(self, granularities, memory, *others):
        given.append((self.decoder.products.precision, memory))
        return original(self, granularities, memory, *others)

    monkeypatch.setattr(scan.Scan, "blocks", heard)
    monkeypatch.setattr(memory, "free", lambda memory_gb: int(memory_gb * 2**30))
    changes = {"matmul_precision": "bfloat16", "memory_gb": 0.25, "granularity": ("layer",)}
    run = mediate.run(to(asked, tmp_path, **changes))
    assert given == [("bfloat16", 2**28)]
    assert run.run["precision"] == "bfloat16"


def test_the_precision_that_is_chosen_is_kept_on_resume(asked, tmp_path, monkeypatch):
    """Measured when the run begins, and read from run.json by whoever goes on with it."""
    chosen = iter(["split3", "float32"])
    monkeypatch.setattr(rates, "exact_precision", lambda decoder, rows=None: next(chosen))
    asked = to(asked, tmp_path, granularity=("layer",))
    for again in (asked, asked):
        run = mediate.run(again)
        assert run.run["matmul_precision"] == run.run["precision"] == "split3"
    run = mediate.run(dataclasses.replace(asked, overwrite=True))
    assert run.run["matmul_precision"] == "float32"


# Directions.


@pytest.fixture(scope="module")
def vectors(asked, model):
    """A file of directions: single neurons, and anything else."""
    generator = np.random.default_rng(0)
    residual = generator.normal(size=16).astype(np.float32)
    file = model.parent / "vectors.npz"
    axes = np.eye(NEURONS, dtype=np.float32)[[7, 2, 11]]
    np.savez(file, **{"residual.0": residual / np.linalg.norm(residual), "neuron.1": axes})
    return file


def test_a_file_of_directions_adds_them_to_what_is_asked(asked, finished, vectors, tmp_path):
    settings = to(asked, tmp_path, granularity=("layer",), directions=str(vectors))
    run = mediate.run(settings)
    assert run.granularities == ("layer", "direction")
    assert run.sizes.sites == ("residual", "neuron")
    group = zarr.open_group(run.place.folder / "effects.zarr", mode="r")
    assert group["direction/nie"].attrs["sites"] == ["residual", "neuron"]
    assert group["direction/done"].shape == (3, LAYERS, 2, 3)
    given = np.zeros((LAYERS, 2, 3), bool)
    given[0, 0, 0] = given[1, 1] = True
    assert (run.done("direction") == np.where(given, Status.EXACT, Status.NOT_RUN)).all()
    for side, neurons in zip(run.effects("direction"), finished.effects("neuron"), strict=True):
        assert (np.isfinite(side) == given).all()
        # A neuron is a direction along one axis of its site.
        np.testing.assert_allclose(side[:, 1, 1], neurons[:, 1, [7, 2, 11]], rtol=1e-3, atol=1e-7)
    decoder, _ = models.load(asked.model)
    read = directions.read(vectors, decoder.config)
    assert described(run.place.folder)["directions_hash"] == read.hash
    rows = pq.read_table(run.place.folder / "summary.parquet").to_pylist()
    places = [
        (row["layer"], row["site"], row["unit"])
        for row in rows
        if (row["granularity"], row["estimand"]) == ("direction", "nie")
    ]
    assert places == [(0, "residual", 0), *((1, "neuron", number) for number in range(3))]
    assert (run.place.folder / "figures" / "direction.png").exists()
    assert not run.missing("direction")

    # Another file under the same name is another question.
    other = np.load(vectors)
    np.savez(tmp_path / "other.npz", **{**other, "residual.0": -other["residual.0"]})
    path = described(run.place.folder) | {"directions": str(tmp_path / "other.npz")}
    (run.place.folder / "run.json").write_text(json.dumps(path))
    with pytest.raises(InputError, match="not of the same directions"):
        mediate.run(dataclasses.replace(settings, directions=str(tmp_path / "other.npz")))


# The screen.

TOP, AUDITED = 2, 5


@pytest.fixture(scope="module")
def screened(asked, finished, model):
    """A run of layers and of some neurons."""
    changes = {"granularity": ("layer", "neuron"), "screen": TOP, "screen_audit": AUDITED}
    return mediate.run(dataclasses.replace(asked, out=str(model.parent / "screened"), **changes))


def test_a_screened_run_is_exact_where_it_computes_and_says_where_it_does_not(
    asked, finished, screened
):
    decoder, _ = models.load(asked.model)
    question = Question(LogitDifference())
    estimates = [screening.scores(decoder, pair, question) for pair in pairs_lib.read(asked.pairs)]
    expected = np.array(estimates).swapaxes(0, 1).astype(np.float32)
    np.testing.assert_allclose(screened.estimates(), expected, rtol=1e-5, atol=1e-9)

    status = screened.done("neuron")
    assert (status == status[0]).all()
    exact = status[0] == Status.EXACT
    assert exact.sum() == screening.MARGIN * TOP + AUDITED
    assert (status[0][~exact] == Status.ESTIMATED).all()
    strength = ranking.strength(*expected)
    strongest = np.argsort(-strength, axis=None)[: screening.MARGIN * TOP]
    assert exact.flat[strongest].all()
    sides = (screened.effects("neuron"), finished.effects("neuron"), screened.estimates())
    for found, wanted, estimated in zip(*sides, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found[:, exact], wanted[:, exact], rtol=1e-4, atol=1e-6 * scale)
        np.testing.assert_array_equal(found[:, ~exact], estimated[:, ~exact])
    for found, wanted in zip(screened.effects("layer"), finished.effects("layer"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_screened_run_records_what_it_may_have_missed(finished, screened):
    audit = described(screened.place.folder)["audit"]
    candidates = screening.MARGIN * TOP
    assert (audit["candidates"], audit["sampled"]) == (candidates, AUDITED)
    assert audit["uncomputed"] == LAYERS * NEURONS - candidates - AUDITED
    assert sum(stratum["units"] for stratum in audit["strata"]) == LAYERS * NEURONS - candidates
    assert sum(stratum["sampled"] for stratum in audit["strata"]) == AUDITED
    exact = ranking.strength(*finished.effects("neuron"))
    missing = (exact > audit["threshold"]) & screened.estimated("neuron")
    assert missing.sum() <= audit["bound"] <= audit["uncomputed"]
    assert -1 <= audit["spearman"] <= 1 and audit["confidence"] == 0.95
    assert "At most" in mediation.closing_lines(screened)[-1]
    assert (screened.place.folder / "figures" / "screen.png").exists()


def test_a_screened_run_goes_on_with_the_same_neurons(
    asked, screened, scans, tmp_path, monkeypatch
):
    changes = {"granularity": ("layer", "neuron"), "screen": TOP, "screen_audit": AUDITED}
    settings = to(asked, tmp_path, **changes)
    scored, scores = [], screening.scores

    def stopped(decoder, pair, *arguments, **options):
        scored.append(pair.id)
        if scored == ["even", "longer"]:
            raise KeyboardInterrupt
        return scores(decoder, pair, *arguments, **options)

    monkeypatch.setattr(screening, "scores", stopped)
    with pytest.raises(KeyboardInterrupt):
        mediate.run(settings)
    assert scans == []
    with monkeypatch.context() as patch:
        original = results.Results.write

        def stopped_write(self, index, *effects_of_pair, **part):
            if index == 1:
                raise KeyboardInterrupt
            original(self, index, *effects_of_pair, **part)

        patch.setattr(results.Results, "write", stopped_write)
        with pytest.raises(KeyboardInterrupt):
            mediate.run(settings)
    assert scored == ["even", "longer", "longer", "short"]
    mediate.run(settings)
    assert scored == ["even", "longer", "longer", "short"]  # each estimate is kept
    everything = ("short", "even", "longer")
    assert scans == [("layer", everything)] * 2 + [("neuron", everything)]
    assert_same_arrays(tmp_path / "out", screened.place.folder)
    with pytest.raises(InputError, match="other settings: --screen was 2, is now 3"):
        mediate.run(dataclasses.replace(settings, screen=3))


def test_a_screen_of_all_neurons_misses_none(asked, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[0])
    changes = {"pairs": str(pairs), "granularity": ("neuron",), "screen": 12, "screen_audit": 0}
    run = mediate.run(to(asked, tmp_path, **changes))
    assert (run.done("neuron") == Status.EXACT).all()
    assert run.run["audit"]["bound"] == 0 and run.run["audit"]["spearman"] is None
    assert mediation.closing_lines(run)[-1].endswith("so none is missing.")


def test_a_neuron_that_failed_leaves_the_bound_valid(screened, monkeypatch):
    selection = screening.select(
        ranking.strength(*screened.estimates()), TOP, AUDITED, mediate.SCREEN_SEED
    )
    original = results.Results.effects
    layer, neuron = np.argwhere(selection.sampled)[0]

    def failing(self, granularity, **options):
        nie, tie = original(self, granularity, **options)
        if granularity == "neuron":
            nie[:, layer, neuron] = np.nan
        return nie, tie

    whole = mediate._audit(screened, selection, TOP)
    monkeypatch.setattr(results.Results, "effects", failing)
    failed = mediate._audit(screened, selection, TOP)
    assert failed["hits"] >= whole["hits"] and failed["bound"] >= whole["bound"]
    assert failed["hits"] >= 1


# The joint set.


def test_a_joint_set_is_searched_confirmed_and_reported(asked, tmp_path, monkeypatch):
    # Of a share that is never reached.
    monkeypatch.setattr(settings_lib, "check", lambda settings: None)
    # A single differing token: the total effect is large.
    answers = {"harmful_ids": [7], "safe_ids": [10]}
    pairs = write(
        tmp_path / "pairs.jsonl",
        *({"prompt_ids": [1], "counterfactual_ids": [other]} | answers for other in (2, 3, 4)),
    )
    settings = to(
        asked,
        tmp_path,
        pairs=str(pairs),
        granularity=("neuron",),
        joint_size=2,
        joint_share=2.0,
        joint_pairs=1,
    )
    run = mediate.run(settings)
    joint = described(run.place.folder)["joint"]
    picked = [tuple(unit) for unit in joint["picked"]]
    assert len(set(picked)) == len(joint["share_nie"]) == len(joint["share_tie"]) == 2
    # Each share is the joint effect of the set so far.
    sets = np.zeros((2, LAYERS, NEURONS), bool)
    sets[0][picked[0]] = sets[1][picked[0]] = sets[1][picked[1]] = True
    decoder, _ = models.load(asked.model)
    with jax.default_matmul_precision("float32"):
        effect, *others = (
            joint_lib.joint_pair(decoder, pair, Question(LogitDifference()), sets)
            for pair in pairs_lib.read(pairs)
        )
    te = effect.y_source - effect.y_base
    np.testing.assert_allclose(joint["share_nie"], effect.nie["joint"] / te, rtol=1e-4)
    np.testing.assert_allclose(joint["share_tie"], effect.tie["joint"] / te, rtol=1e-4)
    # A set of one is a single unit, whose effects the engine has measured too.
    for name, single in zip(("nie", "tie"), run.effects("neuron"), strict=True):
        np.testing.assert_allclose(joint[f"share_{name}"][0], single[0][picked[0]] / te, rtol=1e-3)
    # The pairs that were not searched confirm the whole set: a share of means.
    te = np.mean([other.y_source - other.y_base for other in others])
    assert joint["confirmed"]["pairs"] == 2
    for name in ("nie", "tie"):
        share = np.mean([getattr(other, name)["joint"][1] for other in others]) / te
        np.testing.assert_allclose(joint["confirmed"][f"share_{name}"], share, rtol=1e-4)
    assert joint["seconds"] > 0 and joint["share"] == 2
    assert (run.place.folder / "figures" / "joint.png").exists()


def test_no_joint_set_is_formed_where_the_total_effect_is_too_small(
    asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(joint_lib, "greedy_set", lambda *_, **__: pytest.fail("was searched"))
    same = PAIRS[0] | {"counterfactual_ids": PAIRS[0]["prompt_ids"]}
    pairs = write(tmp_path / "pairs.jsonl", same)
    run = mediate.run(to(asked, tmp_path, pairs=str(pairs), granularity=("neuron",), joint_size=2))
    assert described(run.place.folder)["finished"] is True and "joint" not in run.run
    assert "No joint set: the mean total effect" in capsys.readouterr().err
    np.testing.assert_array_equal(run.effects("neuron"), 0)


# A checkpoint with a tokenizer.


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    checkpoint.save(tiny.decoder(**SHAPE), folder, tokenizer=words.tokenizer())
    return folder


TEXT_PAIR = {
    "id": "text",
    "prompt": "tell me <b>how</b>",
    "counterfactual": "tell me <i>why</i>",
    "harmful_response": "yes",
    "safe_response": "no sorry",
}


@pytest.mark.parametrize("show_text", [False, True])
def test_text_is_shown_only_if_asked_for_and_escaped(show_text, text_model, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", TEXT_PAIR)
    out = tmp_path / "out"
    granularity = ("layer",)
    settings = MediateSettings(
        str(text_model), str(pairs), str(out), granularity, show_text=show_text
    )
    mediate.run(settings)
    page = (out / "report.html").read_text()
    assert ("&lt;b&gt;how&lt;/b&gt;" in page) == ("&lt;i&gt;why&lt;/i&gt;" in page) == show_text
    assert "<b>how" not in page and "<i>why" not in page
    assert "tell me" not in (out / "run.json").read_text()
    assert "--chat wraps them" in capsys.readouterr().err


def test_text_and_its_token_ids_give_the_same_effects(text_model, tmp_path, capsys):
    in_ids = {
        "id": "text",
        "prompt_ids": words.ids("[BOS] [USER] tell me how [END] [BOT]"),
        "counterfactual_ids": words.ids("[BOS] [USER] tell me why [END] [BOT]"),
        "harmful_ids": words.ids("yes"),
        "safe_ids": words.ids("no sorry"),
    }
    in_text = TEXT_PAIR | {"prompt": "tell me how", "counterfactual": "tell me why"}
    found = []
    for name, line, chat in (("ids", in_ids, False), ("text", in_text, True)):
        pairs = write(tmp_path / f"{name}.jsonl", line)
        out = str(tmp_path / name)
        found.append(
            mediate.run(MediateSettings(str(text_model), str(pairs), out, ("layer",), chat=chat))
        )
    assert_same_arrays(found[1].place.folder, found[0].place.folder)
    assert "--chat wraps them" not in capsys.readouterr().err


def test_first_tokens_may_be_given_as_ids_or_as_words(text_model, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", TEXT_PAIR)
    found = []
    for name, harmful in (("ids", ("id:13", "id:8")), ("words", ("yes it", "to", "yes"))):
        settings = MediateSettings(
            str(text_model),
            str(pairs),
            str(tmp_path / name),
            ("layer",),
            harmful_tokens=harmful,
            safe_tokens=("id:14",),
        )
        found.append(mediate.run(settings))
    assert_same_arrays(found[1].place.folder, found[0].place.folder)


def test_first_tokens_are_alike_after_the_pairs_that_are_kept(tmp_path, capsys):
    tokenizer = chats.sentencepiece(chats.CHAT_ML)
    decoder = tiny.decoder(**SHAPE | {"vocab_size": 700})
    checkpoint.save(decoder, tmp_path / "model", tokenizer=tokenizer)
    kept = {
        "id": "kept",
        "prompt": "tell me\n",
        "counterfactual": "tell it\n",
        "safe_response": "I",
    }
    # "Sure" is another token there; there is no safe answer, so that it is left out.
    bad = {"id": "bad", "prompt": "tell me </s>", "counterfactual": "tell it </s>"}
    asked = MediateSettings(
        str(tmp_path / "model"),
        str(write(tmp_path / "pairs.jsonl", kept, bad)),
        str(tmp_path / "out"),
        ("layer",),
        harmful_tokens=("Sure",),
        skip_bad_pairs=True,
    )
    found = mediate.run(asked)
    sure = tokenizer.convert_tokens_to_ids("Sure")
    assert (found.pair_ids, found.run["skipped"]) == (("kept",), 1)
    assert f"[{sure}]" in found.run["meaning"] and "no safe" in capsys.readouterr().err
    write(tmp_path / "pairs.jsonl", kept, bad | {"safe_response": "I"})
    with pytest.raises(InputError, match="--harmful_tokens=Sure: begins with another token after"):
        mediate.run(to(asked, tmp_path / "other"))


def test_first_tokens_as_words_need_a_tokenizer(asked, tmp_path):
    with pytest.raises(InputError, match="--safe_tokens=no: the checkpoint has no tokenizer"):
        mediate.run(to(asked, tmp_path, harmful_tokens=("id:1",), safe_tokens=("no",)))
    assert not (tmp_path / "out").exists()


# The day, and other arguments of chat templates.


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A model whose template asks for the day."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    decoder = tiny.decoder(**SHAPE | {"vocab_size": 700})
    checkpoint.save(decoder, folder, tokenizer=chats.byte_level(chats.LLAMA_3))
    return folder


CHAT_PAIR = {"id": "chat", "prompt": "tell me", "counterfactual": "tell it"}
CHAT_PAIR |= {"harmful_response": "Sure", "safe_response": "I cannot"}


def test_pairs_of_other_splits_may_come_to_have_something_to_tell(chat_model, tmp_path):
    pair = CHAT_PAIR | {"split": "A"}
    asked = MediateSettings(
        str(chat_model),
        str(write(tmp_path / "pairs.jsonl", pair)),
        str(tmp_path / "out"),
        ("layer",),
        chat=True,
        split=("A",),
    )
    mediate.run(asked)
    write(
        tmp_path / "pairs.jsonl",
        pair,
        pair | {"id": "b", "split": "B", "prompt": "tell <|end|> it"},
    )
    assert mediate.run(asked).run["tokenisation"] == {"prompts whose control tokens are text": 1}


def test_a_run_keeps_its_day(chat_model, tmp_path, monkeypatch):
    pairs = write(tmp_path / "pairs.jsonl", CHAT_PAIR)

    class Clock(datetime.date):
        now = datetime.date(2026, 1, 31)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr(datetime, "date", Clock)
    asked = MediateSettings(
        str(chat_model), str(pairs), str(tmp_path / "out"), ("layer",), chat=True
    )
    first = mediate.run(asked).run
    assert first["date"] == "2026-01-31" and first["tokenisation"] == {}
    monkeypatch.setattr(Clock, "now", datetime.date(2026, 2, 1))
    again = mediate.run(asked).run  # is no other run the day after
    assert (again["date"], again["pairs_hash"]) == (first["date"], first["pairs_hash"])
    with pytest.raises(InputError, match='date was "2026-01-31", is now "2026-02-01"'):
        mediate.run(dataclasses.replace(asked, date="2026-02-01"))
    other = mediate.run(dataclasses.replace(asked, overwrite=True)).run
    assert other["date"] == "2026-02-01" and other["pairs_hash"] != first["pairs_hash"]


def test_answers_alone_are_told_and_recorded(text_model, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", TEXT_PAIR)
    settings = MediateSettings(str(text_model), str(pairs), str(tmp_path / "out"), ("layer",))
    assert mediate.run(settings).run["tokenisation"] == {"answers that are tokenised alone": 2}
    said = capsys.readouterr().err
    assert f"Answers that are tokenised alone: 2, the first at {pairs}:1: 'harmful_resp" in said


def test_answers_that_begin_alike_are_told_the_way_out(chat_model, tmp_path):
    line = CHAT_PAIR | {"harmful_response": "I will"}
    pairs = write(tmp_path / "pairs.jsonl", line)
    asked = MediateSettings(
        str(chat_model), str(pairs), str(tmp_path / "out"), ("layer",), chat=True
    )
    with pytest.raises(InputError, match="first token .* response_logprob_diff compares whole"):
        mediate.run(asked)
