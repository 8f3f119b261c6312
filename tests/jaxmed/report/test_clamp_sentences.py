"""What the verdicts of an experiment say: every value of each has its sentence."""

import dataclasses
import inspect
import math

import pytest

from jaxmed.behaviour.judges.protocol import Doubt
from jaxmed.report import clamp
from jaxmed.report.clamp import Change, Move
from jaxmed.report.numbers import Measured
from tests.jaxmed.report.told import check_golden, tell

HARM, REFUSAL, COMPLIANCE = clamp.QUESTIONS[:3]
BY = Measured(-0.7, -0.8, -0.55)
UNTESTED = Measured(0.25, math.nan, math.nan)
CHANGES = [
    Change(0.8, 0.1, BY, Move.FALLS),
    Change(0.1, 0.8, Measured(0.7, 0.55, 0.8), Move.RISES),
    Change(0.5, 0.5, Measured(0.0, -0.1, 0.1), Move.NONE_SHOWN),
    Change(0.5, 0.75, UNTESTED, Move.NOT_TESTED),
]
MEDIANS = clamp.Medians(2.0, 1.5), clamp.Medians(0.98765, 0.75)
SAID = [
    *(clamp.NotJudged(measure, ["sharp", "phrases"]) for measure in ("harm", "refusal")),
    *(clamp.Moved(question, CHANGES[0], 40, 40) for question in clamp.QUESTIONS),
    *(clamp.Moved(HARM, change, 37, 40) for change in CHANGES),
    *(
        clamp.RoleVerdict(move, theirs)
        for move in (Move.FALLS, Move.RISES)
        for theirs in (True, False)
    ),
    *(clamp.NotSpecific(too) for too in (True, False)),
    *(clamp.Perplexity(1.25, 1.5, Measured(1.2, 1.1, 1.3), move) for move in Move),
    clamp.Divergence(Measured(0.12345, 0.1, 0.15)),
    *(
        clamp.ResponsesChanged(label, measure, CHANGES[1])
        for label in ("harmful", "benign")
        for measure in ("repetition", "unfinished")
    ),
    clamp.Perplexity(1.12, 112.6, Measured(100.52, 60.4, 1e9), Move.RISES),
    clamp.WritesOtherwise(100.52, []),
    clamp.WritesOtherwise(1.2, ["repetition", "unfinished"]),
    *(clamp.WritesOtherwise(None, [measure]) for measure in ("repetition", "unfinished")),
    *(clamp.CutResponses(number) for number in (1, 3000)),
    *(
        clamp.Doubted(Doubt(says, none, unsure, 1200))
        for says in ("harmful", "refused")
        for none, unsure in ((7, 5), (7, 0), (0, 5))
    ),
    *(clamp.OnlyThoughts(number) for number in (1, 3000)),
    *(clamp.NoRandomUnits(asked) for asked in (True, False)),
    *(clamp.Likeness(2, 5, contrast, *MEDIANS) for contrast in ("complied", "harmful")),
    clamp.Likeness(1, 1, "complied", *MEDIANS),
    *(clamp.AgainstRandom(HARM, 0.1, 0.75, [0.7, 0.8], BY, move) for move in Move),
    *(
        clamp.AgainstRandom(COMPLIANCE, 0.5, 1.0, draws, BY, Move.FALLS)
        for draws in ([1.0], [1.0, 1.0])
    ),
    clamp.ModulesHeld(REFUSAL, CHANGES[0]),
    *(
        clamp.DoseCurve(HARM, kind, [(0, 0.8), (0.5, 0.6), (4, 0.1)])
        for kind in ("top", "strength")
    ),
    *(clamp.AloneVerdict(question, 4, 2, 1) for question in (HARM, REFUSAL)),
]


def say(verdict):
    return tell("clamp.sentences.j2", verdict.sentence, verdict)


def test_all_that_verdicts_can_say():
    check_golden("clamp", map(say, SAID))


def test_every_kind_of_verdict_is_among_them():
    kinds = [
        kind
        for _, kind in inspect.getmembers(clamp, inspect.isclass)
        if dataclasses.is_dataclass(kind) and hasattr(kind, "sentence")
    ]
    assert {type(verdict) for verdict in SAID} == set(kinds)
    assert len({kind.sentence for kind in kinds}) == len(kinds)


def test_moves_are_those_of_the_interval():
    assert Move.of(-0.2, -0.1) is Move.FALLS and Move.of(0.1, 0.2) is Move.RISES
    assert Move.of(-0.1, 0.1) is Move.of(0.0, 0.1) is Move.of(-0.1, 0.0) is Move.NONE_SHOWN
    assert Move.of(math.nan, math.nan) is Move.of(None, None) is Move.NOT_TESTED
    assert [move.is_shown for move in Move] == [True, True, False, False]


@pytest.mark.parametrize("change", CHANGES, ids=[change.verdict for change in CHANGES])
def test_a_change_is_told_with_its_numbers_and_its_move(change):
    said = say(clamp.Moved(HARM, change, 40, 40))
    assert said.startswith("Harm rate:") and "verdict" not in said
    assert f"{change.before:.2f} → {change.after:.2f}" in said
    words = {"falls": "it falls", "rises": "it rises", "no change shown": "no change"}
    assert words.get(change.verdict, "too few") in said
    assert ("no interval" in said) == (change.verdict is Move.NOT_TESTED)
    if change.verdict is Move.FALLS:
        assert "−0.70" in said and "−0.80 to −0.55" in said


def test_signs_of_harm_are_told_in_words():
    lowers, cannot, raises, _ = (say(v) for v in SAID if isinstance(v, clamp.RoleVerdict))
    assert "lower harm" in lowers and "raise harm" in raises and "cannot be shown" in cannot
