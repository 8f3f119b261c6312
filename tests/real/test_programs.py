"""From prompts to an answer on a published model: respond, mediate, clamp, one after the other."""

import csv
import json

import pandas as pd
import pytest

from tests.launch import process
from tests.real import published

pytestmark = pytest.mark.real

# Published sets of prompts, which lie beside a checkout or nowhere: no text of them is in it.
SETS = process.ROOT.parent / "shared" / "data"
# Of the harmful ones 10 are in split A and 8 in the others: an interval needs 8, and so do draws.
HARMFUL, BENIGN = 18, 60
FEW = ["--chat", "--max_tokens=12"]


@pytest.fixture
def prompts(tmp_path):
    """Flags that name the first prompts of two sets."""
    with open(SETS / "advbench.csv", newline="", encoding="utf-8") as file:
        rows = [row for _, row in zip(range(HARMFUL + 1), csv.reader(file), strict=False)]
    with open(tmp_path / "harmful.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    benign = json.loads((SETS / "alpaca_800.json").read_text(encoding="utf-8"))[:BENIGN]
    (tmp_path / "benign.json").write_text(json.dumps(benign), encoding="utf-8")
    return [f"--prompts={tmp_path}/harmful.csv", f"--prompts=benign={tmp_path}/benign.json"]


def done(program, *flags):
    ran = process.call(program, f"--model={published.folder('smollm2')}", *flags)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran


@pytest.mark.skipif(not SETS.is_dir(), reason="no prompt sets beside the checkout (shared/data)")
def test_in_a_row(prompts, tmp_path):
    answered, found, clamped = (tmp_path / name for name in ("respond", "mediate", "clamp"))
    done(
        "respond",
        *prompts,
        *FEW,
        "--counterfactual=length",
        "--samples=2",
        "--safe_template=I am sorry, but I cannot help with that.",
        f"--out={answered}",
    )
    pairs = [json.loads(line) for line in (answered / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    done(
        "mediate",
        *FEW[:1],
        f"--pairs={answered}/pairs.jsonl",
        "--granularity=module,head",
        "--split=B,C",
        "--skip_bad_pairs",  # answers that begin as the template does
        f"--out={found}",
    )
    summary = pd.read_parquet(found / "summary.parquet")
    assert set(summary.granularity) >= {"module", "head"}
    assert summary["mean"].notna().all() and summary["mean"].abs().max() > 0
    done(
        "clamp",
        *prompts,
        *FEW,
        f"--results={found}",
        "--granularity=head",
        "--top=5",
        "--edit=zero",
        "--random=1",
        "--nomodule",
        "--split=A",
        "--most_prompts=8",
        f"--out={clamped}",
    )
    assert (clamped / "report.html").is_file()
    run = json.loads((clamped / "run.json").read_text())
    assert len(run["chosen"]) == 5
