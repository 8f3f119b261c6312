"""Terms that are read off one run."""

import dataclasses

import numpy as np

from jaxmed.question import joined
from jaxmed.question.metrics import LogitDifference, ResponseLogprobDifference
from tests.jaxmed.scans import UNEQUAL, pair

THREE_AND_TWO = dataclasses.replace(UNEQUAL, harmful_ids=(5, 6, 7), safe_ids=(8, 9))


def rows_of(run):
    """At which offset of the run each term reads each of its rows."""
    return [run.reading.offsets[part.rows].tolist() for part in run.reading.parts]


def test_responses_stand_side_by_side_up_to_the_last_that_is_read():
    run = joined.together(ResponseLogprobDifference().terms(THREE_AND_TWO))
    assert run.response == (5, 6, 8)
    assert run.branches == (1, 1, 2)
    assert run.branches_after((40, 41)) == (0, 0, 1, 1, 2)
    # The first token of either is read at the prompt's last; those after it in its own branch. The
    # metric's own rows are padded to 8, with weights of 0.
    assert rows_of(run) == [[0, 1, *[2] * 6], [0, *[3] * 7]]
    assert (run.rows, run.reading.offsets.tolist()) == (4, [0, 1, 2, 3, 3, 3, 3, 3])
    assert [part.sign for part in run.reading.parts] == [1, -1]
    assert run.whole_vocabulary


def test_nothing_follows_where_only_the_prompt_is_read():
    for metric in (LogitDifference(), ResponseLogprobDifference("decision")):
        run = joined.together(metric.terms(THREE_AND_TWO))
        assert (run.response, run.branches, run.rows) == ((), (), 1)
        assert run.reading.offsets.tolist() == [0]
        assert run.branches_after(THREE_AND_TWO.prompt_ids) is None


def test_equal_responses_are_one():
    term = ResponseLogprobDifference().terms(THREE_AND_TWO)[0]
    run = joined.together([term, dataclasses.replace(term, sign=-1)])
    assert (run.response, run.branches) == ((5, 6), ())
    assert rows_of(run)[0] == rows_of(run)[1]


def test_apart_each_term_has_its_whole_response():
    terms = ResponseLogprobDifference().terms(THREE_AND_TWO)
    runs = joined.apart(terms)
    assert [run.response for run in runs] == [(5, 6, 7), (8, 9)]
    for run, term in zip(runs, terms, strict=True):
        assert run.branches_after(THREE_AND_TWO.prompt_ids) is None
        assert rows_of(run) == [term.reading.offsets.tolist()]


def test_responses_of_other_lengths_share_the_shape_of_what_is_read():
    shapes = set()
    for harmful, safe in ((9, 12), (11, 11), (12, 13)):
        run = joined.together(ResponseLogprobDifference().terms(pair(8, 8, harmful, safe)))
        assert np.all(np.diff(run.reading.offsets) >= 0)
        shapes.add(run.reading.offsets.shape)
    assert shapes == {(24,)}
