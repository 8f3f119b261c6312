"""The command line: what it writes and says, and how it fails."""

import errno
import json
import os
import re
import signal

import numpy as np
import pytest
import zarr

from jaxmed.engine import scan
from jaxmed.runs import mediate
from jaxmed.store.results import Results
from models import checkpoint
from tests import tiny
from tests.launch import process

SHAPE = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 12, "head_dim": 4}
PAIR = {
    "id": "one",
    "prompt_ids": [1, 2, 3, 4],
    "counterfactual_ids": [1, 9, 3, 4],
    "harmful_ids": [7, 8],
    "safe_ids": [10],
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch") / "model"
    tiny.save(folder, **SHAPE)
    return folder


@pytest.fixture
def pairs(tmp_path):
    """A function that writes a file of pairs."""

    def write(*lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(texts))
        return file

    return write


def launch(**flags):
    """Runs the program in this process; gives its exit status, and what it says at its end."""
    done = process.call("mediate", *(f"--{name}={value}" for name, value in flags.items()))
    if not done.returncode:
        return 0, done.stdout
    _, error, message = done.stderr.rstrip("\n").partition("Error: ")
    return done.returncode, error + message if error else done.stderr


# Success.


def test_a_run_ends_with_status_0_and_says_where_its_results_are(model, pairs, tmp_path):
    out = tmp_path / "out"
    done = process.call(
        "mediate",
        f"--model={model}",
        f"--pairs={pairs(PAIR)}",
        f"--out={out}",
        "--granularity=layer,neuron",
        "--metric=logit_diff",
        "--positions=last",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"Results: {out} (open {out / 'report.html'})"
    assert any(line.startswith("Neurons: ") and "NIE" in line for line in lines)
    assert f"Loading {model}" in done.stderr and "floating-point operations" in done.stderr
    assert re.search(r"Of these operations neuron \d.*% \(24 units a pair\), layer", done.stderr)
    assert "To leave neuron out, stop this, and give another --out and --granularity=layer; or" in (
        done.stderr
    )
    assert (out / "report.html").exists() and (out / "summary.parquet").exists()
    run = json.loads((out / "run.json").read_text())
    assert run["finished"] is True and run["granularity"] == ["layer", "neuron"]
    assert run["command"][1] == f"--model={model}"
    group = zarr.open_group(out / "effects.zarr", mode="r")
    assert group["neuron/nie"].shape == (1, 2, 12) and "head" not in group
    assert np.isfinite(group["neuron/nie"][...]).all()


def test_flags_reach_the_run(model, pairs, tmp_path):
    status, said = launch(
        model=model,
        pairs=pairs(PAIR),
        out=tmp_path / "out",
        granularity="layer",
        metric="response_logprob_diff",
        response_part="decision",
        decision_tokens=2,
        positions="response",
        dtype="float16",
        matmul_precision="bfloat16",
        memory_gb=64,
        show_text="true",
    )
    assert status == 0 and said.startswith(f"Results: {tmp_path / 'out'}")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    asked = {"metric": "response_logprob_diff", "response_part": "decision", "decision_tokens": 2}
    asked |= {"positions": "response", "dtype": "float16", "memory_gb": 64, "show_text": True}
    asked |= {"matmul_precision": "bfloat16", "screen": 0, "directions": ""}
    assert {name: run[name] for name in asked} == asked
    assert (run["align"], run["group_size"], run["harmful_tokens"]) == ("end", 1, [])


def test_a_screen_with_directions_says_both_at_its_end(model, pairs, tmp_path):
    np.savez(tmp_path / "vectors.npz", **{"residual.1": np.eye(16)[:2]})
    status, said = launch(
        model=model,
        pairs=pairs(PAIR),
        out=tmp_path / "out",
        granularity="neuron",
        directions=tmp_path / "vectors.npz",
        screen=2,
        screen_audit=4,
        screen_steps=3,
    )
    lines = [line.partition(": ") for line in said.splitlines()]
    assert status == 0 and [line[0] for line in lines[2:]] == ["Neurons", "Directions", "Screen"]
    assert lines[-1][2].startswith("Of 24 neurons, 4 were computed exactly")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["screen"], run["screen_audit"], run["screen_steps"]) == (2, 4, 3)
    assert run["granularities"] == ["neuron", "direction"]


# Failure.

BAD_PAIRS = {
    # the second of two lines; flags; what the message says
    "bad JSON": ("{'id': 1}", {}, "not JSON"),
    "no counterfactual": (
        {"prompt_ids": [1], "harmful_ids": [2], "safe_ids": [3]}, {},
        "pair '2' has no counterfactual (field 'counterfactual' or 'counterfactual_ids')",
    ),
    "an empty prompt": (PAIR | {"id": "two", "prompt_ids": []}, {}, "an empty prompt"),
    "text without a tokenizer": (
        {"prompt": "a", "counterfactual": "b"}, {}, "the checkpoint has no tokenizer",
    ),
    "a token outside the vocabulary": (
        PAIR | {"id": "two", "counterfactual_ids": [1, 61]}, {},
        "token id 61 of counterfactual_ids is outside the vocabulary of 61",
    ),
    "a prompt that is too long": (
        PAIR | {"id": "two", "prompt_ids": [1] * 65}, {},
        "its prompt with the response has 65 tokens, and the model has 64 positions",
    ),
    "a prompt that a response makes too long": (
        PAIR | {"id": "two", "counterfactual_ids": [1] * 63}, {"metric": "response_logprob_diff"},
        "its counterfactual with the response has 65 tokens",
    ),
    "the same first token": (
        PAIR | {"id": "two", "safe_ids": [7, 9]}, {}, "have the same first token [7]",
    ),
    "no safe answer": (PAIR | {"id": "two", "safe_ids": []}, {}, "has no safe answer"),
    "ends that do not correspond": (
        PAIR | {"id": "two", "prompt_ids": [1, 2]}, {"align": "start"},
        "cannot be aligned for positions='last': its prompts have 2 and 4 tokens",
    ),
    "no spans": (
        PAIR | {"id": "two"}, {"align": "span", "positions": "prompt"}, "cannot be aligned by span",
    ),
}  # fmt: skip
# Faults of all pairs, which the first line shows already.
OF_EVERY_PAIR = ("no spans",)


@pytest.mark.parametrize("fault", BAD_PAIRS)
def test_a_bad_pair_gets_one_line_that_names_file_and_line(fault, model, pairs, tmp_path):
    line, flags, said = BAD_PAIRS[fault]
    file = pairs(PAIR, line)
    status, message = launch(model=model, pairs=file, out=tmp_path / "out", **flags)
    assert status == 1 and "\n" not in message
    at = 1 if fault in OF_EVERY_PAIR else 2
    assert message.startswith(f"Error: {file}:{at}: ") and said in message, message
    assert not (tmp_path / "out").exists()


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


BAD_MODELS = {
    "a truncated shard": (truncate, f"{WEIGHTS}: truncated or corrupt"),
    "no shard": (lambda folder: (folder / WEIGHTS).unlink(), f"has neither {WEIGHTS}"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "another shape": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"hidden_size": 16', '"hidden_size": 24')
        ),
        "model.embed_tokens.weight has shape [61, 16], but config.json asks for [61, 24]",
    ),
    "an unknown architecture": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "mamba"}'), "mamba",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_bad_checkpoint_gets_one_line_that_names_it(fault, pairs, tmp_path):
    spoil, said = BAD_MODELS[fault]
    tiny.save(tmp_path / "model", **SHAPE)
    spoil(tmp_path / "model")
    status, message = launch(model=tmp_path / "model", pairs=pairs(PAIR), out=tmp_path / "out")
    assert status == 1 and "\n" not in message
    assert message.startswith(f"Error: {tmp_path / 'model'}") and said in message, message
    assert not (tmp_path / "out").exists()


