"""How reports show numbers."""

import math

import pytest

from jaxmed import pages


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
    assert pages.number(value) == text
    assert pages.percent(-0.001) == "0%"
