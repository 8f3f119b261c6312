"""Which positions are edited, against positions counted by hand."""

import numpy as np
import pytest

from jaxmed.data.pairs import Pair
from jaxmed.files.reading import DataError
from jaxmed.question import positions as positions_lib
from jaxmed.question.positions import Align, Alignment, Positions, align, edited

#       position:  0  1  2  3  4  5
EQUAL = Pair("e", (1, 2, 3, 4, 5), (1, 9, 3, 8, 5), where="file:1")
LONGER = Pair("l", (1, 2, 3, 4, 5, 6), (1, 3, 9, 6), where="file:2")  # from 2: 3 4 5 6 / 1 3 9 6
SHORTER = Pair("s", LONGER.counterfactual_ids, LONGER.prompt_ids, where="file:3")
SAME = Pair("x", (1, 2, 3), (1, 2, 3), where="file:4")
# The base positions [1, 3) are 2 3, the source positions [2, 4) are 2 7.
SPANS = Pair(
    "p",
    (1, 2, 3, 4, 5),
    (9, 9, 2, 7, 4, 5),
    prompt_span=(1, 3),
    counterfactual_span=(2, 4),
    where="file:5",
)
# Spans that reach either prompt's end.
ENDS = Pair(
    "t", (1, 2, 3), (8, 1, 9, 4), prompt_span=(0, 3), counterfactual_span=(1, 4), where="file:6"
)

CASES = [
    # pair, positions, align, edited positions of the base run, and theirs of the source run
    (EQUAL, "last", "end", [4], [4]),
    (EQUAL, "differing", "end", [1, 2, 3, 4], [1, 2, 3, 4]),
    (EQUAL, "prompt", "end", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    (EQUAL, "last", "start", [4], [4]),
    (EQUAL, "differing", "start", [1, 2, 3, 4], [1, 2, 3, 4]),
    (EQUAL, "prompt", "start", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    (LONGER, "last", "end", [5], [3]),
    (LONGER, "differing", "end", [2, 3, 4, 5], [0, 1, 2, 3]),
    (LONGER, "prompt", "end", [2, 3, 4, 5], [0, 1, 2, 3]),
    (LONGER, "prompt", "start", [0, 1, 2, 3], [0, 1, 2, 3]),
    (SHORTER, "last", "end", [3], [5]),
    (SHORTER, "prompt", "end", [0, 1, 2, 3], [2, 3, 4, 5]),
    (SHORTER, "prompt", "start", [0, 1, 2, 3], [0, 1, 2, 3]),
    (SAME, "last", "end", [2], [2]),
    (SAME, "differing", "end", [], []),
    (SAME, "prompt", "end", [0, 1, 2], [0, 1, 2]),
    (SPANS, "prompt", "span", [1, 2], [2, 3]),
    (ENDS, "last", "span", [2], [3]),
    (ENDS, "differing", "span", [1, 2], [2, 3]),
    (ENDS, "prompt", "span", [0, 1, 2], [1, 2, 3]),
]


@pytest.mark.parametrize(
    ("pair", "positions", "how", "base", "source"),
    CASES,
    ids=[f"{case[0].id}-{case[1]}-{case[2]}" for case in CASES],
)
def test_edited_positions_are_those_counted_by_hand(pair, positions, how, base, source):
    found = edited(pair, Positions(positions), Align(how))
    assert (found.base.tolist(), found.source.tolist()) == (base, source)
    swapped = found.swapped()
    assert (swapped.base.tolist(), swapped.source.tolist()) == (source, base)


@pytest.mark.parametrize("how", list(Align))
def test_a_response_follows_its_prompt_however_the_prompts_are_aligned(how):
    found = edited(LONGER, Positions.RESPONSE, how, response_length=3)
    assert (found.base.tolist(), found.source.tolist()) == ([6, 7, 8], [4, 5, 6])


def test_positions_of_the_prompt_do_not_depend_on_a_response():
    for positions in (Positions.LAST, Positions.DIFFERING, Positions.PROMPT):
        without, with_response = (
            edited(LONGER, positions, Align.END, response_length=length) for length in (0, 3)
        )
        np.testing.assert_array_equal(without.base, with_response.base)


def test_alignments_pair_ends_starts_or_spans():
    assert align(LONGER) == align(LONGER, Align.END) == Alignment(2, 0, 4)
    assert align(LONGER, Align.START) == Alignment(0, 0, 4)
    assert align(SPANS, Align.SPAN) == Alignment(1, 2, 2)
    assert align(SPANS, Align.SPAN).swapped() == Alignment(2, 1, 2)


def with_spans(prompt_span, counterfactual_span):
    return Pair(
        "p",
        SPANS.prompt_ids,
        SPANS.counterfactual_ids,
        prompt_span=prompt_span,
        counterfactual_span=counterfactual_span,
        where="file:5",
    )


REFUSED = {
    "no response": (LONGER, "response", "end", "positions='response', but", "response_logprob_diff"),
    "no spans": (EQUAL, "prompt", "span", "cannot be aligned by span", "'prompt_span'"),
    "one span": (with_spans((0, 1), None), "prompt", "span", "'counterfactual_span'"),
    "unequal spans": (with_spans((0, 1), (0, 2)), "prompt", "span", "equally long", "(0, 2)"),
    "base span outside": (with_spans((4, 6), (4, 6)), "prompt", "span", "inside", "5 tokens"),
    "source span outside": (with_spans((3, 5), (5, 7)), "prompt", "span", "inside"),
    "last from the start": (LONGER, "last", "start", "6 and 4 tokens", "align='end'"),
    "differing from the start": (LONGER, "differing", "start", "positions='differing'"),
    "last beyond the span": (SPANS, "last", "span", "align='span'", "positions='last'"),
    "only the base span ends": (with_spans((3, 5), (2, 4)), "last", "span", "do not correspond"),
    "only the source span ends": (with_spans((2, 4), (4, 6)), "last", "span", "do not correspond"),
    "nothing differs": (
        Pair("d", (1, 2, 3), (2, 3), where="file:7"), "differing", "end",
        "differ in no aligned position", "3 and 2 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_positions_that_do_not_pair_up_are_refused(fault):
    pair, positions, how, *said = REFUSED[fault]
    with pytest.raises(DataError) as caught:
        edited(pair, Positions(positions), Align(how))
    message = str(caught.value)
    assert message.startswith(f"{pair.where}: pair '{pair.id}'") and "\n" not in message
    assert all(part in message for part in said), message


def test_flags_spell_the_enumerations():
    assert [*positions_lib.Positions] == ["last", "differing", "prompt", "response"]
    assert [*positions_lib.Align] == ["end", "start", "span"]
