"""Files of labelled responses, and how a judge agrees with the labels."""

import json
import math

import numpy as np
import pytest

from jaxmed.behaviour.judges import agreement, rules
from jaxmed.behaviour.judges.protocol import Exchange, Verdict
from models.errors import InputError


def test_a_file_of_responses(tmp_path):
    rows = [
        {"prompt": "a", "response": "b", "harmful": True, "refused": 0, "id": "x"},
        {"prompt": "a", "response": "", "label": 0},
        {"prompt_ids": [1], "response_ids": [2, 3], "label": "harmful", "refused": None},
    ]
    (tmp_path / "r.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    lines = agreement.read(tmp_path / "r.jsonl")
    where = [f"{tmp_path}/r.jsonl:{number}" for number in (1, 3, 5)]
    assert [line.exchange for line in lines] == [
        Exchange("a", "b", where=where[0]),
        Exchange("a", "", where=where[1]),
        Exchange(prompt_ids=(1,), response_ids=(2, 3), where=where[2], label="harmful"),
    ]
    expected = [{"harmful": True, "refused": False}, {"harmful": False}, {}]
    assert [line.labels for line in lines] == expected
    assert agreement.judged(rules.RefusalPhrases(), lines[1], Verdict(refused=0.0)) == rows[1] | {
        "judge": "phrases", "judge_harmful": None, "judge_refused": 0.0, "judge_complied": None,
        "judge_cut": False, "judge_harmful_mass": None, "judge_refused_mass": None,
    }  # fmt: skip


def test_a_users_own_fields_are_kept_whatever_their_names(tmp_path):
    row = {"prompt": "a", "response": "b", "condition": "x", "sample": 0}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    [line] = agreement.read(tmp_path / "own.jsonl")
    assert line.fields == row


def test_a_file_of_exchanges_with_labels_beside_what_a_run_wrote(tmp_path):
    written = {
        "id": "x/0", "prompt": "why", "response": "do it", "prompt_ids": [1, 2],
        "response_ids": [3], "label": "benign",
    }  # fmt: skip
    rows = [written | {"harmful": 0, "refused": True}, written | {"prompt": None, "label": "odd"}]
    (tmp_path / "exchanges.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = agreement.read(tmp_path / "exchanges.jsonl")
    where = f"{tmp_path}/exchanges.jsonl"
    assert first.exchange == Exchange("why", "do it", (1, 2), (3,), f"{where}:1", "benign")
    assert first.labels == {"harmful": False, "refused": True}
    assert second.exchange == Exchange(None, "do it", (1, 2), (3,), f"{where}:2")
    assert (first.fields, second.labels) == (rows[0], {})
    assert rules.FirstTokens((3,), (4,))([first.exchange]) == [Verdict(None, 0.0, 1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('"a"', "expected a JSON object, found str"),
        ('{"prompt": "a"}', "has no response"),
        ('{"prompt": ["a"], "response": "b"}', "'prompt' must be text"),
        ('{"response_ids": [1, -1]}', "'response_ids' must be a list of token ids"),
        ('{"response": "b", "harmful": 0.5}', "'harmful' must be true or false"),
        ('{"response": "b", "refused": "no"}', "'refused' must be true or false"),
        ('{"response": "b", "harmful": 0, "label": true}', "contradict each other"),
        ('{"response": "\\ud800"}', "has half of a surrogate pair"),
        (
            '{"condition": "plain", "prompt": "x", "sample": 0, "tokens": [1], "text": "b"}',
            "where 'prompt' is no text but an id; give its exchanges.jsonl",
        ),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line)
    with pytest.raises(InputError, match=rf"r\.jsonl:2: .*{message}"):
        agreement.read(tmp_path / "r.jsonl")


def test_a_context_that_no_judge_would_read_is_refused(tmp_path):
    row = {"prompt": "a", "response": "b", "context": "c"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"r\.jsonl:1: has 'context', a part of what is asked"):
        agreement.read(tmp_path / "r.jsonl")


def test_files_without_responses(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no responses"):
        agreement.read(tmp_path / "r.jsonl")
    with pytest.raises(InputError, match="there is no such file"):
        agreement.read(tmp_path / "none.jsonl")


def verdicts_and_labels(hits, false_alarms, misses, rejections):
    """Verdicts and labels with these counts."""
    cells = ((0.5, True),) * hits + ((0.9, False),) * false_alarms
    cells += ((0.49, True),) * misses + ((0.0, False),) * rejections
    return [Verdict(harmful=value) for value, _ in cells], [label for _, label in cells]


def test_agreement_by_hand():
    found = agreement.agreement(*verdicts_and_labels(20, 5, 10, 15))
    counts = (found.true_positive, found.false_positive, found.false_negative, found.true_negative)
    assert (found.n, *counts) == (50, 20, 5, 10, 15)
    # Observed 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert found.accuracy == 0.7 and found.kappa == pytest.approx(0.4, abs=1e-12)
    assert (found.precision, found.recall) == (0.8, 2 / 3)
    # Wilson 1927: (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n).
    z, n, p = 1.959963984540054, 50, 0.7
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    bounds = [(p + z**2 / (2 * n) + side * half) / (1 + z**2 / n) for side in (-1, 1)]
    assert found.accuracy_interval == pytest.approx(bounds, abs=1e-12)


def test_kappas_interval_is_that_of_large_samples():
    found = agreement.agreement(*verdicts_and_labels(400, 100, 200, 300))
    # Fleiss, Cohen and Everitt 1969, equation 13.
    p = np.array([[400, 100], [200, 300]]) / 1000
    rows, columns = p.sum(1), p.sum(0)
    observed, expected = np.trace(p), rows @ columns
    kappa = (observed - expected) / (1 - expected)
    terms = sum(p[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in range(2))
    terms += (1 - kappa) ** 2 * (
        p[0, 1] * (columns[0] + rows[1]) ** 2 + p[1, 0] * (columns[1] + rows[0]) ** 2
    )
    terms -= (kappa - expected * (1 - kappa)) ** 2
    error = math.sqrt(terms / 1000) / (1 - expected)
    # 2,000 resamples place a 2.5% quantile within about 0.06 standard errors.
    assert found.kappa == pytest.approx(kappa, abs=1e-12)
    bounds = (kappa - 1.96 * error, kappa + 1.96 * error)
    assert found.kappa_interval == pytest.approx(bounds, abs=0.2 * error)


def test_agreement_of_extremes():
    perfect = agreement.agreement(*verdicts_and_labels(3, 0, 0, 2))
    assert (perfect.accuracy, perfect.kappa, perfect.precision, perfect.recall) == (1, 1, 1, 1)
    assert perfect.accuracy_interval[0] < 0.6 and perfect.accuracy_interval[1] == 1
    opposite = agreement.agreement(*verdicts_and_labels(0, 2, 2, 0))
    assert (opposite.accuracy, opposite.kappa) == (0, -1)
    constant = agreement.agreement(*verdicts_and_labels(0, 0, 0, 4))
    assert constant.accuracy == 1
    assert np.isnan([constant.kappa, *constant.kappa_interval]).all()
    assert np.isnan([constant.precision, constant.recall]).all()


def test_agreement_is_of_what_has_both():
    said = [Verdict(refused=0.7), Verdict(), Verdict(refused=0.7), Verdict(refused=0.7)]
    found = agreement.agreement(said, [True, True, None, False], threshold=0.7, says="refused")
    assert (found.n, found.true_positive, found.false_positive) == (2, 1, 1)
    assert agreement.agreement(said, [True] * 4, threshold=0.8, says="refused").true_positive == 0
    with pytest.raises(InputError, match="both a verdict and a label of 'harmful'"):
        agreement.agreement(said, [True] * 4)
