"""The engine against the plain definition, for every family at every site."""

import dataclasses

import jax
import pytest

from jaxmed.engine import capture, cost, scan
from jaxmed.question import metrics
from jaxmed.question import question as question_lib
from jaxmed.question.positions import Positions
from tests import tiny
from tests.jaxmed.scans import (
    GRANULARITIES,
    UNEQUAL,
    compiled_without_optimising,
    define,
    largest,
    pair,
    some_directions,
    worst,
)

# Families in whose blocks directions of a site take ways of their own to the residual stream.
WITH_DIRECTIONS = ("llama", "gemma2", "olmo2", "gpt_neox")


def asked(config, folder, positions=Positions.PROMPT):
    """The question, and all that can be asked."""
    if config.family not in WITH_DIRECTIONS:
        return question_lib.Question(metrics.LogitDifference(), positions), GRANULARITIES
    given = some_directions(config, folder)
    question = question_lib.Question(metrics.LogitDifference(), positions, directions=given)
    return question, (*GRANULARITIES, "direction")


@pytest.fixture
def batches_of(monkeypatch):
    """A function that sets how many units a batch has: one number compiles half as much as the
    usual two. A span of up to 16 tokens is assumed."""

    def set_to(units):
        monkeypatch.setattr(cost, "_FEW", 1)
        monkeypatch.setattr(cost, "_TOGETHER", {"cpu": 16 * units})

    return set_to


@pytest.mark.parametrize("family", tiny.costly_families())
def test_the_engine_gives_the_plain_definition(family, tmp_path, batches_of):
    # The two sizes that a scan of this span has, one for each precision.
    batches_of(2)
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        question, names = asked(decoder.config, tmp_path)
        reference = define(decoder, UNEQUAL, question, names)
        assert largest(reference) > 1e-2
        # The float32 run below is compiled as users have it.
        with compiled_without_optimising():
            double = scan.scan_pair(decoder, UNEQUAL, question, names)
    batches_of(32)
    decoder = tiny.decoder(family)
    single = scan.scan_pair(decoder, UNEQUAL, question, names)
    errors = worst(double, reference), worst(single, reference)
    print(f"\n{family}: float64 {errors[0]:.1e}, float32 {errors[1]:.1e}")
    assert errors[0] <= 1e-12
    assert errors[1] <= 1e-5
    assert double.y_base == pytest.approx(reference.y_base, rel=1e-12)
    assert double.y_source == pytest.approx(reference.y_source, rel=1e-12)
    assert single.y_base == pytest.approx(reference.y_base, rel=1e-5, abs=1e-5)
    assert single.y_source == pytest.approx(reference.y_source, rel=1e-5, abs=1e-5)

    same = dataclasses.replace(UNEQUAL, counterfactual_ids=UNEQUAL.prompt_ids)
    assert largest(scan.scan_pair(decoder, same, question, names)) == 0


@pytest.mark.parametrize("family", tiny.costly_families(["mistral", "gpt2", "gpt_neox"]))
def test_padding_of_runs_and_prefixes_changes_nothing(family, tmp_path, monkeypatch):
    """They are padded to lengths that are compiled once; in float64 a leak would show."""
    with jax.enable_x64(True):
        decoder = tiny.decoder(family, dtype="float64")
        question, names = asked(decoder.config, tmp_path, Positions.LAST)
        found = scan.scan_pair(decoder, UNEQUAL, question, names)
        monkeypatch.setattr(capture, "SHORTEST", 64)
        padded = scan.scan_pair(decoder, UNEQUAL, question, names)
    assert worst(padded, found) <= 1e-13


@pytest.mark.parametrize("family", tiny.costly_families(["mistral", *tiny.STRUCTURES, "gpt2"]))
def test_responses_that_share_a_run_give_the_plain_definition(family):
    """In which each has a run of its own. The responses are as long as some windows."""
    asked = pair(12, 11, harmful=6, safe=7)
    question = question_lib.Question(metrics.ResponseLogprobDifference(), Positions.PROMPT)
    names = ("layer", "module")
    with jax.enable_x64(True), compiled_without_optimising():
        decoder = tiny.decoder(family, dtype="float64")
        assert len(cost.runs(decoder.config, asked, question)) == 1
        reference = define(decoder, asked, question, names)
        found = scan.scan_pair(decoder, asked, question, names)
        assert largest(reference) > 1e-2
        assert worst(found, reference) <= 1e-12
        assert found.y_base == pytest.approx(reference.y_base, rel=1e-12)
