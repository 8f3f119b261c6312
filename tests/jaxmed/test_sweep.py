"""Real runs on a tiny checkpoint: what they write, what stops them, and how they go on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

import models
from jaxmed import data, definition, effects, estimands, report, results, sweep
from jaxmed.metrics import LogitDifference
from jaxmed.planning import Question
from jaxmed.sweep import Settings
from models import checkpoint
from models.errors import InputError
from tests import tiny, words

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
    return Settings(str(model), str(file), str(model.parent / "out"))


@pytest.fixture(scope="module")
def finished(asked):
    """The run that nothing disturbed."""
    return sweep.run(asked)


def to(asked, folder, **changes):
    """The same settings with other results; the folder does not exist yet."""
    return dataclasses.replace(asked, out=str(folder / "out"), **changes)


def arrays(found):
    """Every array of a results folder by name."""
    group = zarr.open_group(found / "effects.zarr", mode="r")
    return {name: array[...] for name, array in group.members(None) if hasattr(array, "shape")}


def described(folder):
    return json.loads((folder / "run.json").read_text())


# What a run writes.


def test_a_run_writes_the_files_of_the_contract(finished):
    group = zarr.open_group(finished.folder / "effects.zarr", mode="r")
    names = {f"{name}/{leaf}" for name in UNITS for leaf in ("nie", "tie", "done")}
    found = {name: array for name, array in group.members(None) if hasattr(array, "shape")}
    assert set(found) == {*TOTALS, *names}
    for name, array in found.items():
        granularity, _, leaf = name.rpartition("/")
        assert array.shape == (3, *UNITS.get(granularity, ()))
        assert array.metadata.zarr_format == 3
        assert dict(array.attrs) == {
            "positions": "prompt" if granularity == "token" else "last",
            "metric": "logit_diff",
            "precision": "highest",
        }
        if leaf == "done":
            assert (array.dtype, array.fill_value) == (np.uint8, 0)
        else:
            assert array.dtype == np.float32 and np.isnan(array.fill_value)
    for name in ("summary.parquet", "report.html", "figures/neuron.png"):
        assert (finished.folder / name).stat().st_size > 0


def test_run_json_says_what_was_asked_and_how_it_was_computed(asked, finished):
    run = described(finished.folder)
    flags = json.loads(json.dumps(dataclasses.asdict(asked)))
    assert {name: run[name] for name in flags} == flags
    assert run["pair_ids"] == ["even", "longer", "short"]
    assert run["finished"] is True and run["skipped"] == 0 and run["seconds"] > 0
    assert run["device"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    assert run["precision"] == run["matmul_precision"] == "highest"
    assert run["versions"]["jax"] == jax.__version__
    assert run["weights_hash"] == checkpoint.weights_hash(checkpoint.resolve(asked.model))
    assert run["seeds"] == {"bootstrap": 0}


def test_a_summary_has_a_row_for_every_unit_and_estimand(finished):
    rows = pq.read_table(finished.folder / "summary.parquet").to_pylist()
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
    pairs = data.read(asked.pairs)
    for granularity in UNITS:
        scanned = effects.scan(decoder, pairs, granularity, LogitDifference())
        for name in ("nie", "tie"):
            written = arrays(finished.folder)[f"{granularity}/{name}"]
            # Other batches round otherwise; effects that cancel do so relative to the others.
            scale = np.nanmax(np.abs(written))
            expected = getattr(scanned, name)
            np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-6 * scale)
        for name in TOTALS:
            np.testing.assert_allclose(
                arrays(finished.folder)[name], getattr(scanned, name), rtol=1e-5
            )


def test_te_is_the_source_run_minus_the_base_run(finished):
    found = arrays(finished.folder)
    np.testing.assert_allclose(found["te"], found["y_source"] - found["y_base"], rtol=1e-5)
    assert (np.abs(found["te"]) > 1e-3).all()


def test_tokens_count_from_the_prompts_end_and_are_nan_beyond_its_aligned_positions(finished):
    found = arrays(finished.folder)
    for index, length in enumerate(ALIGNED):
        for name in ("nie", "tie"):
            token = found[f"token/{name}"][index]
            assert np.isfinite(token[..., :length]).all() and np.isnan(token[..., length:]).all()
        done = found["token/done"][index]
        assert (done[..., :length] == results.EXACT).all()
        assert (done[..., length:] == results.NOT_RUN).all()
    # Patching the residual of the last token of the last layer is the total effect.
    np.testing.assert_allclose(found["token/nie"][:, -1, 0, 0], found["te"], rtol=1e-5)
    for name in set(UNITS) - {"token"}:
        assert (found[f"{name}/done"] == results.EXACT).all()


def test_tokens_are_nan_where_alignment_from_the_start_leaves_the_end_out(asked, tmp_path):
    # 7 and 6 tokens: the base prompt's last one has no partner.
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[1])
    question = {"align": "start", "positions": "prompt", "granularity": ("token",)}
    found = arrays(sweep.run(to(asked, tmp_path, pairs=str(pairs), **question)).folder)
    assert found["token/nie"].shape == (1, LAYERS, 3, 7)
    assert np.isnan(found["token/nie"][..., 0]).all()
    assert (found["token/done"][..., 0] == results.NOT_RUN).all()
    assert np.isfinite(found["token/nie"][..., 1:]).all()


# A run that is stopped.


@pytest.fixture
def scans(monkeypatch):
    """Counts the pairs that are scanned: (id of the pair, granularities)."""
    calls, scan_pair = [], effects.scan_pair

    def counted(decoder, pair, question, granularities, **options):
        calls.append((pair.id, tuple(granularities)))
        return scan_pair(decoder, pair, question, granularities, **options)

    monkeypatch.setattr(effects, "scan_pair", counted)
    return calls


def assert_same_arrays(folder, expected):
    found, wanted = arrays(folder), arrays(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_a_run_that_is_stopped_between_pairs_goes_on_with_the_missing_ones(
    asked, finished, scans, tmp_path, monkeypatch
):
    settings = to(asked, tmp_path)
    with monkeypatch.context() as patch:
        original = effects.scan_pair

        def stopped(decoder, pair, *arguments, **options):
            if pair.id == "longer":
                raise KeyboardInterrupt
            return original(decoder, pair, *arguments, **options)

        patch.setattr(effects, "scan_pair", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(settings)

    out = tmp_path / "out"
    assert described(out)["finished"] is False
    assert {path.name for path in out.iterdir()} == {"run.json", "effects.zarr"}
    done = arrays(out)["layer/done"]
    assert (done[0] == results.EXACT).all() and (done[1:] == results.NOT_RUN).all()
    assert np.isnan(arrays(out)["te"][1:]).all()

    scans.clear()
    sweep.run(settings)
    assert scans == [("longer", tuple(UNITS)), ("short", tuple(UNITS))]
    assert described(out)["finished"] is True
    assert (out / "summary.parquet").exists() and (out / "report.html").exists()
    assert_same_arrays(out, finished.folder)


def test_a_run_that_is_stopped_inside_a_pair_goes_on_with_its_missing_granularities(
    asked, finished, scans, tmp_path, monkeypatch
):
    settings = to(asked, tmp_path)
    with monkeypatch.context() as patch:
        original = results.Results.write

        def stopped(self, index, granularity, *effects_of_pair):
            if (index, granularity) == (1, "token"):
                raise KeyboardInterrupt
            original(self, index, granularity, *effects_of_pair)

        patch.setattr(results.Results, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(settings)
    scans.clear()
    sweep.run(settings)
    assert scans == [("longer", ("token", "neuron")), ("short", tuple(UNITS))]
    assert_same_arrays(tmp_path / "out", finished.folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be spoiled."""
    return shutil.copytree(finished.folder, tmp_path / "out")


