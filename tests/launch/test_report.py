"""The report is written again from a results folder alone."""

import base64
import json

import numpy as np
import pandas
import pytest

from jaxmed.analysis.findings import open_run
from jaxmed.question import effects
from jaxmed.store import results
from models import checkpoint
from tests import tiny, words
from tests.launch import process

SIZES = effects.Sizes(layers=2, heads=2, neurons=3, positions=4)
PAIR = {"id": "one", "prompt": "tell me <b>how</b>", "counterfactual": "why not"}


@pytest.fixture
def finished(tmp_path):
    """A finished run of a text checkpoint; the report has yet to be written."""
    checkpoint.save(
        tiny.decoder(num_layers=2, hidden_size=16), tmp_path / "model", tokenizer=words.tokenizer()
    )
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR))
    run = {
        "model": str(tmp_path / "model"),
        "pairs": str(tmp_path / "pairs.jsonl"),
        "chat": False,
        "adapter": "",
        "date": "2026-01-31",
        "template_args": "",
        "skip_bad_pairs": False,
        "metric": "logit_diff",
        "metric_unit": "logits",
        "meaning": "one logit minus another",
        "positions": "last",
        "precision": "float32",
        "device": "cpu",
    }
    made = results.Results.create(tmp_path / "out", run, SIZES, ["one"], ["layer", "neuron"])
    made.write_totals(0, y_base=2.0, y_source=-1.0)
    for granularity in ("layer", "neuron"):
        nie, tie = np.random.default_rng(0).normal(size=(2, *SIZES.shape(granularity)))
        made.write(0, granularity, nie, tie)
    made.record({"seconds": 1.0})
    made.finish()
    return tmp_path / "out"


def test_a_report_of_a_run_in_a_bucket_is_written_there(finished, bucket):
    results.Results.open(finished).copy(f"{bucket}/out")
    done = process.call("report", f"--results={bucket}/out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Results: {bucket}/out (open {bucket}/out/report.html)")
    place = results.Results.open(f"{bucket}/out").place
    page = place.read("report.html").decode()
    shown = "data:image/png;base64," + base64.b64encode(place.read("figures/neuron.png")).decode()
    assert "<h1" in page and shown in page and "tell me" not in page
    assert place.exists("summary.parquet")
    assert process.call("report", f"--results={finished}").returncode == 0
    assert (finished / "figures" / "neuron.png").read_bytes() == place.read("figures/neuron.png")
    top = [open_run(folder).top(2) for folder in (finished, f"{bucket}/out")]
    pandas.testing.assert_frame_equal(*top)


def test_a_report_is_written_again_with_text_if_asked_for(finished):
    (finished / "report.html").write_text("stale")
    done = process.run("report", f"--results={finished}", "--show_text")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Results: {finished} (open ")
    page = (finished / "report.html").read_text()
    assert "stale" not in page and "<h1" in page
    assert "tell me &lt;b&gt;how&lt;/b&gt;" in page and "<b>how" not in page
    assert (finished / "figures" / "neuron.png").exists()
    assert (finished / "summary.parquet").exists()


def test_a_folder_without_results_is_refused_in_one_line(tmp_path):
    failed = process.call("report", f"--results={tmp_path}")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"Error: {tmp_path} is not a results folder: it has no run.json\n"
    assert list(tmp_path.iterdir()) == []
