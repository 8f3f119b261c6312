"""What is said of an edit in the weights: why it was not exported, and its model card."""

import dataclasses

import pytest

from jaxmed.intervention.export import Criterion, Refusal
from jaxmed.report import model_card
from tests.jaxmed.report.test_clamp import CLAMP, PLAIN, fabricate
from tests.jaxmed.report.told import check_golden

UNMEASURED = (Criterion.HARM_JUDGED, Criterion.COMPLIANCE_JUDGED, Criterion.TEXT)
BOUNDS = {Criterion.COMPLIANCE: -0.05, Criterion.PERPLEXITY: 0.1}


def refused(criterion):
    if criterion in UNMEASURED:
        return Refusal(criterion)
    return Refusal(criterion, 0.025, -0.0125, 0.125, BOUNDS.get(criterion, 0.0))


def test_every_criterion_has_a_sentence():
    said = {criterion: model_card.refusal(refused(criterion)) for criterion in Criterion}
    assert len(set(said.values())) == len(Criterion)
    check_golden("refusal", [f"{criterion}: {text}" for criterion, text in said.items()])


@pytest.mark.parametrize("criterion", [each for each in Criterion if each not in UNMEASURED])
def test_a_criterion_that_was_measured_tells_its_numbers(criterion):
    text = model_card.refusal(refused(criterion))
    if criterion is Criterion.PERPLEXITY:
        assert "-1.2% to +12.5%" in text and "+10.0%" in text and "--perplexity_margin" in text
    else:
        assert "+0.025 (-0.013 to +0.125)" in text or "+0.025 (-0.012 to +0.125)" in text
    if criterion is Criterion.COMPLIANCE:
        assert "above -0.05 (--margin)" in text


@pytest.mark.parametrize("ranked", [True, False])
def test_a_card_tells_what_was_measured_and_how_the_units_were_chosen(ranked, tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    run = found.run | {"weights_hash": "abc", "margin": 0.05, "perplexity_margin": 0.1}
    run |= {"strength": 0.75, "results": "sweep" if ranked else "", "temperature": 0.7}
    card = model_card.card(dataclasses.replace(found, run=run), "bfloat16")
    assert "multiplied by 0.25," in card and "hash to `abc`; weights are stored as bfloat16" in card
    assert ("They had no part in choosing the units." in card) == ranked
    assert ("whether these prompts had a part in that is not known" in card) != ranked
    rows = [row for row in found.table.to_pylist() if row["condition"] == "clamp"]
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows)
    harm = found.row("clamp", "harmful", "harm")
    assert f"| harmful | harm | 40 | 0.800 | 0.100 ({harm['low']:.3f} to " in card
    assert "| benign | nll (nats a token) |" in card and "did not fall by more than 0.05" in card
    if ranked:
        check_golden("model_card", card.splitlines())