def test_a_finished_run_is_not_computed_again(asked, copied, scans, finished, tmp_path):
    sweep.run(to(asked, tmp_path))
    assert scans == []
    assert_same_arrays(copied, finished.folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("positions", "prompt"),
        ("metric", "response_logprob_diff"),
        ("group_size", 3),
        ("granularity", ("layer",)),
        ("harmful_tokens", ("1",)),
        ("dtype", "bfloat16"),
        ("matmul_precision", "default"),
    ],
)
def test_another_setting_in_the_same_folder_is_refused_by_name(
    name, value, asked, copied, scans, tmp_path
):
    before = described(copied)
    with pytest.raises(InputError, match=f"another setting: {name} was .*--overwrite"):
        sweep.run(to(asked, tmp_path, **{name: value}))
    assert scans == [] and described(copied) == before


@pytest.mark.parametrize(
    "change", [{"prompt_ids": [2, 2, 3, 4, 5]}, {"safe_ids": [9]}, {"prompt_span": [1, 2]}]
)
def test_other_pairs_under_the_same_name_are_refused(change, asked, copied, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[0] | change, *PAIRS[1:])
    run = described(copied) | {"pairs": str(pairs)}
    (copied / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="another setting: pairs_hash was"):
        sweep.run(to(asked, tmp_path, pairs=str(pairs)))


