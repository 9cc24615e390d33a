"""Fixtures that the tests of pipeline share."""

import pytest
from torch import nn

from compress_cases import set_compare
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.pipeline import analysis
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


@pytest.fixture
def model() -> nn.Module:
    return tiny_model(n_blocks=5)


@pytest.fixture
def samples():
    return tiny_samples(40)


@pytest.fixture
def operations_for_milliseconds(monkeypatch):
    """A block takes a millisecond per thousand multiply-accumulates, and so does everything else."""

    def compare(original, student, batch, **_):
        ms = {
            name: (count_macs(m, batch[:1])[""] / 1e3,) * 5
            for name, m in (("original", original), ("compressed", student))
        }
        return Timings(ms)

    def time_units(_model, units, _batch, **_):
        return tuple(UnitLatency(u.id, u.macs / 1e3, {"linear": u.channels**2 * 64 / 1e3}) for u in units)

    set_compare(monkeypatch, compare)
    monkeypatch.setattr(analysis, "time_units", time_units)
