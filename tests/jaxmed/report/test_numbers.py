"""How reports show numbers."""

import math

import pytest

from jaxmed.report import numbers


@pytest.mark.parametrize(
    "value, text",
    [
        (-6.108, "−6.11"),
        (12345.6, "12346"),
        (-0.00001234, "−0.0000123"),
        (math.nan, "–"),
        (0, "0.00"),
    ],
)
def test_numbers_are_shown_with_three_digits(value, text):
    assert numbers.number(value) == text
    assert numbers.percent(-0.001) == "0%"


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0123, "0.0123"),
        (1.038, "1.04"),
        (9.87, "9.87"),
        (57.3, "57"),
        (100.52, "100"),
        (12345.6, "12,000"),
        (3e9, "over a million"),
        (math.inf, "over a million"),
        (math.nan, "–"),
    ],
)
def test_large_numbers_are_rounded(value, text):
    assert numbers.rounded(value) == text