BAD_FLAGS = {
    "granularity": ({"granularity": "layer,atom"}, "Error: --granularity=atom: not one of layer,"),
    "response positions": (
        {"positions": "response"}, "Error: --positions=response: logit_diff reads the last",
    ),
    "directions that are not given": (
        {"granularity": "direction"}, "Error: --granularity=direction needs --directions=FILE.npz",
    ),
    "directions": (
        {"directions": "/no/such.npz"}, "Error: /no/such.npz: there is no such file",
    ),
    "audit without a screen": ({"screen_audit": 9}, "Error: --screen_audit needs --screen=K"),
    "steps without a screen": ({"screen_steps": 9}, "Error: --screen_steps needs --screen=K"),
    "screen without neurons": (
        {"screen": 1, "granularity": "head"}, "Error: --screen needs --granularity=neuron",
    ),
    "screen of too many": ({"screen": 99}, "Error: --screen=99: the model has 24 neurons"),
    "memory": ({"memory_gb": "nan"}, "Error: --memory_gb=nan: must be a number, and at least"),
    "too little memory": ({"memory_gb": 0.01}, "Error: memory_gb=0.01 (--memory_gb): model"),
    "joint set of groups": ({"joint_size": 2, "group_size": 2}, "Error: --joint_size needs"),
    "model": ({"model": "/no/such/folder"}, "Error: /no/such/folder: no such folder"),
    "pairs": ({"pairs": "/no/such.jsonl"}, "Error: /no/such.jsonl: there is no such file"),
    "first token id": (
        {"harmful_tokens": "id:99", "safe_tokens": "id:2"},
        "Error: --harmful_tokens=id:99: token id outside the vocabulary of 61",
    ),
    "endless first token id": (
        {"harmful_tokens": "id:" + "9" * 5000},
        "Error: --harmful_tokens=id:" + "9" * 5000 + ": token id outside the vocabulary of 61",
    ),
    "first token": ({"safe_tokens": "No"}, "Error: --safe_tokens=No: the checkpoint has no token"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FLAGS)
def test_a_bad_flag_gets_one_line_that_names_it(fault, model, pairs, tmp_path):
    changes, said = BAD_FLAGS[fault]
    flags = {"model": model, "pairs": pairs(PAIR), "out": tmp_path / "out"} | changes
    status, message = launch(**flags)
    assert status == 1 and "\n" not in message
    assert message.startswith(said), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"out": "x", "model": "y"}, "--pairs must have a value"),
        (
            {"out": "x", "model": "y", "pairs": "z", "metric": "loss"},
            "should be one of <logit_diff|",
        ),
        ({"out": "x", "model": "y", "pairs": "z", "group_size": 0}, "group_size"),
        (
            {"out": "x", "model": "y", "pairs": "z", "layers": 3},
            "Unknown command line flag 'layers'",
        ),
    ],
)
def test_flags_that_absl_refuses_are_named_without_a_traceback(flags, said):
    status, message = launch(**flags)
    assert status == 1 and said in message and "Traceback" not in message, message


