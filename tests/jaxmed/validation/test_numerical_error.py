"""Single-neuron effects against float64, as the table of docs/performance.md has them."""

import numpy as np
import pytest

from jaxmed.question.effects import PairEffects
from jaxmed.report import benchmark as report
from jaxmed.validation import numerical_error


@pytest.fixture(scope="module")
def rows():
    return numerical_error.measure("random", *numerical_error.random_model())


def test_float32_effects_are_exact_to_rounding(rows):
    found = [row for row in rows if row.dtype == "float32"]
    assert [row.estimand for row in found] == ["NIE", "TIE"]
    assert max(row.frobenius for row in found) <= 1e-5
    assert min(row.spearman for row in found) > 0.999999


def test_bfloat16_products_leave_effects_and_their_order(rows):
    found = [row for row in rows if row.dtype == "bfloat16"]
    assert [row.estimand for row in found] == ["NIE", "TIE"]
    assert max(row.frobenius for row in found) <= 1e-2
    assert min(row.spearman for row in found) >= 0.999
    # Rounding is there: the policy is no dead flag.
    assert min(row.frobenius for row in found) > 1e-4


def test_parts_are_as_exact_as_float32_or_nearly(rows):
    """split3 within 1.5 times float32's error, split2 at most 1e-5."""
    found = {
        precision: [row for row in rows if row.dtype == precision]
        for precision in ("float32", "split3", "split2")
    }
    for plain, three, two in zip(*found.values(), strict=True):
        assert three.frobenius <= 1.5 * plain.frobenius
        assert 1.5 * plain.frobenius < two.frobenius <= 1e-5
        assert min(three.spearman, two.spearman) >= 0.99999


def test_the_table_shows_every_row(rows):
    lines = report.numerical_error_table(rows)
    assert len(lines) == 1 + len(rows)
    assert "bfloat16" in lines[-1]


def test_errors_are_relative_to_the_effects():
    wanted = np.array([[1.0, -2.0, 0.0]])
    exact = PairEffects(0.0, 0.0, nie={"neuron": wanted}, tie={"neuron": wanted})
    found = PairEffects(
        0.0, 0.0, nie={"neuron": 1.1 * wanted}, tie={"neuron": np.array([[1.0, -2.0, 5.0]])}
    )
    nie, tie = numerical_error.compared(found, exact, model="m", method="x", dtype="float32")
    assert (nie.model, nie.method, nie.dtype) == ("m", "x", "float32")
    assert (nie.estimand, tie.estimand) == ("NIE", "TIE")
    assert nie.frobenius == pytest.approx(0.1)
    assert nie.median == pytest.approx(0.1)
    assert nie.spearman == pytest.approx(1.0)
    # The third neuron has no effect: it counts in the norm and the order, not in the median.
    assert tie.frobenius == pytest.approx(5 / 5**0.5)
    assert tie.median == 0
    assert tie.spearman == pytest.approx(-0.5)
