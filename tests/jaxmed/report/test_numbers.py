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
