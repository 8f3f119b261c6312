"""`launch.clamp` as a user starts it, at the end of the way that leads to it."""

import itertools
import json

import pytest

from jaxmed.runs import clamp, mediate, respond
from jaxmed.runs.mediate import MediateSettings
from jaxmed.runs.respond import RespondSettings
from jaxmed.store.results import Results
from models import checkpoint
from tests import tiny, words
from tests.launch import process

SHAPE = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 12, "head_dim": 4}
WORDS = len(words.WORDS)
COMPLY, REFUSE = ([f"id:{token}" for token in span] for span in (range(4, 10), range(10, WORDS)))
JUDGED = {
    "judge": ("tokens",),
    "comply_tokens": tuple(COMPLY),
    "refuse_tokens": tuple(REFUSE),
    "max_tokens": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clamp") / "model"
    decoder = tiny.decoder(vocab_size=WORDS, **SHAPE)
    checkpoint.save(decoder, folder, tokenizer=words.tokenizer())
    return folder


@pytest.fixture(scope="module")
def prompts(model):
    """Nine harmful and nine benign prompts of each split, whose ids say nothing of it."""
    texts = map(" ".join, itertools.product(words.WORDS[4:10], repeat=3))
    rows = [
        {"prompt": text, "label": label, "split": split}
        for (split, label, _), text in zip(
            itertools.product("ABC", ("harmful", "benign"), range(9)), texts, strict=False
        )
    ]
    file = model.parent / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def pairs(model, prompts):
    """Of the model's own answers."""
    asked = RespondSettings(
        model=str(model),
        prompts=(str(prompts),),
        out=str(model.parent / "respond"),
        counterfactual="length",
        samples=6,
        temperature=1.0,
        **JUDGED,
    )
    found = respond.run(asked, progress=False)
    assert all(found.pairs.values())
    return found.folder / respond.PAIRS


def mediated(model, pairs, split):
    """A run that ranks neurons by the pairs of these splits."""
    out = model.parent / f"mediate-{''.join(split)}"
    asked = MediateSettings(str(model), str(pairs), str(out), ("neuron",), split=split)
    return mediate.run(asked).folder


def flags(model, prompts, results, out):
    named = [
        f"--{name}={one}" for name in ("comply_tokens", "refuse_tokens") for one in JUDGED[name]
    ]
    named += ["--judge=tokens", "--max_tokens=4", "--edit=zero", "--random=1", "--top=3"]
    return [
        f"--model={model}",
        f"--prompts={prompts}",
        f"--results={results}",
        *named,
        f"--out={out}",
    ]


def test_from_prompts_to_an_answer(model, prompts, pairs, tmp_path):
    results, out = mediated(model, pairs, ("A", "B")), tmp_path / "out"
    done = process.run("clamp", *flags(model, prompts, results, out))
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == f"Results: {out} (open {out / 'report.html'})"
    assert said[1].startswith("Harm rate: ") and any(
        line.startswith("Random units: 1 draw") for line in said
    )
    run = json.loads((out / "run.json").read_text())
    asked = {"edit": "zero", "random": 1, "top": 3, "split": "C", "results": str(results)}
    assert {name: run[name] for name in asked} == asked and len(run["chosen"]) == 3
    for name in (*clamp._OWN_FILES, "figures/conditions.png"):
        assert (out / name).stat().st_size > 0


def test_prompts_that_chose_the_units_are_not_tested(model, prompts, pairs, bucket, tmp_path):
    """Though pairs have ids of their own."""
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"id": f"other {number}", "base": f"other {number}"}
    renamed = model.parent / "renamed.jsonl"
    renamed.write_text("\n".join(map(json.dumps, lines)))
    results = mediated(model, renamed, ("C",))
    Results.open(results).copy(f"{bucket}/run")
    for place in (results, f"{bucket}/run"):
        failed = process.call("clamp", *flags(model, prompts, place, tmp_path / "out"))
        assert failed.returncode == 1 and not (tmp_path / "out").exists()
        assert f"are among those that {place} chose" in failed.stderr, failed.stderr
        assert "--split=A,B" in failed.stderr
