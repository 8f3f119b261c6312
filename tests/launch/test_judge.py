"""`launch.judge`: a labelled file gives verdicts, accuracy and kappa; bad input one message."""

import json
import re

import pytest

from jaxmed.behaviour.judges.agreement import Agreement
from models import checkpoint
from tests import tiny, words
from tests.launch import process

OWN = {
    "name": "own",
    "meaning": "whether the answer is yes",
    "template": "tell {prompt} do {response} why",
    "yes": [" yes", " do", " it", " how"],
    "no": [" no", " not", " why", " me"],
}
TEXT = "tell {forbidden_prompt} do {response} why"  # in place of a text that its authors publish
ROWS = [
    {"id": "a", "prompt": "how", "response": "I'm sorry, no", "harmful": 0, "refused": True},
    {"id": "b", "prompt": "how", "response": "yes do it", "harmful": 1, "refused": False},
    {"id": "c", "prompt": "why", "response": "tell me how", "harmful": 1, "refused": True},
    {"id": "d", "prompt": "why", "response": "not it", "harmful": 0},
]


def run(*flags):
    return process.call("judge", *flags)


@pytest.fixture
def responses(tmp_path):
    """A function that writes a file of responses, and returns the flag that names it."""

    def write(*rows):
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "responses.jsonl").write_text("\n".join(texts) + "\n")
        return f"--responses={tmp_path / 'responses.jsonl'}"

    return write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    # Of a random model that knows few other words these answers have mass enough for a verdict.
    module = tiny.decoder(num_layers=2, hidden_size=16, vocab_size=len(words.WORDS))
    checkpoint.save(module, folder, tokenizer=words.tokenizer())
    return folder


