"""`launch.respond` as a user starts it: flags, what it says, and pairs that can be mediated."""

import json

import pytest

from jaxmed.data import pairs as pairs_lib
from models import checkpoint
from tests import tiny, words
from tests.launch import process

SHAPE = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 12, "head_dim": 4}
WORDS = len(words.WORDS)
ROWS = [{"prompt": "tell me how"}, {"prompt": "how to do"}]
JUDGE = ["--judge=tokens", *(f"--comply_tokens=id:{token}" for token in range(4, 10))]
JUDGE += [f"--refuse_tokens={words.WORDS[token]}" for token in range(10, WORDS)]
SAMPLED = ["--max_tokens=5", "--counterfactual=length"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("respond") / "model"
    decoder = tiny.decoder(vocab_size=WORDS, **SHAPE)
    checkpoint.save(decoder, folder, tokenizer=words.tokenizer())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Flags that name a file of harmful and one of benign prompts."""
    named = []
    for label, rows in (("harmful", ROWS), ("benign", [{"prompt": "tell me why"}])):
        file = tmp_path / f"{label}.jsonl"
        rows = [{"id": f"{label}{n}", "split": "A"} | row for n, row in enumerate(rows)]
        file.write_text("\n".join(map(json.dumps, rows)))
        named.append(f"--prompts={label}={file}")
    return named


def test_flags_reach_the_run_and_its_end_says_what_to_do_next(model, prompts, tmp_path):
    out = tmp_path / "out"
    done = process.run("respond", f"--model={model}", *prompts, *JUDGE, *SAMPLED, f"--out={out}")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("Judge tokens: ") and said[1].startswith("harmful: 2 prompts, 8 resp")
    assert said[2].startswith("benign: 1 prompts, 8 responses each; refusal rate ")
    assert said[-1].startswith(
        f"python -m launch.mediate --model={model} --pairs={out}/pairs.jsonl"
    )
    run = json.loads((out / "run.json").read_text())
    asked = {"samples": 8, "temperature": 1.0, "max_tokens": 5, "counterfactual": "length"}
    asked |= {"prompts": [flag.partition("=")[2] for flag in prompts], "judge": ["tokens"]}
    asked |= {"comply_tokens": [f"id:{token}" for token in range(4, 10)], "program": "respond"}
    assert {name: run[name] for name in asked} == asked
    # What mediate reads of them, and that it can, is tested in jaxmed.
    pairs = pairs_lib.read(out / "pairs.jsonl", words.tokenizer())
    assert [pair.base for pair in pairs] == ["harmful0", "harmful1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge=nobody"], "judge 'nobody': not one of phrases"),
        (["--judge=phrases=x"], "phrases runs no model: leave =x out"),
        (["--counterfactual=matched"], "there is no harmless prompt of the same source, match and"),
        (["--samples=2", "--temperature=0"], "the likeliest tokens are the same each time"),
        (["--prompts=/nowhere.csv"], "/nowhere.csv: there is no such file"),
        (["--max_tokens=100"], "which with --max_tokens=100 are more than the model's 64"),
    ],
)
def test_bad_input_ends_in_one_message(flags, message, model, prompts, tmp_path):
    failed = process.call(
        "respond", f"--model={model}", *prompts, *SAMPLED, *flags, f"--out={tmp_path / 'out'}"
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("Error: ") and message in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["prompts", "model", "out"])
def test_what_must_be_given(flag, model, prompts, tmp_path):
    flags = [f"--model={model}", *prompts, f"--out={tmp_path / 'out'}"]
    failed = process.call(
        "respond", *(given for given in flags if not given.startswith(f"--{flag}="))
    )
    assert failed.returncode == 1 and f"--{flag}" in failed.stderr
