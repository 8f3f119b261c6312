"""Log-probabilities and divergence against the whole logits of plain and edited runs."""

import numpy as np
import pytest

from jaxmed.behaviour import likelihood
from models.errors import InputError
from models.sites import Site
from tests.jaxmed.behaviour.defined import (
    PROMPTS,
    ROWS,
    decoder,
    edits_of,
    hold,
    logits_after,
)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logprobs_and_divergence_are_the_definition(family):
    """Responses of several lengths, against the whole logits of plain and edited runs."""
    rng = np.random.default_rng(1)
    responses = [rng.integers(0, 61, n).tolist() for n in (1, 5, 16, 12, 30)]
    sequences = list(zip(PROMPTS, responses, strict=True))
    held = [hold(Site.MLP, family), hold(Site.HEAD, family, seed=1)]
    found = likelihood.logprobs(decoder(family), sequences, holds=held, batch_size=ROWS)
    divergence = likelihood.kl(decoder(family), sequences, held, batch_size=ROWS)
    np.testing.assert_array_equal(found.counts, [1, 5, 16, 12, 30])
    for index, (prompt, response) in enumerate(sequences):
        whole, rows = prompt + response, slice(len(prompt) - 1, -1)
        edits = [edit for each in held for edit in edits_of(each, len(prompt))]
        edited, plain = (
            _log_softmax(logits_after(family, whole, used)[rows]) for used in (edits, ())
        )
        want = edited[np.arange(len(response)), response]
        np.testing.assert_allclose(found.values[index], want, atol=2e-6)
        np.testing.assert_allclose(found.means[index], want.mean(), atol=2e-6)
        want = np.sum(np.exp(plain) * (plain - edited), axis=-1)
        assert want.min() > 1e-4
        np.testing.assert_allclose(divergence.values[index], want, rtol=1e-4)


def _log_softmax(logits):
    logits = logits.astype(float)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_responses_that_cannot_be_read_are_refused():
    with pytest.raises(InputError, match="response 1 is empty"):
        likelihood.logprobs(decoder(), [([1], [2]), ([1], [])])
    with pytest.raises(InputError, match="65 tokens"):
        likelihood.kl(decoder(), [([1] * 60, [2] * 5)], [])