def test_other_weights_under_the_same_name_are_refused(asked, copied, tmp_path):
    tiny.save(tmp_path / "model", seed=1, **SHAPE)
    run = described(copied) | {"model": str(tmp_path / "model")}
    (copied / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="another setting: weights_hash was"):
        sweep.run(to(asked, tmp_path, model=str(tmp_path / "model")))


def test_a_run_whose_report_failed_is_not_finished(asked, tmp_path, monkeypatch):
    settings = to(asked, tmp_path, granularity=("layer",))
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            sweep.run(settings)
    assert described(tmp_path / "out")["finished"] is False
    assert described(sweep.run(settings).folder)["finished"] is True


def test_overwrite_starts_again(asked, copied, scans, tmp_path):
    sweep.run(to(asked, tmp_path, overwrite=True, granularity=("layer",)))
    assert [pair for pair, _ in scans] == ["even", "longer", "short"]
    assert set(arrays(copied)) == {*TOTALS, "layer/nie", "layer/tie", "layer/done"}
    assert not (copied / "figures" / "neuron.png").exists()


# A report that is written again.


def test_a_report_needs_neither_the_model_nor_the_pairs(copied, tmp_path):
    gone = {"model": str(tmp_path / "gone"), "pairs": str(tmp_path / "gone.jsonl")}
    (copied / "run.json").write_text(json.dumps(described(copied) | gone))
    (copied / "report.html").unlink()
    sweep.report_again(str(copied), show_text=False)
    assert str(tmp_path / "gone") in (copied / "report.html").read_text()
    with pytest.raises(InputError, match="gone"):
        sweep.report_again(str(copied), show_text=True)


def test_text_is_not_shown_where_the_pairs_are_others(asked, copied, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", *PAIRS[:2])
    (copied / "run.json").write_text(json.dumps(described(copied) | {"pairs": str(pairs)}))
    with pytest.raises(InputError, match="no longer has pair 'short'"):
        sweep.report_again(str(copied), show_text=True)


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
    run = sweep.run(settings)
    assert described(run.folder)["skipped"] == 4
    assert run.pair_ids == ("even", "longer", "short")
    assert_same_arrays(run.folder, finished.folder)
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
    with pytest.raises(data.DataError, match=f"^{pairs}:4: "):
        sweep.run(to(asked, tmp_path, pairs=str(pairs)))
    assert scans == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [BAD_PAIRS[:1], BAD_PAIRS[1:]])
