"""The certificate: its extremes, and that its tables and sentences are all told."""

import pathlib

import pytest

from jaxmed.report import certificate, rendering
from jaxmed.report.certificate import Extreme, FalseDiscoveries, Worst
from jaxmed.validation.outcomes import Interval
from tests.jaxmed.report.told import check_golden, tell


def extreme(*values):
    rows = [
        {"organism": "o", "seed": seed, "contrast": "c", "value": value}
        for seed, value in enumerate(values)
    ]
    return Extreme.of(min, rows, lambda row: row["value"])


@pytest.mark.parametrize(
    ("values", "seed", "ties", "everywhere", "said"),
    [
        ((2, 1, 3), 1, 0, False, "o 1, c"),
        ((2, 1, 1), 1, 1, False, "o 1, c, and 1 more"),
        ((1, 1), 0, 1, True, "everywhere"),
        ((1,), 0, 0, False, "o 0, c"),
    ],
)
def test_an_extreme_says_which_rows_have_it(values, seed, ties, everywhere, said):
    found = extreme(*values)
    assert (found.row["seed"], found.ties, found.everywhere) == (seed, ties, everywhere)
    assert tell("certificate.sentences.j2", "where", found) == said


def test_of_no_rows_there_is_no_extreme():
    assert extreme() is None


def content(everything):
    """What the template is given, with all that there can be or with nothing."""
    row = {"organism": "decoys", "seed": 3, "contrast": "topic", "granularity": "module"}
    row |= {"auroc": 0.5, "precision_at_k": 0.25, "joint_size": 9, "true_size": 3}
    row |= {"joint_share": 0.875, "missed_bound": 4, "uncomputed": 450}
    some, one = Interval(0.5, 0.25, 0.75), Interval(0.125)
    neuron = dict.fromkeys(("auroc", "precision_at_k", "cpr", "cmd"), some)
    neuron |= {"weakest_planted": one, "strongest_other": Interval(None)}
    given = {
        "organisms": [
            certificate.OrganismRow("decoys", 2, 0.98765, 0.0123, 0.9876, 12.6),
            certificate.OrganismRow("null", 1, None, None, None, None),
        ],
        "methods": [
            certificate.MethodRow("decoys", "larger of both", some, one, neuron, 1.25),
            certificate.MethodRow("decoys", "greedy joint set", None, None, neuron, 0.04),
        ],
        "joint": [certificate.JointRow("decoys", "topic", some, 2, 3, 4, 5, 3, 7.25)],
        "discoveries": [certificate.DiscoveryRow("decoys", "head", 16, 5, 4, 0)],
        "unfit": [{"organism": "decoys", "seed": 9, "unfit": "leaks"}],
    }
    worst = Worst(
        auroc=[Extreme(row, 0, False), Extreme(row | {"granularity": "head"}, 2, False)],
        precision=Extreme(row, 5, True),
        joint_size=Extreme(row, 0, False),
        joint_share=Extreme(row, 0, False),
        false_discoveries=FalseDiscoveries(1, 1328),
        missed=Extreme(row, 1, False),
    )
    nothing = Worst([], None, None, None, None, None)
    return {
        "settings": {"metric": "logit_diff", "joint_size": 14},
        "folder": pathlib.Path("out"),
        "files": ["certify.parquet", "certify.png"],
        "worst": worst if everything else nothing,
        **{name: rows if everything else [] for name, rows in given.items()},
    }


def test_all_that_a_certificate_can_say():
    lines = rendering.lines("certificate.md.j2", **content(everything=True))
    assert "Discoveries where nothing is planted: 1 of 1328 units (0.1%)." in lines
    check_golden("certificate", lines)


def test_what_there_is_nothing_of_has_no_table():
    assert rendering.lines("certificate.md.j2", **content(everything=False)) == [
        "By the settings --metric=logit_diff --joint_size=14:",
        "",
        "Results: out (certify.parquet, certify.png)",
    ]
