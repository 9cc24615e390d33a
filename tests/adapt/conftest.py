"""What the tests of adapters that learn share."""

import functools

import pytest

from ttmpd.adapt.norm import Norm


@pytest.fixture(autouse=True)
def mixed_in_any_case(monkeypatch):
    """Random images hold no classes to tell apart: `norm` would be right to leave the model as it is."""
    monkeypatch.setattr("ttmpd.adapt._learner.Norm", functools.partial(Norm, weights=(0.5,)))


@pytest.fixture
def unguarded(monkeypatch):
    """Random images hold no classes to tell apart: the guard would be right to stop."""
    monkeypatch.setattr("ttmpd.adapt._learner.collapse", lambda *_: "")
