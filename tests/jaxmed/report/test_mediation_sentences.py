"""What a run's verdicts say: every value of each has its sentence."""

import dataclasses
import math

import pytest

from jaxmed.report.mediation import (
    Audited,
    Confirmation,
    JointStep,
    JointVerdict,
    LargestVerdict,
    RankingScore,
    Score,
    ScreenVerdict,
    Significant,
    SpreadVerdict,
    TotalVerdict,
    UnitEffect,
)
from jaxmed.report.numbers import Measured
from tests.jaxmed.report.told import check_golden, tell

TOTAL = TotalVerdict(Measured(-6.108, -6.5, -5.75), "logits", pairs=8, negative=7, complies=6)
LARGEST = LargestVerdict(
    UnitEffect("L2.h1", -5.4321, 0.9), UnitEffect("L0.h3", 0.012345, None), False, "logits"
)
SPREAD = SpreadVerdict(1234, False, 10, 7, 0.05, Significant(1001, 2))
STEPS = tuple(JointStep(f"L5.n{n}", True, 0.5, 0.25) for n in range(2))
JOINT = JointVerdict(STEPS, 0.96, 0.31, 0.9, Confirmation(0.94, 0.3, 3))
SCREEN = ScreenVerdict(
    Audited.BOUNDED,
    candidates=1006,
    sampled=6,
    uncomputed=180,
    group_size=1,
    wanted=3,
    threshold=4.9,
    metric_unit="logits",
    bound=17,
    confidence=0.95,
    hits=1,
    spearman=0.625,
)
SCORE = Score(
    "module", 3, (RankingScore("NIE", 0.5, 1 / 3), RankingScore("larger of both", 1.0, math.nan))
)
replace = dataclasses.replace
SAID = {
    "total": [
        TOTAL,
        replace(TOTAL, te=Measured(0.5, math.nan, math.nan), pairs=1, negative=0, complies=1),
        None,
    ],
    "largest": [LARGEST, replace(LARGEST, tie=LARGEST.nie, same=True)],
    "spread": [
        SPREAD,
        replace(SPREAD, screened=True, shared=None),
        replace(SPREAD, significant=None),
        replace(SPREAD, shared=None, significant=None),
    ],
    "joint": [
        JOINT,
        replace(JOINT, share_tie=0.95),
        replace(JOINT, steps=STEPS[:1], confirmed=None),
    ],
    "screen": [
        SCREEN,
        replace(SCREEN, spearman=None, group_size=4, wanted=12),
        replace(SCREEN, hits=0, bound=2),
        replace(SCREEN, hits=0, bound=1),
        replace(SCREEN, verdict=Audited.COMPLETE, uncomputed=0),
        replace(SCREEN, verdict=Audited.NOT_AUDITED, sampled=0),
        replace(SCREEN, scouts=8, others=24),
        replace(SCREEN, scouts=1, others=1, hits=0, group_size=4),
        replace(SCREEN, scouts=8, others=24, verdict=Audited.NOT_AUDITED, sampled=0),
    ],
    "score": [SCORE],
}


def say(macro, verdict):
    return tell("mediation.sentences.j2", macro, verdict)


def test_all_that_verdicts_can_say():
    check_golden(
        "mediation", [say(macro, verdict) for macro, all_of in SAID.items() for verdict in all_of]
    )


def test_numbers_are_in_the_sentences():
    said = say("total", TOTAL)
    for words in ("8 pairs", "−6.11 [−6.50, −5.75] logits", "negative in 7 of", "6 of 8 pairs"):
        assert words in said
    said = say("largest", LARGEST)
    assert "L2.h1" in said and "−5.43 logits, 90% of TE" in said and "L0.h3" in said
    said = say("screen", SCREEN)
    for words in (
        "1,192 neurons",
        "1,006 were",
        "17 neurons",
        "3rd",
        "4.90 logits",
        "95%",
        "0.625",
    ):
        assert words in said


def test_a_joint_set_that_falls_short_is_told_as_such():
    assert not JOINT.reached and "less than the 90%" in say("joint", JOINT)
    enough = replace(JOINT, share_tie=0.95)
    assert enough.reached and "less than" not in say("joint", enough)


@pytest.mark.parametrize(
    ("bound", "hits", "advised"),
    [(0, 0, ()), (1, 0, ()), (2, 0, ("audit",)), (9, 0, ("audit",)), (9, 1, ("audit", ""))],
)
def test_a_bound_that_leaves_much_open_is_told_with_the_way_out(bound, hits, advised):
    """Of 3 that were asked for: hits in the sample say that gradients ranked some low."""
    said = say("screen", replace(SCREEN, bound=bound, hits=hits))
    assert ("a larger --screen_audit" in said) == ("audit" in advised)
    assert ("a larger --screen " in said) == ("" in advised)
    assert ("another --out" in said) == bool(advised)


def test_scouts_are_told_by_their_own_flags():
    scouted = replace(SCREEN, scouts=8, others=24)
    for said in (say("screen", scouted), say("screen", replace(scouted, hits=0))):
        assert "8 pairs, the scouts" in said and "24 others" in said
        assert "--scout_audit" in said and "screen" not in said and "gradient" not in said
    assert "a larger --scout_top" in say("screen", scouted)


@pytest.mark.parametrize("verdict", Audited)
def test_every_state_of_an_audit_is_told_in_its_own_words(verdict):
    others = [say("screen", replace(SCREEN, verdict=each)) for each in Audited if each != verdict]
    assert say("screen", replace(SCREEN, verdict=verdict)) not in others
