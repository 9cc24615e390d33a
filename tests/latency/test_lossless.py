"""Which lossless changes are made: those that are measured to be faster, and run."""

import pytest
from torch import nn

from ttmpd.latency import lossless
from ttmpd.latency.lossless import find_lossless
from ttmpd.latency.timing import Timings
from ttmpd.records import UNCHANGED
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


@pytest.fixture
def batch():
    return tiny_samples(6).batch(slice(None))


def test_what_gains_nothing_is_not_done(batch, monkeypatch):
    ms = {"original": 10.0, "channels_last": 9.9, "lossless": 5.0}

    def time_models(models, _batch, **_):
        return Timings({name: (ms.get(name, 5.0 if "folded" in name else 20.0),) * 3 for name in models})

    monkeypatch.setattr(lossless, "time_models", time_models)
    how, rounds = find_lossless(tiny_model(), batch)
    assert how.folded
    assert rounds.ratio("original", "lossless").median_ms == pytest.approx(2.0)
    ms["lossless"] = 9.9  # on the whole batch it gains nothing
    how, rounds = find_lossless(tiny_model(), batch)
    assert how == UNCHANGED
    assert rounds.ratio("original", "lossless").median_ms == 1.0
    monkeypatch.setattr(
        lossless, "time_models", lambda models, _b, **_: Timings({name: (ms.get(name, 11.0),) * 3 for name in models})
    )
    assert find_lossless(tiny_model(), batch)[0] == UNCHANGED


def test_a_format_that_breaks_the_model_is_not_taken(batch, monkeypatch):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.head(y.view(len(y), -1))

    monkeypatch.setattr(
        lossless, "time_models",
        lambda models, _b, **_: Timings({n: (10.0 if n == "original" else 1.0,) * 3 for n in models}),
    )  # fmt: skip
    how, _ = find_lossless(Views().eval(), batch)
    assert how == UNCHANGED
