"""How numbers are said in messages."""

import math

import pytest

from retrack_jax.checks import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012349, "0.0123"), (12.34, "12.3"), (999.4, "999"), (999.6, "1,000"), (2379.6, "2,380"), (-1e6, "-1,000,000")]
    + [(math.inf, "inf"), (math.nan, "nan")],
)
def test_losses_in_words(value, text):
    assert figures(value) == text
