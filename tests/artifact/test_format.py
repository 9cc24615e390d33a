"""One way to print a number."""

import pytest

from ttmpd.artifact import format


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (999, "999"), (999_600, "1 M"), (853018, "853 k"), (125485706, "125 M"), (3e12, "3 T")],
)
def test_counts(value: float | None, text: str) -> None:
    assert format.count(value) == text
