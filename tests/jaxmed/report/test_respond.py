"""What a run that makes pairs says at its end, on fabricated responses."""

import pathlib

import numpy as np
import pyarrow as pa
import pytest

from jaxmed.behaviour.answers import ROW, RespondOutcome, Unpaired
from jaxmed.behaviour.judges.protocol import Doubt
from jaxmed.report import respond
from tests.jaxmed.report.told import check_golden


def outcome(harm=True, refusal=True, pairs=(3, 1, 2), **fields):
    rows = [
        {
            "id": f"{label}{place}",
            "label": label,
            "split": "A",
            "samples": 8,
            "harm_rate": place / 8 if harm and label == "harmful" else None,
            "refusal_rate": 1 - place / 8 if refusal else None,
            "unfinished": place % 3,
        }
        for label in ("harmful", "benign")
        for place in range(9)
    ]
    asked = {"folder": pathlib.Path("out/my run"), "model": "org/model", "chat": False}
    asked |= {"adapter": "", "dtype": "", "ignore_config": (), "after_thoughts": 0}
    asked |= {"date": "", "template_args": "", "only_think": 0}
    asked |= {"samples": 8, "max_tokens": 128, "templates": 0, "same_start": 0}
    asked |= {"unpaired": Unpaired(0, 0, 0, 9), "doubts": [], "length_differences": None}
    asked |= {"meanings": {"sharp": "says <b>both</b>"}} | fields
    return RespondOutcome(
        table=pa.Table.from_pylist(rows, ROW),
        pairs=dict(zip("ABC", pairs, strict=True)),
        **asked,
    )


def test_rates_are_means_over_prompts_of_what_a_judge_says():
    harmful, benign = respond.answered(outcome())
    assert (harmful.label, harmful.prompts) == ("harmful", 9)
    assert [rate.name for rate in harmful.rates] == ["harm rate", "refusal rate"]
    assert harmful.rates[0].mean.value == pytest.approx(np.mean(np.arange(9) / 8))
    assert harmful.rates[0].mean.low < 0.5 < harmful.rates[0].mean.high
    assert [rate.name for rate in benign.rates] == ["refusal rate"]
    assert respond.answered(outcome(harm=False, refusal=False))[0].rates == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "--split=A"),
        ({"pairs": (0, 2, 1)}, "--split=B"),
        ({"chat": True}, "--chat"),
        ({"adapter": "org/lora"}, "--adapter=org/lora"),
        ({"dtype": "bfloat16"}, "--dtype=bfloat16"),
        ({"ignore_config": ("a", "b")}, "--ignore_config=b"),
        ({"date": "2026-01-31"}, "--date=2026-01-31"),
        ({"template_args": '{"a":1}'}, """'--template_args={"a":1}'"""),
        ({"same_start": 1}, "--metric=response_logprob_diff"),
    ],
)
def test_the_command_is_for_these_pairs(fields, words):
    command = respond.command(outcome(**fields))
    assert command.startswith("python -m launch.mediate --model=org/model '--pairs=out/my run/")
    assert words in command.split()
    assert respond.closing_lines(outcome(**fields))[-1] == command


def test_without_a_split_to_find_units_by_the_command_names_none():
    assert "--split" not in respond.command(outcome(pairs=(0, 0, 1)))


def test_all_that_can_be_said_of_pairs():
    outcomes = [
        outcome(),
        outcome(unpaired=Unpaired(2, 38, 1, 43)),
        outcome(unpaired=Unpaired(2, 0, 0, 9)),
        outcome(harm=False, refusal=False, pairs=(0, 1, 2), templates=2, same_start=3, chat=True),
        outcome(pairs=(0, 0, 1), only_think=4, after_thoughts=2),
        outcome(
            harm=False,
            doubts=[Doubt("harmful", 144, 0, 144)],
            length_differences=[0, 3, 0, 1, 0, 0],
        ),
        outcome(doubts=[Doubt("harmful", 0, 0, 144)], length_differences=[0, 1, 0, 0, 0, 0]),
    ]
    lines = [line for found in outcomes for line in [*respond.closing_lines(found), ""]]
    check_golden("respond", lines[:-1])