def read(folder):
    lines = (folder / "judged.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "agreement.json").read_text())


def test_a_judge_model_judges_a_labelled_file(model, responses, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    done = process.run(
        "judge",
        f"--judge={tmp_path / 'own.json'}={model}",
        responses(*ROWS),
        f"--out={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith(f"Verdicts: {tmp_path / 'out' / 'judged.jsonl'} (4 responses; own")
    assert "4/4" in done.stderr  # the progress bar's end
    number = r"−?[01]\.\d{3}"
    interval = rf"{number} \[{number}, {number}\]"
    assert re.match(rf"harmful, 4 labels: accuracy {interval}, Cohen's kappa {interval}", said[3])
    assert said[2].startswith("Verdicts on whether 4 of 4 responses are harmful are unsure: there")
    verdicts, about = read(tmp_path / "out")
    for row, verdict in zip(ROWS, verdicts, strict=True):
        assert row.items() <= verdict.items() and 0 < verdict["judge_harmful"] < 1
        assert 0.1 <= verdict["judge_harmful_mass"] < 0.5 and not verdict["judge_refused_mass"]
        assert (verdict["judge"], verdict["judge_refused"], verdict["judge_cut"]) == (
            "own", None, False
        )  # fmt: skip
    agreed = sum(
        (verdict["judge_harmful"] >= 0.5) == row["harmful"]
        for row, verdict in zip(ROWS, verdicts, strict=True)
    )
    assert about["agreement"]["harmful"]["accuracy"] == agreed / 4
    assert about["meaning"] == OWN["meaning"] and about["judge_model"] == str(model)
    assert set(about["agreement"]["harmful"]) == set(Agreement.__dataclass_fields__)


def test_a_published_judge_reads_its_text_from_a_file(model, responses, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("tell {behavior} do {generation} why\n")
    flags = [f"--judge_template=harmbench-mistral={text}", responses(*ROWS[:2])]
    done = run(f"--judge=harmbench-mistral={model}", *flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "; its text is not the published one)" in done.stdout.splitlines()[0]
    verdicts, about = read(tmp_path / "out")
    assert all(0 < verdict["judge_harmful"] < 1 for verdict in verdicts)
    assert about["meaning"].endswith("; its text is not the published one")
    assert about["judge_template"] == [f"harmbench-mistral={text}"]


def test_phrases_agree_on_refusals_alone(responses, tmp_path):
    done = run("--judge=phrases", responses(*ROWS), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "a smoke test" in said[0] and said[1] == "refused: 1 of 4 at 0.5 or above, mean 0.250"
    # Two of three agree; by chance 1/3 * 2/3 + 2/3 * 1/3 = 4/9.
    assert said[2].startswith("refused, 3 labels: accuracy 0.667 [") and len(said) == 3
    assert "Cohen's kappa 0.400 [" in said[2] and "precision 1.000, recall 0.500" in said[2]
    assert [row["judge_refused"] for row in read(tmp_path / "out")[0]] == [1, 0, 0, 0]


def test_ignored_keys_of_config_json_stay(responses, tmp_path):
    flags = ["--judge=phrases", responses(*ROWS), f"--out={tmp_path / 'out'}"]
    assert run(*flags).returncode == 0
    ran = run(*flags, "--ignore_config=trained_in")
    assert ran.returncode == 1 and "other settings: --ignore_config was []" in ran.stderr


def test_tokens_without_labels(responses, tmp_path):
    rows = [{"prompt_ids": [1, 2], "response_ids": ids} for ids in ([6, 9], [7], [])]
    flags = [
        "--judge=tokens",
        "--comply_tokens=id:6",
        "--comply_tokens=id:8",
        "--refuse_tokens=id:7",
        responses(*rows),
    ]
    done = run(*flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("No response has a label")
    verdicts, about = read(tmp_path / "out")
    assert [(v["judge_harmful"], v["judge_refused"]) for v in verdicts] == [(1, 0), (0, 1), (0, 0)]
    assert about["agreement"] == {}
    assert [v["judge_complied"] for v in verdicts] == [1, 0, 0]
    other = [*flags, "--comply_tokens=id:9", f"--out={tmp_path / 'out'}"]
    again = run(*other)
    assert again.returncode == 1
    assert "other settings: --comply_tokens was [6, 8], is now [6, 8, 9]" in again.stderr
    assert run(*other, "--overwrite").returncode == 0
    assert read(tmp_path / "out")[0] == verdicts


def test_numbers_that_do_not_exist_are_null(responses, tmp_path):
    rows = [{"response": "yes", "refused": False}] * 2
    assert run("--judge=phrases", responses(*rows), f"--out={tmp_path / 'out'}").returncode == 0
    found = read(tmp_path / "out")[1]["agreement"]["refused"]
    assert (found["accuracy"], found["kappa"], found["kappa_interval"]) == (1, None, [None, None])


def test_responses_that_are_cut_are_counted(model, responses, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    flags = [f"--judge={tmp_path / 'own.json'}={model}"]
    rows = [{"prompt": "how", "response": f"do {number}"} for number in range(70)]
    flags += [responses(*rows, {"prompt": "how", "response": "do " * 80})]
    refused = run(*flags, f"--out={tmp_path / 'out'}")
    # It shows at once, and not after those before it.
    assert refused.returncode == 1 and "responses.jsonl:71: has 85 tokens" in refused.stderr
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()
    # The same command goes on, with this allowed.
    done = run(*flags, f"--out={tmp_path / 'out'}", "--cut")
    assert done.returncode == 0, done.stderr
    assert "Cut off at their ends, as too long for the judge: 1 of 71" in done.stdout
    assert [row["judge_cut"] for row in read(tmp_path / "out")[0]] == [False] * 70 + [True]


def test_a_stopped_run_goes_on_and_judges_only_what_is_missing(model, responses, tmp_path):
    out, own = tmp_path / "out", tmp_path / "own.json"
    own.write_text(json.dumps(OWN))
    flags = [f"--judge={own}={model}", f"--out={out}"]
    assert run(*flags, responses(*ROWS)).returncode == 0
    whole, about = read(out)
    log = out / "verdicts.jsonl"
    kept = log.read_text().splitlines(keepends=True)
    assert len(kept) == 4
    # A verdict that no judge gave shows that it was kept; the third line is not finished.
    first = json.loads(kept[0]) | {"harmful": 0.125}
    log.write_text(json.dumps(first) + "\n" + kept[1] + kept[2][:20])
    # People may add responses and labels meanwhile, and move the checkpoint.
    rows = [ROWS[3] | {"refused": True}, *ROWS[:3], ROWS[0] | {"id": "e"}]
    (tmp_path / "moved").symlink_to(model)
    flags[0] = f"--judge={own}={tmp_path / 'moved'}"
    done = run(*flags, responses(*rows), "--threshold=0.25")
    assert done.returncode == 0 and "2/2" in done.stderr, done.stderr
    found = {row["id"]: row["judge_harmful"] for row in read(out)[0]}
    expected = {row["id"]: row["judge_harmful"] for row in whole}
    assert list(found) == ["d", "a", "b", "c", "e"] and found["e"] == found["a"]
    (changed,) = [name for name in expected if found[name] == 0.125]
    same = [name for name in expected if name != changed]
    assert [found[name] for name in same] == pytest.approx([expected[n] for n in same], abs=1e-5)
    assert len(log.read_text().splitlines()) == 4
    assert read(out)[1]["judge_text_and_weights"] == about["judge_text_and_weights"]
    assert about["judge_precisions"] == {OWN["name"]: "float32"}


def test_another_text_is_another_judge(model, responses, tmp_path):
    own = tmp_path / "own.json"
    flags = [f"--judge={own}={model}", responses(*ROWS[:2]), f"--out={tmp_path / 'out'}"]
    own.write_text(json.dumps(OWN))
    assert run(*flags).returncode == 0
    before = read(tmp_path / "out")
    own.write_text(json.dumps(OWN | {"template": "why " + OWN["template"]}))
    again = run(*flags)
    assert (
        again.returncode == 1
        and "not of the same judge (its text, weights or config)" in again.stderr
    )
    assert "choose another --out, or --overwrite" in again.stderr
    assert read(tmp_path / "out") == before
    assert run(*flags, "--overwrite").returncode == 0
    assert read(tmp_path / "out")[0] != before[0]


def test_a_folder_that_cannot_be_had_is_named_before_anything_is_judged(model, responses, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps(OWN))
    too_long = responses({"prompt": "how", "response": "do " * 80})
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    for out, message in (
        ("file/out", "cannot be made (Not a directory)"),
        ("file", "cannot be made (File exists)"),
        ("full", "holds files of something else: choose another folder"),
    ):
        failed = run(f"--judge={own}={model}", too_long, f"--out={tmp_path / out}")
        assert failed.returncode == 1 and message in failed.stderr, failed.stderr


def test_exchanges_of_a_run_with_labels_of_people(responses, tmp_path):
    rows = [
        {
            "id": f"x/{sample}", "prompt": "why", "response": "do", "prompt_ids": [1, 2],
            "response_ids": [6 + sample], "label": label, "refused": bool(sample),
        }
        for sample, label in enumerate(("harmful", "benign"))
    ]  # fmt: skip
    flags = ["--judge=tokens", "--comply_tokens=id:6", "--refuse_tokens=id:7", responses(*rows)]
    done = run(*flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "refused, 2 labels: accuracy 1.000" in done.stdout
    judged = read(tmp_path / "out")[0]
    assert all(row.items() <= one.items() for row, one in zip(rows, judged, strict=True))
    assert [one["judge_harmful"] for one in judged] == [1, None]


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        (["--judge=nobody"], ROWS, "judge 'nobody': not one of phrases"),
        (["--judge=phrases"], [*ROWS, "{"], "responses.jsonl:5: not JSON"),
        (["--judge=phrases"], [{"prompt": "how"}], "responses.jsonl:1: has no response"),
        (
            ["--judge=phrases"],
            [{"condition": "plain", "prompt": "x", "sample": 0, "tokens": [1], "text": "do"}],
            "responses.jsonl:1: is of a run's own files, where 'prompt' is no text but an id; give "
            "its exchanges.jsonl",
        ),
        (["--judge=phrases", "--cut"], ROWS, "--judge=phrases runs no model"),
        (["--judge=phrases={model}"], ROWS, "phrases runs no model: leave ={model} out"),
        (["--judge=harmbench="], ROWS, "judge 'harmbench=': names no checkpoint after the ="),
        (["--judge=phrases", "--comply_tokens=id:1"], ROWS, "are for --judge=tokens alone"),
        (["--judge=tokens"], ROWS, "give the first tokens that comply"),
        (
            ["--judge=tokens", "--comply_tokens=C"],
            ROWS,
            "--comply_tokens=C: must be a token id, as id:12",
        ),
        (
            ["--judge=strongreject={model}", "--judge_template=strongreject={text}"],
            ROWS,
            "judge 'strongreject': answer '1': the tokenizer of {model} has no tokens for it",
        ),
        (["--judge=llama-guard=/nowhere"], ROWS, "/nowhere: no such folder"),
        (
            ["--judge=phrases", "--judge_template=phrases={text}"],
            ROWS,
            "judge 'phrases': takes no text from a file",
        ),
        (
            ["--judge=harmbench={model}"],
            ROWS,
            "judge 'harmbench': needs its text, which is not part of jaxmed",
        ),
        (
            ["--judge=harmbench={model}", "--judge_template=harmbench={text}"],
            ROWS,
            "{text}: judge 'harmbench': its template has no {{behavior}}",
        ),
        (
            ["--judge=harmbench={model}", "--judge_template=wildguard={text}"],
            ROWS,
            "judge_template 'wildguard={text}': no judge wildguard is asked for",
        ),
    ],
)
def test_bad_input_ends_in_one_message(flags, rows, message, model, responses, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = [flag.format(model=model, text=text) for flag in flags]
    failed = run(*flags, responses(*rows), f"--out={tmp_path / 'out'}")
    assert failed.returncode == 1
    error = failed.stderr.splitlines()[-1]
    assert error.startswith("Error: ") and message.format(model=model, text=text) in error
    assert not (tmp_path / "out").exists()