def test_a_file_without_a_usable_pair_is_refused_though_bad_pairs_may_be_skipped(
    bad, asked, tmp_path, capsys
):
    pairs = write(tmp_path / "pairs.jsonl", *bad)
    with pytest.raises(data.DataError, match=str(pairs)):
        sweep.run(to(asked, tmp_path, pairs=str(pairs), skip_bad_pairs=True))
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
        ({"joint_size": 1, "group_size": 2}, "--joint_size needs"),
        ({"joint_size": 1, "granularity": ("layer",)}, "--joint_size needs"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_model_is_loaded(
    changes, said, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(InputError) as caught:
        sweep.run(to(asked, tmp_path, **changes))
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["pairs.jsonl", "pairs.jsonl/out", "taken"])
def test_a_folder_that_cannot_be_the_results_is_refused(out, asked, scans, tmp_path):
    write(tmp_path / "pairs.jsonl", *PAIRS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=out):
        sweep.run(dataclasses.replace(asked, out=str(tmp_path / out), overwrite=True))
    assert scans == [] and (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


# The joint set.


def test_a_joint_set_is_searched_and_reported(asked, tmp_path):
    # A single differing token: the total effect is large.
    pairs = write(
        tmp_path / "pairs.jsonl",
        {"prompt_ids": [1], "counterfactual_ids": [2], "harmful_ids": [7], "safe_ids": [10]},
    )
    settings = to(
        asked, tmp_path, pairs=str(pairs), granularity=("neuron",), joint_size=2, joint_pairs=1
    )
    run = sweep.run(settings)
    joint = described(run.folder)["joint"]
    picked = [tuple(unit) for unit in joint["picked"]]
    assert len(set(picked)) == len(joint["share_nie"]) == len(joint["share_tie"]) == 2
    # Each share is the joint effect of the set so far.
    sets = np.zeros((2, LAYERS, NEURONS), bool)
    sets[0][picked[0]] = sets[1][picked[0]] = sets[1][picked[1]] = True
    decoder, _ = models.load(asked.model)
    with jax.default_matmul_precision("highest"):
        effect = definition.joint_pair(
            decoder, data.read(pairs)[0], Question(LogitDifference()), sets
        )
    te = effect.y_source - effect.y_base
    np.testing.assert_allclose(joint["share_nie"], effect.nie["joint"] / te, rtol=1e-4)
    np.testing.assert_allclose(joint["share_tie"], effect.tie["joint"] / te, rtol=1e-4)
    # A set of one is a single unit, whose effects the engine has measured too.
    for name, single in zip(("nie", "tie"), run.effects("neuron"), strict=True):
        np.testing.assert_allclose(joint[f"share_{name}"][0], single[0][picked[0]] / te, rtol=1e-3)
    assert (run.folder / "figures" / "joint.png").exists()


def test_no_joint_set_is_formed_where_the_total_effect_is_too_small(
    asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(estimands, "greedy_set", lambda *_, **__: pytest.fail("was searched"))
    same = PAIRS[0] | {"counterfactual_ids": PAIRS[0]["prompt_ids"]}
    pairs = write(tmp_path / "pairs.jsonl", same)
    run = sweep.run(to(asked, tmp_path, pairs=str(pairs), granularity=("neuron",), joint_size=2))
    assert described(run.folder)["finished"] is True and "joint" not in run.run
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
    settings = Settings(str(text_model), str(pairs), str(out), granularity, show_text=show_text)
    sweep.run(settings)
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
        found.append(sweep.run(Settings(str(text_model), str(pairs), out, ("layer",), chat=chat)))
    assert_same_arrays(found[1].folder, found[0].folder)
    assert "--chat wraps them" not in capsys.readouterr().err


def test_first_tokens_may_be_given_as_ids_or_as_words(text_model, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", TEXT_PAIR)
    found = []
    for name, harmful in (("ids", ("13", "8")), ("words", ("yes it", "to", "yes"))):
        settings = Settings(
            str(text_model),
            str(pairs),
            str(tmp_path / name),
            ("layer",),
            harmful_tokens=harmful,
            safe_tokens=("14",),
        )
        found.append(sweep.run(settings))
    assert_same_arrays(found[1].folder, found[0].folder)


def test_first_tokens_as_words_need_a_tokenizer(asked, tmp_path):
    with pytest.raises(InputError, match="--safe_tokens=no: the checkpoint has no tokenizer"):
        sweep.run(to(asked, tmp_path, harmful_tokens=("1",), safe_tokens=("no",)))
    assert not (tmp_path / "out").exists()
