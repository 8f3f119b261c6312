"""What is said at the end of a run of a judge."""

import dataclasses
import pathlib

import pytest

from jaxmed.behaviour.judges import agreement
from jaxmed.behaviour.judges.outcome import JudgeOutcome
from jaxmed.behaviour.judges.protocol import Verdict
from jaxmed.report import judge
from tests.jaxmed.report.told import check_golden

VERDICTS = [
    Verdict(harmful=0.9, refused=0.1, cut=True),
    Verdict(harmful=0.2, refused=0.8),
    Verdict(harmful=0.6, refused=0.4),
    Verdict(harmful=0.1, refused=1.0),
]


class Sharp:
    name, meaning, says = "sharp", "says <b>both</b>", ("harmful", "refused")

    def __call__(self, exchanges):
        raise AssertionError("its verdicts are given")


LABELS = {"harmful": [True, False, False, False]}


def outcome(labels, threshold=0.5):
    found = {
        part: agreement.agreement(VERDICTS, own, threshold, part) for part, own in labels.items()
    }
    return JudgeOutcome(pathlib.Path("out/judged.jsonl"), Sharp(), VERDICTS, found, threshold)


def test_verdicts_are_counted_by_part():
    harmful, refused = judge.said(outcome(LABELS))
    assert (harmful.part, harmful.number, harmful.above) == ("harmful", 4, 2)
    assert harmful.mean == pytest.approx(0.45)
    assert (refused.part, refused.above) == ("refused", 2)
    assert judge.said(outcome(LABELS, threshold=0.15))[0].above == 3


def test_of_what_a_judge_does_not_say_nothing_is_told():
    verdicts = [dataclasses.replace(verdict, refused=None) for verdict in VERDICTS]
    found = dataclasses.replace(outcome(LABELS), verdicts=verdicts)
    assert [part.part for part in judge.said(found)] == ["harmful"]
    assert not any("refused" in line for line in judge.closing_lines(found))


def test_a_judge_that_never_says_yes_has_no_precision():
    """And a kappa of 0, which rounding makes no negative one."""
    never = [dataclasses.replace(verdict, harmful=0.0) for verdict in VERDICTS]
    found = agreement.agreement(never, [True, False, True, False], 0.5, "harmful")
    found = dataclasses.replace(found, kappa=-1e-17, kappa_interval=(-0.0, 0.0))
    told = judge.closing_lines(dataclasses.replace(outcome({}), agreement={"harmful": found}))[-1]
    assert "kappa 0.000 [0.000, 0.000], precision –, recall 0.000 (" in told


def test_all_that_a_judge_can_say():
    lines = [*judge.closing_lines(outcome(LABELS)), "", *judge.closing_lines(outcome({}))]
    masses = [0.01, 0.3, 0.9, 0.95]
    doubted = [
        dataclasses.replace(verdict, harmful=None if mass < 0.1 else 0.5, harmful_mass=mass)
        for verdict, mass in zip(VERDICTS, masses, strict=True)
    ]
    lines += ["", *judge.closing_lines(dataclasses.replace(outcome({}), verdicts=doubted))]
    assert lines[0] == "Verdicts: out/judged.jsonl (4 responses; sharp: says <b>both</b>)"
    check_golden("judge", lines)
