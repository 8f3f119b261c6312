"""Single-neuron effects against float64, as the table of docs/performance.md has them."""

import numpy as np
import pytest

from jaxmed.validation import numerical_error
from jaxmed.validation.numerical_error import Accuracy


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


def test_the_table_shows_every_row(rows):
    lines = numerical_error.table(rows)
    assert len(lines) == 1 + len(rows)
    assert "bfloat16" in lines[-1]


def test_errors_are_relative_to_the_effects():
    exact = Accuracy("m", "x", "float32", "NIE", frobenius=0.1, median=0.1, spearman=1.0)
    wanted = {"neuron": np.array([[1.0, -2.0, 0.0]])}

    class Exact:
        nie = tie = wanted

    found = {"neuron": 1.1 * wanted["neuron"]}
    row = numerical_error._compared(("m", "x", "float32"), found, found, Exact)[0]
    assert row.frobenius == pytest.approx(exact.frobenius)
    assert row.median == pytest.approx(exact.median)
    assert row.spearman == pytest.approx(exact.spearman)
