"""Normalisation statistics: what they become, and which weight the data choose."""

import pytest
import torch
from torch import nn

from ttmpd.adapt.norm import Norm
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def samples_of(inputs: torch.Tensor) -> Samples:
    return Samples(inputs, tuple(map(str, range(len(inputs)))))


class Normed(nn.Module):
    """Statistics of the input itself, so that the true ones are known."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, width, bias=False)
        self.head.weight.data = 3 * torch.eye(width)

    def forward(self, x):
        return self.head(self.norm(x))


def shifted(n: int = 400) -> torch.Tensor:
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([5.0, -3.0, 0.0])


@pytest.mark.parametrize("batch_size", [50, 64, 400])
def test_all_of_the_data_gives_the_statistics_of_the_data(batch_size):
    inputs = shifted()
    adapted = Norm(weights=(1.0,)).adapt(Normed().eval(), samples_of(inputs), batch_size=batch_size)
    assert torch.allclose(adapted.model.norm.running_mean, inputs.mean(0), atol=0.05)
    assert torch.allclose(adapted.model.norm.running_var, inputs.var(0), rtol=0.05)
    assert adapted.facts["weight"] == 1.0
    assert "100%" in adapted.note


def test_layers_behind_see_what_adapted_layers_before_give():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    adapted = Norm(weights=(1.0,)).adapt(model, samples_of(shifted()), batch_size=400).model
    assert torch.allclose(adapted[1].running_mean, torch.zeros(3), atol=1e-3)
    assert torch.allclose(adapted[1].running_var, torch.ones(3), atol=1e-2)


def test_none_of_the_data_is_the_source_to_the_bit():
    model, samples = tiny_model(), tiny_samples()
    adapted = Norm(weights=(0.0,)).adapt(model, samples, batch_size=5).model
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in adapted.state_dict().items())


def test_half_and_half_lies_in_between():
    inputs = shifted()
    model = Normed().eval()
    mixed = Norm(weights=(0.5,)).adapt(model, samples_of(inputs), batch_size=400).model
    assert torch.allclose(mixed.norm.running_mean, inputs.mean(0) / 2, atol=1e-3)
    assert torch.allclose(mixed.norm.running_var, (inputs.var(0) + 1) / 2, rtol=1e-2)


def test_the_weight_that_gives_sure_and_varied_answers_is_chosen():
    # Source statistics put everything into class 0; the data's own spread it over three classes.
    model, inputs = Normed().eval(), torch.randn(300, 3, generator=torch.Generator().manual_seed(1))
    far = samples_of(inputs + torch.tensor([50.0, 0.0, 0.0]))
    adapted = Norm().adapt(model, far, batch_size=300)
    assert adapted.facts["weight"] == 1.0
    assert adapted.facts["information"] > 0.5
    assert adapted.facts["information_source"] < 0.01


def test_the_source_is_chosen_where_the_data_say_nothing_else():
    # The data hold three sure classes; their common offset is information that normalising would take away.
    model = Normed().eval()
    classes = 2.0 * torch.eye(3).repeat(40, 1)
    kept = Norm(weights=(0.0, 1.0)).adapt(model, samples_of(classes), batch_size=120)
    spread = Norm(weights=(0.0, 1.0)).adapt(model, samples_of(classes * 0.01), batch_size=120)
    assert kept.facts["information"] == pytest.approx(max(kept.facts["information"], kept.facts["information_source"]))
    assert spread.facts["weight"] == 1.0


def test_the_first_of_equals_is_taken():
    model = Normed().eval()
    model.head.weight.data.zero_()  # all weights are alike: nothing is known
    assert Norm().adapt(model, samples_of(shifted()), batch_size=100).facts["weight"] == 0.0


def test_only_as_many_samples_as_the_limit():
    model, inputs = Normed().eval(), shifted()
    many = Norm(weights=(1.0,), max_samples=40).adapt(model, samples_of(inputs), batch_size=40).model
    assert torch.allclose(many.norm.running_mean, inputs[:40].mean(0), atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_momentum_and_counter_of_the_layers_come_back(momentum):
    model = Normed().eval()
    model.norm.momentum = momentum
    adapted = Norm(weights=(1.0,)).adapt(model, samples_of(shifted()), batch_size=100).model
    assert adapted.norm.momentum == momentum
    assert int(adapted.norm.num_batches_tracked) == 0
    assert not adapted.norm.training


@pytest.mark.parametrize(("n", "batch_size"), [(2, 1), (3, 2), (4, 3), (5, 2), (65, 64)])
def test_no_batch_of_one_is_left_over(n, batch_size):
    adapted = Norm(weights=(1.0,)).adapt(Normed().eval(), samples_of(shifted(n)), batch_size=batch_size).model
    assert bool(torch.isfinite(adapted.norm.running_var).all())
    assert not torch.equal(adapted.norm.running_mean, torch.zeros(3))


def test_one_sample_or_no_statistics_hand_the_teacher_on():
    model = Normed().eval()
    assert Norm().adapt(model, samples_of(shifted(1))).model is model
    plain = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert Norm().adapt(plain, samples_of(shifted())).model is plain
    untracked = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    assert Norm().adapt(untracked, samples_of(shifted())).model is untracked


def test_facts_are_plain_numbers():
    facts = Norm(weights=(0.3, 0.6)).adapt(Normed().eval(), samples_of(shifted())).facts
    assert set(facts) == {"weight", "information"}
    assert all(value == value for value in facts.values())


def test_weights_lie_between_0_and_1():
    with pytest.raises(InvalidValueError, match=r"norm\.weights"):
        Norm(weights=(0.0, 1.5))