def test_units_that_fail_end_the_program_with_status_2(model, pairs, tmp_path, monkeypatch):
    effects = scan.Scan.effects

    def failing(self, block, *arguments):
        if block.granularity == "module":
            raise ValueError("no\nmore")
        return effects(self, block, *arguments)

    flags = {"model": model, "pairs": pairs(PAIR), "out": tmp_path / "out"}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    flags.append("--granularity=layer,module")
    with monkeypatch.context() as patch:
        patch.setattr(scan.Scan, "effects", failing)
        done = process.call("mediate", *flags)
    assert done.returncode == 2
    assert done.stdout.startswith(f"Results: {tmp_path / 'out'} ") and "Layers: " in done.stdout
    said = done.stderr.splitlines()
    assert "module-00000-000 failed (ValueError: no): tried once more" in said
    assert said[-1] == (
        "Units of work that failed, and have no effects: module-00000-000; --retry_failed takes "
        "them up again"
    )
    assert process.call("mediate", *flags).returncode == 2
    assert process.call("mediate", *flags, "--retry_failed").returncode == 0
    assert process.call("mediate", *flags).returncode == 0


def test_sigterm_ends_the_program_with_status_3_after_the_block_under_way(
    model, pairs, tmp_path, monkeypatch
):
    effects = scan.Scan.effects

    def ended(self, block, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return effects(self, block, *arguments)

    flags = {"model": model, "pairs": pairs(PAIR), "out": tmp_path / "out"}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    flags.append("--granularity=layer,module")
    with monkeypatch.context() as patch:
        patch.setattr(scan.Scan, "effects", ended)
        done = process.call("mediate", *flags)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "Ended by SIGTERM. What was finished is kept: the same command goes on."
    )
    found = Results.open(tmp_path / "out")
    assert (found.missing("layer"), found.missing("module")) == ([], [0])
    assert process.call("mediate", *flags).returncode == 0


