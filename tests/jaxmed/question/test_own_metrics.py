"""Metrics of one's own: functions of logits, by hand and through the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.engine import scan
from jaxmed.files.reading import DataError
from jaxmed.question.metrics import KnownLogits, OfLogits
from jaxmed.question.question import Question
from tests import tiny
from tests.jaxmed.scans import UNEQUAL, define, largest, worst

CONTRAST = OfLogits(
    lambda logits: logits[0] - (logits[1] + logits[2]) / 2, tokens=(17, 4, 5), name="contrast"
)
LOG_ODDS = OfLogits(
    lambda log_p: log_p[0] - jnp.log1p(-jnp.exp(log_p[0])),
    tokens=lambda pair: pair.safe_ids[:1],
    log_probabilities=True,
    name="refusal_logodds",
    metric_unit="nats",
)
GRANULARITIES = ("module", "neuron")


@pytest.fixture(scope="module")
def rows():
    """Logits of one position, [1, V]."""
    return np.random.default_rng(0).normal(0, 3, (1, 61))


def test_logits_of_the_given_tokens_reach_the_function_in_their_order(rows):
    (term,) = CONTRAST.terms(UNEQUAL)
    assert (term.response, term.sign, term.reading.offsets.tolist()) == ((), 1, [0])
    found = CONTRAST.value(KnownLogits(jnp.asarray(rows)), term.reading)
    assert found == pytest.approx(rows[0, 17] - (rows[0, 4] + rows[0, 5]) / 2, rel=1e-5)


def test_log_probabilities_of_a_pair_s_own_tokens_reach_the_function(rows):
    (term,) = LOG_ODDS.terms(UNEQUAL)
    assert term.whole_vocabulary
    p = np.exp(rows[0]) / np.exp(rows[0]).sum()
    safe = p[UNEQUAL.safe_ids[0]]
    found = LOG_ODDS.value(KnownLogits(jnp.asarray(rows)), term.reading)
    assert found == pytest.approx(np.log(safe / (1 - safe)), rel=1e-5)


@pytest.mark.parametrize("metric", [CONTRAST, LOG_ODDS], ids=lambda metric: metric.name)
def test_the_engine_gives_the_plain_definition_of_a_metric_of_one_s_own(metric):
    question = Question(metric)
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        reference = define(decoder, UNEQUAL, question, GRANULARITIES)
        assert largest(reference) > 1e-2
        found = scan.scan_pair(decoder, UNEQUAL, question, GRANULARITIES)
    assert worst(found, reference) <= 1e-12


def test_a_metric_without_tokens_names_the_pair():
    nothing = OfLogits(lambda logits: logits[0], tokens=lambda pair: ())
    with pytest.raises(DataError, match="pair '12-11': of_logits has no tokens to read"):
        nothing.terms(UNEQUAL)
