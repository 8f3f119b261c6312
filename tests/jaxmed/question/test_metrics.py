"""Metrics, against numpy by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.data.pairs import Pair
from jaxmed.files.reading import DataError
from jaxmed.question.metrics import KnownLogits, LogitDifference, ResponseLogprobDifference

VOCABULARY, PROMPT = 11, 4
PAIR = Pair("p", (1, 2, 3, 4), (1, 2, 9, 4), (5, 6, 7), (8, 2), where="file:3")


def random_logits(response=(), seed=0):
    """Logits of a run: of every position of the prompt and the response, [T, V]."""
    length = PROMPT + len(response)
    return np.random.default_rng(seed).normal(0, 3, (length, VOCABULARY)).astype(np.float32)


def value(metric, term, logits):
    """What the metric makes of a run's logits."""
    rows = jnp.asarray(logits)[np.minimum(PROMPT - 1 + term.reading.offsets, len(logits) - 1)]
    found = metric.value(KnownLogits(rows), term.reading)
    assert found.shape == ()
    return float(found)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_sum_exp(logits):
    return np.log(np.exp(logits.astype(np.float64)).sum())


# LogitDifference.


def test_logit_difference_is_of_the_first_tokens_at_the_last_prompt_position():
    metric, logits = LogitDifference(), random_logits()
    (term,) = metric.terms(PAIR)
    assert (term.response, term.sign) == ((), 1)
    expected = float(logits[3, 5]) - float(logits[3, 8])
    np.testing.assert_allclose(value(metric, term, logits), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("harmful", "safe"), [((1, 2), (3, 4)), ((1, 2, 10), (3,)), ((0,), (3, 4, 5, 6))]
)
def test_sets_of_first_tokens_are_compared_by_log_sum_exp(harmful, safe):
    metric, logits = LogitDifference(harmful, safe), random_logits()
    (term,) = metric.terms(PAIR)
    expected = log_sum_exp(logits[3, list(harmful)]) - log_sum_exp(logits[3, list(safe)])
    np.testing.assert_allclose(value(metric, term, logits), expected, rtol=1e-6)


def test_padding_of_the_smaller_set_is_no_token_of_it():
    metric, logits = LogitDifference((1, 2), (3,)), random_logits()
    logits[3, 0] = 1e4  # token 0 is what padding holds
    (term,) = metric.terms(PAIR)
    expected = log_sum_exp(logits[3, [1, 2]]) - float(logits[3, 3])
    np.testing.assert_allclose(value(metric, term, logits), expected, rtol=1e-6)


def test_a_set_replaces_its_own_answer_only():
    metric, logits = LogitDifference(safe_tokens=(3, 4)), random_logits()
    (term,) = metric.terms(PAIR)
    expected = float(logits[3, 5]) - log_sum_exp(logits[3, [3, 4]])
    np.testing.assert_allclose(value(metric, term, logits), expected, rtol=1e-6)


def test_sets_need_no_answers():
    bare = Pair("b", (1,), (2,))
    (term,) = LogitDifference((1,), (2,)).terms(bare)
    np.testing.assert_array_equal(term.reading.tokens, [[1], [2]])


@pytest.mark.parametrize(
    ("metric", "harmful", "safe"),
    [
        (LogitDifference(), (5, 6), (5, 7)),
        (LogitDifference((1, 5), (5, 2)), (1,), (2,)),
        (LogitDifference(harmful_tokens=(4, 5)), (1,), (5,)),
    ],
)
def test_the_same_first_token_on_both_sides_is_refused(metric, harmful, safe):
    pair = Pair("p", (1,), (2,), harmful, safe, where="file:3")
    with pytest.raises(DataError, match=r"^file:3: pair 'p': .* same first token \[5\]"):
        metric.terms(pair)


@pytest.mark.parametrize("missing", ["harmful", "safe"])
def test_logit_difference_needs_both_answers(missing):
    answers = {"harmful_ids": (5,), "safe_ids": (6,), f"{missing}_ids": ()}
    pair = Pair("p", (1,), (2,), **answers, where="file:3")
    with pytest.raises(DataError, match=f"^file:3: pair 'p' has no {missing} answer"):
        LogitDifference().terms(pair)


# ResponseLogprobDifference.

PARTS = {
    # part, decision tokens: which tokens of the harmful and of the safe response are read
    ("all", 1): (slice(0, 3), slice(0, 2)),
    ("decision", 1): (slice(0, 1), slice(0, 1)),
    ("decision", 2): (slice(0, 2), slice(0, 2)),
    ("decision", 9): (slice(0, 3), slice(0, 2)),
    ("continuation", 1): (slice(1, 3), slice(1, 2)),
}


@pytest.mark.parametrize(("part", "decision_tokens"), PARTS)
def test_response_logprob_is_the_mean_over_the_tokens_of_the_part(part, decision_tokens):
    metric = ResponseLogprobDifference(part, decision_tokens)
    terms = metric.terms(PAIR)
    assert [(term.response, term.sign) for term in terms] == [((5, 6, 7), 1), ((8, 2), -1)]
    for term, chosen in zip(terms, PARTS[part, decision_tokens], strict=True):
        logits = random_logits(term.response, seed=term.sign + 1)
        # The logits at a position are of the next token; the first is at the last of the prompt.
        log_p = [log_softmax(logits)[PROMPT - 1 + n, t] for n, t in enumerate(term.response)]
        found = value(metric, term, logits)
        np.testing.assert_allclose(found, np.mean(log_p[chosen]), rtol=1e-5)


@pytest.mark.parametrize("part", ["all", "decision", "continuation"])
def test_rows_of_padding_have_no_weight(part):
    metric = ResponseLogprobDifference(part)
    for term in metric.terms(PAIR):
        logits = random_logits(term.response)
        padding = term.reading.weights == 0
        assert padding.any() and not term.reading.tokens[padding].any()
        spoiled = term.reading.tokens + np.where(padding, 3, 0)
        offsets = np.where(padding, 1, term.reading.offsets)
        reading = dataclasses.replace(term.reading, offsets=offsets, tokens=spoiled)
        other = dataclasses.replace(term, reading=reading)
        assert value(metric, other, logits) == value(metric, term, logits)


def test_responses_of_similar_lengths_share_shapes():
    def shapes(length):
        pair = Pair("p", (1,), (2,), tuple(range(length)), (1,))
        return ResponseLogprobDifference().terms(pair)[0].reading.tokens.shape

    assert shapes(1) == shapes(8) == (8,) and shapes(9) == (16,)


@pytest.mark.parametrize("missing", ["harmful", "safe"])
def test_response_logprob_needs_both_responses(missing):
    answers = {"harmful_ids": (5,), "safe_ids": (6,), f"{missing}_ids": ()}
    pair = Pair("p", (1,), (2,), **answers, where="file:3")
    with pytest.raises(DataError, match=f"^file:3: pair 'p': its {missing} response has 0 tokens"):
        ResponseLogprobDifference().terms(pair)


def test_a_continuation_needs_more_tokens_than_the_decision():
    with pytest.raises(DataError, match="safe response has 2 tokens, none .* 'continuation'"):
        ResponseLogprobDifference("continuation", 2).terms(PAIR)


def test_names_and_units_are_those_of_the_results():
    assert (LogitDifference.name, LogitDifference.metric_unit) == ("logit_diff", "logits")
    named = ResponseLogprobDifference
    assert (named.name, named.metric_unit) == ("response_logprob_diff", "nats per token")