def test_a_full_disk_ends_the_program_with_one_message(monkeypatch):
    def full(settings):
        raise OSError(errno.ENOSPC, "No space left on device", "out/report.html")

    monkeypatch.setattr(mediate, "run", full)
    done = process.call("mediate", "--model=x", "--pairs=y", "--out=z")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: out/report.html: cannot be written (No space left on device)"
    )


def test_words_that_are_no_flags_are_refused():
    done = process.call("mediate", "--model=x", "--pairs=y", "--out=z", "stray", "word")
    assert done.returncode == 1
    assert done.stderr == "Error: flags only, as --name=value; not stray word\n"


def test_a_stopped_program_says_how_to_go_on(monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(mediate, "run", interrupted)
    done = process.call("mediate", "--model=x", "--pairs=y", "--out=z")
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr


def test_a_defect_of_the_program_shows_its_traceback(monkeypatch, model, pairs, tmp_path):
    monkeypatch.setattr(mediate, "run", lambda settings: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        launch(model=model, pairs=pairs(PAIR), out=tmp_path / "out")


def test_a_dry_run_tells_what_a_run_takes_and_neither_reads_weights_nor_writes(
    model, pairs, tmp_path, monkeypatch
):
    flags = {"model": model, "pairs": pairs(PAIR, PAIR | {"id": "two"}), "out": tmp_path / "out"}
    flags |= {"granularity": "layer,neuron", "matmul_precision": "float32"}

    def read(source, mesh=None):
        raise AssertionError("the weights are read")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Source, "read", read)
        status, told = launch(**flags, dry_run="true", accelerator="h100")
        with pytest.raises(AssertionError, match="the weights are read"):
            launch(**flags)
    assert status == 0 and not flags["out"].exists()
    status, _ = launch(**flags)
    run = json.loads((flags["out"] / "run.json").read_text())
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line[:2] == "  "}
    for name, units in {"layer": 2, "neuron": 24}.items():
        blocks = [block for block in run["blocks"] if block["granularity"] == name]
        assert rows[name][:3] == [str(units), "2", str(len(blocks))]
        assert rows[name][4:] == [str(2 * units * 9), "bytes"]
    assert "Here (1 x cpu): Going by the " in told and "One h100 (datasheet: 989" in told
    assert "a product in split3 takes 6 in bfloat16" in told  # of float32 weights
    assert "There the scan takes about" in told and "49% of that rate was measured" in told


def test_a_dry_run_names_a_pair_that_cannot_be_used(model, pairs, tmp_path):
    file = pairs(PAIR, PAIR | {"id": "two", "safe_ids": [7]})
    status, error = launch(model=model, pairs=file, out=tmp_path / "out", dry_run="true")
    assert status == 1 and error.startswith(f"Error: {file}:2: pair 'two': ")


def test_an_accelerator_is_asked_of_a_dry_run_alone(model, pairs, tmp_path):
    status, error = launch(model=model, pairs=pairs(PAIR), out=tmp_path / "o", accelerator="v5e")
    assert (status, error) == (1, "Error: --accelerator needs --dry_run")


def test_bad_input_ends_the_process_with_status_1_and_one_error(model, pairs, tmp_path):
    file = pairs(PAIR, PAIR | {"id": "two", "safe_ids": [7]})
    failed = process.run(
        "mediate", f"--model={model}", f"--pairs={file}", f"--out={tmp_path / 'out'}"
    )
    assert failed.returncode == 1 and failed.stdout == ""
    device, progress, error = failed.stderr.splitlines()
    assert device.startswith("Runs on CPU ")
    assert progress == f"Loading {model}"
    assert error.startswith(f"Error: {file}:2: pair 'two': ")
    assert not (tmp_path / "out").exists()
