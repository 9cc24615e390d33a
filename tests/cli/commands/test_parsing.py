"""Text of the command line as durations, targets and methods."""

import pytest

from ttmpd.cli.commands import _parsing
from ttmpd.errors import InvalidValueError, UnknownMethodError


def test_methods_from_options():
    chosen = _parsing.choose_methods(
        {"adapt": "none", "score": "ttmpd", "plan": "greedy", "distill": "one_time"},
        ["score.ridge=1e-2", "distill.train_norm=no"],
        7,
    )
    assert chosen["score"].ridge == 0.01
    assert chosen["distill"].steps == 7
    assert chosen["distill"].train_norm is False
    assert chosen["adapt"].name == "none"
    with pytest.raises(UnknownMethodError):
        _parsing.choose_methods({"plan": "none", "distill": "one_time"}, [], None)


@pytest.mark.parametrize("text", ["", "s", "-3s", "0min", "inf", "nan", "3 days"])
def test_durations_that_are_none(text):
    with pytest.raises(InvalidValueError, match="must be like 90s"):
        _parsing.parse_duration(text)


def test_durations():
    assert [_parsing.parse_duration(text) for text in ("90s", "10min", "2m", "1h", "45")] == [90, 600, 120, 3600, 45]
