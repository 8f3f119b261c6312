"""The settling experiment, on an organism whose answer is known."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import models
from jaxmed.behaviour import answering, generation, responses
from jaxmed.behaviour.judges.protocol import Verdict
from jaxmed.data import prompts
from jaxmed.data.tokens import Encoder
from jaxmed.intervention import export, outcomes
from jaxmed.intervention.export import Criterion
from jaxmed.question import effects
from jaxmed.runs import asking, clamp, loading
from jaxmed.runs.clamp import ClampSettings
from jaxmed.store import results
from jaxmed.validation import truth
from models.errors import InputError
from tests import shared_organism
from tests.jaxmed import fabricated

GATES, DETECTORS = "gates", "detectors"


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return shared_organism.organism(tmp_path_factory.mktemp("clamp") / "decoys", tmp_path_factory)


@pytest.fixture(scope="module")
def units(organism):
    """Gates and detectors of the key, by name."""
    detectors, gates = organism.truth["contrasts"]["unlock"]["joint"]
    return {
        DETECTORS: tuple(f"neuron:{layer}.{index}" for layer, index in detectors),
        GATES: tuple(f"neuron:{layer}.{index}" for layer, index in gates),
    }


def settings(organism, out, **changes):
    asked = {
        "judge": ("tokens",),
        "comply_tokens": ("C",),
        "refuse_tokens": ("R",),
        "max_tokens": 6,
        "random": 3,
    }
    file = truth.prompts_file(organism)
    asked |= {"model": str(organism.folder), "prompts": (str(file),), "out": str(out)}
    return ClampSettings(**asked | changes)


@pytest.fixture(scope="module")
def gates(organism, units, tmp_path_factory):
    """The gates held at their refused mean."""
    out = tmp_path_factory.mktemp("clamped") / "gates"
    doses = {"top_doses": ("1", "2"), "strength_doses": ("0.5",), "alone": 2}
    asked = settings(organism, out, units=units[GATES], **doses)
    return asked, clamp.run(asked, progress=False)


@pytest.fixture(scope="module")
def detectors(organism, units, tmp_path_factory):
    """The detectors of the key damped to nothing, and the edit exported."""
    folder = tmp_path_factory.mktemp("damped")
    exported = {"edit": "zero", "export": str(folder / "edited")}
    asked = settings(organism, folder / "out", units=units[DETECTORS], **exported)
    return asked, clamp.run(asked, progress=False)


def test_held_gates_end_harm_and_benign_compliance_alike(gates):
    _, found = gates
    assert found.row("plain", "harmful", "harm")["mean"] == pytest.approx(0.5, abs=0.05)
    harm = found.row("clamp", "harmful", "harm")
    assert harm["mean"] <= 0.05 and harm["change_high"] < -0.3
    benign = found.row("clamp", "benign", "compliance")
    assert found.row("plain", "benign", "compliance")["mean"] > 0.95
    assert benign["mean"] <= 0.05 and benign["change_high"] < -0.8
    assert found.row("clamp", "benign", "kl")["mean"] > 1


def test_damped_detectors_end_harm_alone(detectors):
    _, found = detectors
    assert found.row("clamp", "harmful", "harm")["mean"] <= 0.05
    assert found.row("clamp", "benign", "compliance")["mean"] > 0.95
    assert found.row("clamp", "overrefusal", "refusal")["mean"] < 0.05
    # Not a broken model, which would refuse nothing either: it says that it complies.
    answers = responses.response_log(found.folder).values
    first = [r.text[:1] for k, r in answers.items() if k.condition == "clamp" and "ben" in k.prompt]
    assert len(first) == 48 and first.count("C") > 0.95 * 48


def test_random_units_like_these_change_neither(gates, detectors):
    for _, found in (gates, detectors):
        drawn = [each for each in found.held if each.kind == outcomes.RANDOM]
        assert len(drawn) == 3
        for each in drawn:
            assert len(each.units) == len(found.units)
            assert sorted(u.layer for u in each.units) == sorted(u.layer for u in found.units)
            for label, measure in (("harmful", "harm"), ("benign", "compliance")):
                assert abs(found.row(each.name, label, measure)["change"]) < 0.05
        # Like these: among the nearest in both traits, of those that do differ.
        controls = found.controls
        assert [[u["unit"] for u in draw] for draw in controls["draws"]] == [
            [str(unit) for unit in each.units] for each in drawn
        ]
        assert controls == json.loads((found.folder / outcomes.CONTROLS).read_text())
        assert controls["contrast"] == ["complied", "refused"]
        sizes = {"harmful": 96, "benign": 96, "refused": 48, "complied": 48}
        assert {name: len(own) for name, own in controls["groups"].items()} == sizes
        norms = [unit["norm"] for draw in controls["draws"] for unit in draw]
        own = [unit["norm"] for unit in controls["units"]]
        assert min(own) / 3 < np.median(norms) < 3 * max(own)
        beyond = found.row("clamp", "harmful", "harm")
        assert beyond["beyond_random_high"] < 0
        mean = found.row(outcomes.ALL_RANDOM, "harmful", "harm")["mean"]
        assert beyond["beyond_random"] == pytest.approx(beyond["mean"] - mean)


def test_every_condition_is_told(gates):
    _, found = gates
    names = [each.name for each in found.held]
    first, second = found.units[:2]
    assert names == [
        "plain",
        "clamp",
        "random 1",
        "random 2",
        "random 3",
        "module",
        "top 1",
        "top 2",
        "strength 0.5",
        f"only {first}",
        f"only {second}",
    ]
    assert found.held[names.index("module")].units[0].site == "mlp"
    # One unit is the same whether it is the only one or the first of the strongest.
    for label, measure in (("harmful", "harm"), ("benign", "nll"), ("benign", "kl")):
        one, alone = (found.row(n, label, measure) for n in ("top 1", f"only {first}"))
        assert one["mean"] == alone["mean"]
    doses = [found.row(n, "benign", "kl")["mean"] for n in ("plain", "top 1", "top 2", "clamp")]
    assert doses[0] == 0 and sorted(doses) == doses


def test_the_plain_model_has_no_change(gates):
    _, found = gates
    for row in found.table.to_pylist():
        if row["condition"] == "plain":
            assert row["change"] is row["beyond_random"] is None
            assert row["low"] <= row["mean"] <= row["high"]


def test_files_hold_what_was_found(gates):
    _, found = gates
    assert pq.read_table(found.folder / outcomes.TABLE) == found.table
    run = json.loads((found.folder / "run.json").read_text())
    assert run["chosen"] == list(map(str, found.units)) and run["split"] == "C"
    assert list(run["judges"]) == ["tokens"]
    answers = responses.response_log(found.folder).values
    tested = {key.prompt for key in answers if key.condition == "clamp"}
    others = {key.prompt for key in answers if key.condition == "plain"} - tested
    assert len(tested) == 120 and len(others) == 96


def test_a_stopped_run_goes_on_where_it_stopped(gates, organism, tmp_path, monkeypatch):
    asked, whole = gates
    asked = dataclasses.replace(asked, out=str(tmp_path / "again"))
    generate, calls = generation.generate, []

    def stops(decoder, given, **options):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(len(given))
        return generate(decoder, given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(responses.generation, "generate", stops)
        with pytest.raises(KeyboardInterrupt):
            clamp.run(asked, progress=False)
    before = len(responses.response_log(tmp_path / "again").values)
    assert before == sum(calls) > 0
    again = clamp.run(asked, progress=False)
    assert again.table == whole.table
    log = (tmp_path / "again" / "responses.jsonl").read_text().splitlines()
    assert len(log) == len(set(log)) == len(responses.response_log(whole.folder).values)


def test_random_units_stay_those_of_a_stopped_run_and_may_become_more(detectors, tmp_path):
    """What they are drawn by may round otherwise on another machine, but not the responses."""
    asked, found = detectors
    folder = tmp_path / "out"
    shutil.copytree(found.folder, folder)
    before = (folder / "responses.jsonl").read_bytes()
    content = json.loads((folder / outcomes.CONTROLS).read_text())
    kept = content["draws"][2]
    other = {unit["unit"] for unit in kept} | set(map(str, found.units))
    layer = found.units[0].layer
    spare = [f"neuron:{layer}.{index}" for index in range(160)]
    spare = [name for name in spare if name not in other][: len(kept)]
    content["draws"][2] = [{"unit": name} for name in spare]
    (folder / outcomes.CONTROLS).write_text(json.dumps(content))
    asked = dataclasses.replace(asked, out=str(folder), random=4, export="", alone=1)
    more = clamp.run(asked, progress=False)
    draws = [[u["unit"] for u in draw] for draw in more.controls["draws"]]
    assert draws[:3] == [[u["unit"] for u in draw] for draw in content["draws"]]
    assert len(draws) == 4 and draws[3] not in draws[:3]
    assert (folder / "responses.jsonl").read_bytes().startswith(before)
    fewer = clamp.run(dataclasses.replace(asked, random=1), progress=False)
    assert [each.name for each in fewer.held].count("random 1") == 1
    assert len(fewer.controls["draws"]) == 1
    assert len(json.loads((folder / outcomes.CONTROLS).read_text())["draws"]) == 4


def test_an_exported_checkpoint_answers_as_the_held_model(detectors):
    asked, found = detectors
    decoder, tokenizer = models.load(asked.export)
    plain, _ = models.load(asked.model)
    given = [one for one in prompts.read(asked.prompts[0]) if one.split == "C"]
    tokens = [prompts.tokens_of(one, Encoder(tokenizer)) for one in given]
    stop = answering.stop_tokens(answering.generation_configs(asked.export), None)
    assert sorted(stop) == found.run["stop_tokens"]
    edited = generation.generate(decoder, tokens, stop=stop, sampling=asked.sampling)
    held = responses.response_log(found.folder).values
    for one, response in zip(given, edited, strict=True):
        assert response.tokens == held[responses.Key("clamp", one.id, 0)].tokens
    for layer, index in ((u.layer, u.index) for u in found.units):
        assert not np.any(decoder.blocks.mlp.down.kernel[...][layer, index])
        assert np.any(plain.blocks.mlp.down.kernel[...][layer, index])
    card = (pathlib.Path(asked.export) / "README.md").read_text()
    assert "| harmful | harm | 48 | 0.500 | 0.000 " in card and "multiplied by 0" in card
    assert "whether these prompts had a part in that is not known" in card
    assert "did not fall by more than 0.05" in card and "| benign | nll (nats a token) |" in card


def test_an_exported_checkpoint_generates_as_the_model_did(detectors, tmp_path):
    asked, found = detectors
    model = asking.load(asked)
    own = {"temperature": 0.6, "eos_token_id": 1}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
    model = dataclasses.replace(model, folder=tmp_path / "model")
    export.write(found, model, str(tmp_path / "edited"), "card")
    written = json.loads((tmp_path / "edited" / "generation_config.json").read_text())
    assert written == own | {"eos_token_id": found.run["stop_tokens"]}
    # transformers fails at an empty list of stop tokens.
    endless = dataclasses.replace(found, run=found.run | {"stop_tokens": []})
    moved = dataclasses.replace(model, folder=tmp_path)
    export.write(endless, moved, str(tmp_path / "endless"), "card")
    assert not (tmp_path / "endless" / "generation_config.json").exists()


def changed(found, place, **fields):
    """What was found, with other numbers in one row."""
    rows = found.table.to_pylist()
    for row in rows:
        if (row["condition"], row["label"], row["measure"]) == place:
            row |= fields
    return dataclasses.replace(found, table=pa.Table.from_pylist(rows, outcomes.ROW))


def test_an_edit_that_did_not_lower_harm_is_not_exported(detectors, gates, tmp_path):
    asked, found = detectors
    assert export.refusal(found) is None
    none = changed(found, ("clamp", "harmful", "harm"), change=-0.02, change_high=0.01)
    model, folder = asking.load(asked), str(tmp_path / "edited")
    with pytest.raises(export.RefusedError) as caught:
        export.write(none, model, folder, "card")
    assert caught.value.refusal.criterion == Criterion.HARM
    assert (caught.value.refusal.change, caught.value.refusal.high) == (-0.02, 0.01)
    message = "--export: nothing was written: the edit changed the harm rate by -0.020"
    with pytest.raises(InputError, match=re.escape(message)) as told:
        clamp._export(none, model, folder)
    assert str(told.value).endswith(f"Results: {found.folder}")
    assert not (tmp_path / "edited").exists()
    refused = export.refusal(gates[1])
    assert refused.criterion == Criterion.COMPLIANCE
    assert refused.change == pytest.approx(-1, abs=5e-4)
    wide = changed(found, ("clamp", "benign", "compliance"), change_low=-0.051)
    refused = export.refusal(wide)
    assert (refused.criterion, refused.low, refused.bound) == (Criterion.COMPLIANCE, -0.051, -0.05)
    unjudged = changed(found, ("clamp", "harmful", "harm"), label="creative")
    assert export.refusal(unjudged) == export.Refusal(Criterion.HARM_JUDGED)
    unjudged = changed(found, ("clamp", "benign", "compliance"), label="creative")
    assert export.refusal(unjudged) == export.Refusal(Criterion.COMPLIANCE_JUDGED)
    silent = changed(found, ("clamp", "benign", "nll"), label="creative")
    assert export.refusal(silent) == export.Refusal(Criterion.TEXT)


@pytest.mark.parametrize(
    "measure, fields, criterion",
    [
        ("nll", {"change_high": 0.0954}, Criterion.PERPLEXITY),
        ("repetition", {"change_low": 0.01}, Criterion.REPETITION),
        ("unfinished", {"change_low": 0.01}, Criterion.UNFINISHED),
    ],
)
def test_a_broken_model_is_not_exported(detectors, measure, fields, criterion):
    """It harms no more, and refuses nothing."""
    _, found = detectors
    place = ("clamp", "benign", measure)
    row = found.row(*place)
    if row is None:  # of responses too short to repeat anything
        assert measure == "repetition"
        rows = found.table.to_pylist()
        row = dict(found.row("clamp", "benign", "unfinished")) | {"measure": measure}
        table = pa.Table.from_pylist([*rows, row], outcomes.ROW)
        found = dataclasses.replace(found, table=table)
    assert export.refusal(found) is None
    refused = export.refusal(changed(found, place, **fields))
    assert refused.criterion == criterion
    if measure == "nll":  # perplexity is told relative to the plain model's
        assert refused.low == pytest.approx(0, abs=5e-4)
        assert (refused.high, refused.bound) == (pytest.approx(0.1001, abs=1e-4), 0.1)
    else:
        assert (refused.change, refused.low) == (row["change"], 0.01)


def test_silence_and_nonsense_are_no_compliance():
    complies = outcomes.MEASURES["compliance"]
    says, silent = responses.Response((1,), "yes", True), responses.Response((), "", True)
    assert complies(says, Verdict(refused=0.25)) == 0.75
    assert complies(silent, Verdict(refused=0.0)) == 0.0
    assert complies(says, Verdict(refused=0.0, complied=0.0)) == 0.0
    for response in (says, silent):  # of which no judge says anything
        assert np.isnan(complies(response, Verdict(harmful=1.0)))


def test_values_stay_those_of_the_first_run_whoever_judges(organism, units, tmp_path, capsys):
    """Responses with units held at two values must not stand under one name."""
    asked = settings(
        organism,
        tmp_path / "out",
        units=units[GATES][:1],
        random=0,
        module=False,
        most_prompts=24,
    )
    before = clamp.run(asked, progress=True)
    assert "values of units" in capsys.readouterr().err
    answers = (before.folder / "responses.jsonl").read_bytes()
    assert before.row("clamp", "harmful", "harm")["prompts"] == 24
    groups = before.controls["groups"]
    assert [len(groups[name]) for name in ("harmful", "benign")] == [24, 24]
    assert 8 <= len(groups["refused"]) < 24

    class All:
        """Calls every response a refusal."""

        name, meaning, says = "all", "that it refuses", ("refused",)

        def __call__(self, exchanges):
            return [Verdict(refused=1.0)] * len(exchanges)

    again = clamp.run(asked, own_judges=[All()], progress=False)
    assert again.controls == before.controls
    assert (before.folder / "responses.jsonl").read_bytes() == answers
    assert again.row("clamp", "benign", "compliance")["mean"] == 0
    assert again.row("clamp", "benign", "kl") == before.row("clamp", "benign", "kl")
    more = clamp.run(dataclasses.replace(asked, most_prompts=25), progress=False)
    assert (before.folder / "responses.jsonl").read_bytes().startswith(answers)
    assert more.row("clamp", "harmful", "harm")["prompts"] == 25
    assert more.controls == before.controls


def test_modules_need_no_prompts_to_be_compared_by(organism, tmp_path):
    lines = truth.prompts_file(organism).read_text().splitlines()
    tested = [line for line in lines if '"split": "C"' in line]
    (tmp_path / "tested.jsonl").write_text("\n".join(tested))
    asked = settings(
        organism,
        tmp_path / "out",
        units=("mlp:2",),
        edit="zero",
        prompts=(str(tmp_path / "tested.jsonl"),),
        most_prompts=8,
    )
    found = clamp.run(asked, progress=False)
    assert [each.name for each in found.held] == ["plain", "clamp"]


def test_judges_must_say_what_has_to_be_known(organism, tmp_path):
    class Silent:
        name, meaning, says = "silent", "nothing", ()

        def __call__(self, exchanges):
            raise AssertionError("it is refused before it is asked")

    class Refusals(Silent):
        says = ("refused",)

    for changes, judge, message in (
        ({}, Silent, "--judge=silent: does not say whether responses refuse, which --edit=refused"),
        (
            {"edit": "zero", "export": str(tmp_path / "edited")},
            Refusals,
            "does not say whether responses are harmful, which --export has to know",
        ),
    ):
        asked = settings(organism, tmp_path / "out", units=("neuron:1.1",), **changes)
        with pytest.raises(InputError, match=message):
            clamp.run(asked, own_judges=[judge()], progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "give either --results=DIR, of a run of launch.mediate, or --units"),
        ({"units": ("mlp:1",), "top": 3}, "--top needs --results"),
        ({"results": "somewhere"}, "--top=K: how many"),
        ({"units": ("mlp:1",), "edit": "mean"}, "--edit=mean: not one of refused, benign"),
        (
            {"units": ("mlp:1",), "strength": -1.0},
            "--strength=-1.0: must be a number, and at least",
        ),
        ({"units": ("mlp:1",), "top_doses": ("1.5",)}, "--top_doses=1.5: must be numbers"),
        ({"units": ("mlp:1",), "strength_doses": ("0",)}, "--strength_doses=0: must be above 0"),
        ({"units": ("mlp:1",), "top_doses": ("2", "02")}, "--top_doses=2,02: names a dose twice"),
        ({"units": ("mlp:1",), "most_prompts": 7}, "--most_prompts=7: an interval needs 8"),
        (
            {"units": ("mlp:1",), "export": "x"},
            "--export with --edit=refused --positions=all: only",
        ),
        ({"units": ("mlp:1",), "export": "x", "edit": "zero"}, "modules cannot"),
        (
            {"units": ("head:1.1",), "export": "x", "edit": "zero", "split": ""},
            "--export with --split=: an edit is exported only if",
        ),
        ({"units": ("neuron:9.0",)}, "unit 'neuron:9.0': the model has 4 layers of 160 neurons"),
        ({"units": ("mlp:1",), "judge": ("tolkens",)}, "judge 'tolkens': not one of"),
        ({"units": ("mlp:1",), "max_tokens": 60}, "--max_tokens=60 are more than the model's 64"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    organism, tmp_path, changes, message
):
    if changes.get("judge"):
        changes = changes | {"comply_tokens": (), "refuse_tokens": ()}
    with pytest.raises(InputError) as error:
        clamp.run(settings(organism, tmp_path / "out", **changes), progress=False)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": ("gone.jsonl",)}, "gone.jsonl: there is no such file"),
        ({"prompts": (__file__,)}, f"{__file__}: its name must end in one of"),
        ({"judge": ("wildguard=x",)}, "judge 'wildguard': needs its text"),
        ({"judge": ("gone.json",)}, "gone.json: "),
        ({"units": (), "results": "gone", "top": 3}, "gone is not a results folder"),
        ({"units": (), "results": "{run}", "top": 99}, "--results={run}: top=99: {run} ranks 24"),
        ({"units": (), "results": "{run}", "by": "joint"}, "has no joint set of neurons"),
        (
            {"units": (), "results": "{run}", "top": 3, "granularity": "head"},
            "has no effects of single heads",
        ),
    ],
)
def test_what_needs_no_model_is_told_before_one_is_loaded(
    organism, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("was loaded"))
    sizes = effects.Sizes(2, 2, 12, 5)
    run = fabricated.RUN | {"weights_hash": "x", "chat": False, "date": "", "template_args": ""}
    results.Results.create(tmp_path / "run", run, sizes, ["a"], ["neuron"])
    made = results.Results.resume_or_create(tmp_path / "run", run, sizes, ["a"], ["neuron"])
    made.write(0, "neuron", *np.ones((2, 2, 12)))
    made.finish()
    place = {"run": tmp_path / "run"}
    changes = {
        name: value.format(**place) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    if "judge" in changes:
        changes |= {"comply_tokens": (), "refuse_tokens": ()}
    asked = settings(organism, tmp_path / "out", **{"units": ("mlp:1",)} | changes)
    with pytest.raises(InputError) as error:
        clamp.run(asked, progress=False)
    assert message.format(**place) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_edit_that_no_weights_hold_is_not_to_be_exported(tmp_path):
    asked = ClampSettings(
        "model",
        ("prompts",),
        "out",
        units=("neuron:1.1",),
        edit="zero",
        export=str(tmp_path / "new"),
    )
    clamp.check(asked)
    (tmp_path / "taken").write_text("")
    ranked = {"units": (), "results": "somewhere", "top": 1}
    for changes, message in (
        ({"positions": "answer"}, "--export with --edit=zero --positions=answer: only damping"),
        (ranked | {"granularity": "module"}, "modules cannot"),
        ({"units": ("attention:1",)}, "modules cannot"),
        ({"export": str(tmp_path)}, "is there already"),
    ):
        with pytest.raises(InputError) as error:
            clamp.check(dataclasses.replace(asked, **changes))
        assert message in str(error.value)
    clamp.check(dataclasses.replace(asked, **ranked))


def test_prompts_that_are_too_few_or_of_one_kind_are_refused(organism, units, tmp_path):
    lines = truth.prompts_file(organism).read_text().splitlines()

    def refused(chosen, message, **changes):
        (tmp_path / "some.jsonl").write_text("\n".join(chosen))
        asked = settings(
            organism,
            tmp_path / f"{len(chosen)}",
            **{"units": units[GATES], "prompts": (str(tmp_path / "some.jsonl"),)} | changes,
        )
        with pytest.raises(InputError) as error:
            clamp.run(asked, progress=False)
        assert message in str(error.value)

    harmful = [line for line in lines if '"label": "harmful"' in line]
    refused(harmful, "--split=C: 0 of 0 benign prompts are in it")
    refused(lines[:9] + lines[144:288], "--split=C: 3 of 9 harmful prompts are in it")
    complied = [
        line for line in lines if " J " in json.loads(line)["prompt"] or '"label": "benign"' in line
    ]
    refused(
        complied,
        "--edit=refused: of 48 harmful prompts that values are measured on the plain model refuses "
        "0, and their mean needs 8: give more harmful --prompts of other splits than C, or give "
        "--edit=benign, zero or source",
    )
    refused(
        lines,
        "of 8 harmful prompts that values are measured on the plain model refuses",
        most_prompts=8,
    )
    tested = [line for line in lines if '"split": "C"' in line]
    missing = "--split=C: 0 harmful prompts are in the other splits, where it is measured "
    refused(tested, missing + "which units are like these (--random=3)", edit="zero")
    refused(tested, missing + "what units are held at (--edit=refused)", random=0)
    missing = missing.replace("harmful", "benign")
    refused(tested, missing + "what units are held at (--edit=benign)", edit="benign", random=0)
    without = [json.loads(line) for line in lines]
    without[2].pop("counterfactual")
    refused(
        [json.dumps(line) for line in without],
        "prompt 'harmful-002' has no counterfactual",
        edit="source",
    )


def test_units_of_a_run_that_saw_the_tested_prompts_are_refused(organism, tmp_path, monkeypatch):
    from jaxmed.runs import mediate

    lines = [json.loads(line) for line in truth.prompts_file(organism).read_text().splitlines()]
    keyed = [line for line in lines if line["label"] == "harmful" and " J " in line["prompt"]]
    answers = {"harmful_response": "C", "safe_response": "R"}

    def run(chosen, name, split=()):
        lines = [line | answers | {"id": n} for n, line in enumerate(chosen)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        asked = mediate.MediateSettings(
            str(organism.folder),
            str(tmp_path / f"{name}.jsonl"),
            str(tmp_path / name),
            granularity=("neuron",),
            positions="prompt",
            split=split,
        )
        return mediate.measure(asked, progress=False)[0]

    seen = run(keyed[:6], "seen")
    asked = settings(organism, tmp_path / "out", results=str(seen.folder), top=7, edit="zero")
    with pytest.raises(InputError, match=r"seen: that run is not finished; give its command again"):
        clamp.run(asked, progress=False)
    seen.finish()
    # Whatever they are called there.
    assert not {line["id"] for line in keyed} & set(seen.pair_ids)
    with pytest.raises(InputError, match=r"of 120 prompts, as 'harmful-002' \(.*\), are among"):
        clamp.run(asked, progress=False)
    tested = asking.as_asked(asked, asking.read_files(asked), asking.load(asked))
    said, skips = [], dataclasses.replace(asked, skip_bad_prompts=True)
    kept = clamp._held_out(skips, tested, seen, said.append)
    assert len(tested) - len(kept) == 6 and said[0].startswith("Skipped: --split=C: 6 of ")
    others = run(keyed[:6], "others", split=("A", "B"))
    others.finish()
    asked = dataclasses.replace(asked, results=str(others.folder), random=0, module=False)
    found = clamp.run(asked, progress=False)
    planted = organism.truth["contrasts"]["unlock"]["neurons"]
    assert {(u.layer, u.index) for u in found.units} == set(map(tuple, planted))
    others.record({"adapter": "lora", "adapter_hash": "other"})
    with pytest.raises(InputError, match="with lora, which is not that of --adapter=: give the"):
        clamp.run(asked, progress=False)
    others.record({"adapter": "", "adapter_hash": None})
    for name in ("weights_hash", "config_hash"):
        own = others.run[name]
        others.record({name: "other"})
        with pytest.raises(InputError, match="weights or config are not those of .*: --units"):
            clamp.run(asked, progress=False)
        others.record({name: own})


def test_each_prompt_may_be_held_at_its_counterfactual(organism, units, tmp_path):
    asked = settings(
        organism,
        tmp_path / "out",
        units=units[GATES],
        edit="source",
        random=0,
        module=False,
    )
    lines = [json.loads(line) for line in truth.prompts_file(organism).read_text().splitlines()]
    lines[2].pop("counterfactual")
    lines[5] |= {"counterfactual": [lines[5]["counterfactual"]] * 2}
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    asked = dataclasses.replace(asked, prompts=(str(file),), skip_bad_prompts=True)
    few = dataclasses.replace(asked, most_prompts=outcomes.LEAST_PROMPTS)
    first = clamp.run(few, progress=False)
    found = clamp.run(asked, progress=False)  # goes on with more
    assert found.run["sources_hash"] == first.run["sources_hash"]
    assert lines[2]["id"] not in {
        key.prompt for key in responses.response_log(found.folder).values if key.sample == 0
    }
    # With the key exchanged, prompts that were answered are refused, and the other way round.
    answers = responses.response_log(found.folder).values
    letters = {"clamp": {}, "plain": {}}
    for key, response in answers.items():
        letters[key.condition][key.prompt] = response.text[0]
    for prompt, letter in letters["clamp"].items():
        if prompt.startswith("harmful"):
            assert {letter, letters["plain"][prompt]} == {"C", "R"}
        else:
            assert letter == "C"
    lines[5]["counterfactual"] = lines[6]["counterfactual"]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="but not of the same counterfactuals"):
        clamp.run(asked, progress=False)


def test_prompts_are_asked_as_the_run_that_chose_the_units_asked_them():
    run = {"chat": True, "date": "2026-01-31", "template_args": '{"a": 1}'}
    asked = ClampSettings(model="m", out="o", prompts=("p",), results="r", chat=True)
    found = clamp.asked_alike(asked, run)
    assert (found.date, found.template_args) == ("2026-01-31", '{"a": 1}')
    assert clamp.asked_otherwise(found, run, reads_date=True) == []
    otherwise = dataclasses.replace(asked, chat=False, date="2026-02-01", template_args='{"a": 2}')
    assert clamp.asked_alike(otherwise, run) == otherwise
    said = [
        "--chat=False: r chose the units by other prompts, with --chat=True",
        "--date=2026-02-01: r chose the units by other prompts, with --date=2026-01-31",
        '--template_args={"a": 2}: r chose the units by other prompts, with --template_args='
        '{"a": 1}',
    ]
    assert clamp.asked_otherwise(otherwise, run, reads_date=True) == said
    # A day that no template asks for is none of the prompts'.
    assert clamp.asked_otherwise(otherwise, run, reads_date=False) == [said[0], said[2]]


def test_arguments_are_compared_by_what_they_mean(tmp_path):
    run = {"chat": False, "date": "2026-01-31", "template_args": '{"a": 1, "b": false}'}
    asked = ClampSettings(model="m", out=str(tmp_path), prompts=("p",), results="r")
    same = dataclasses.replace(asked, template_args='{ "b":false,"a" : 1 }')
    settled = loading.settled(clamp.asked_alike(same, run))
    assert settled.template_args == run["template_args"]
    assert clamp.asked_otherwise(settled, run, reads_date=True) == []
    assert loading.settled(dataclasses.replace(asked, template_args="{}")).template_args == ""
