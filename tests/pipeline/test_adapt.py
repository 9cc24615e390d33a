"""A model adapted alone: what it gives back, and what its artifact can be used for."""

import pytest
import torch

from ttmpd import adapt_to, compress, load
from ttmpd.adapt.none import NoAdaptation
from ttmpd.adapt.tent import Tent
from ttmpd.artifact.read_report import read_report
from ttmpd.errors import InvalidValueError, SamplesError
from ttmpd.testing.tiny_models import assert_untouched, tiny_model


@pytest.fixture
def shifted():
    return torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1


def test_the_model_comes_back_adapted_and_the_given_one_untouched(shifted):
    net = tiny_model()
    with assert_untouched(net):
        found = adapt_to(net, shifted, batch_size=8)
    assert found.report.adaptation.numbers["weight"] > 0
    assert not torch.equal(found.model.stem[1].running_mean, net.stem[1].running_mean)
    assert (found.report.samples.n_fit, found.report.samples.n_held_out) == (34, 6)
    assert len(set(found.sample_ids)) == 40


def test_held_out_samples_are_not_adapted_to(shifted):
    seen = []

    class Recording(NoAdaptation.__mro__[1]):  # type: ignore[misc]
        def adapt(self, teacher, samples, *, batch_size=64, seed=0):
            seen.append(samples)
            return NoAdaptation().adapt(teacher, samples)

    found = adapt_to(tiny_model(), shifted, adapt=Recording(), holdout=0.5)
    assert len(seen[0]) == 20
    assert found.sample_ids[:20] == seen[0].ids  # and the held-out ones, all different, behind them
    assert len(set(found.sample_ids)) == 40
    assert found.report.agreement.share == 1.0


def test_the_artifact_loads_and_can_be_compressed(shifted, tmp_path):
    net = tiny_model()
    found = adapt_to(net, shifted, adapt=Tent(epochs=1, batch_size=8), output=tmp_path / "adapted")
    again = load(tmp_path / "adapted", model=net)
    with torch.no_grad():
        assert torch.equal(again(shifted), found.model(shifted))
    report = read_report(tmp_path / "adapted")
    assert report.methods.keys() == {"adapt"}
    page = (tmp_path / "adapted" / "report.html").read_text()
    assert "adapted</h1>" in page
    assert "compressed</h1>" not in page
    assert "removable unit" not in page  # units were not looked for
    assert compress(again, shifted, latency="0.9x", lossless=False, batch_size=8, num_samples=20).plan.removals


def test_bad_input_is_refused_before_any_work(shifted, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidValueError, match="is a file"):
        adapt_to(tiny_model(), shifted, output=tmp_path / "file")
    for name in ("sample", "speedup", "time_budget"):
        with pytest.raises(InvalidValueError, match=f"must be one of adapt, num_samples.*but got '{name}'"):
            adapt_to(tiny_model(), shifted, **{name: 3})
    with pytest.raises(SamplesError, match="at least 2 samples"):
        adapt_to(tiny_model(), shifted[:2], holdout=0.5)
