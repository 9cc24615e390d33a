"""Statistics of layers: which are mixed, by what, in which order they run."""

import pytest
import torch
from torch import nn

from ttmpd.adapt._statistics import (
    layers_with_statistics,
    load_statistics,
    mix_statistics,
    predictions_and_order,
    statistics_of,
)
from ttmpd.data.samples import Samples
from ttmpd.models.run import predictions_of
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples


def samples_of(inputs: torch.Tensor) -> Samples:
    return Samples(inputs, tuple(map(str, range(len(inputs)))))


def noise(n: int) -> torch.Tensor:
    return 3 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([1000.0, -5.0])


class Backwards(nn.Module):
    """Runs its layers in another order than it names them, the second by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.last(input=self.first(x))


def test_layers_are_listed_as_they_run():
    model, samples = Backwards().eval(), samples_of(noise(10))
    with assert_untouched(model, samples):
        outputs, order = predictions_and_order(model, samples, 4)
    assert order == ("first", "last")
    assert torch.equal(outputs, predictions_of(model, samples, 4))


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_batches_add_up_to_the_moments_of_all_samples(batch_size):
    inputs, model = noise(50), Backwards().eval()
    mix_statistics(model, samples_of(inputs), batch_size, {"first": 1.0})
    assert torch.allclose(model.first.running_mean, inputs.mean(0), rtol=1e-5)
    assert torch.allclose(model.first.running_var, inputs.var(0, correction=0), rtol=1e-4)
    assert torch.equal(model.last.running_mean, torch.zeros(2))


def test_a_layer_is_given_what_mixed_layers_before_it_make():
    inputs, model = noise(50), Backwards().eval()
    mix_statistics(model, samples_of(inputs), 50, {"first": 0.5, "last": 1.0})
    reached = model.first(inputs)
    assert torch.allclose(model.last.running_mean, reached.mean(0), rtol=1e-3, atol=1e-3)
    assert torch.allclose(model.last.running_var, reached.var(0, correction=0), rtol=1e-3)


def test_images_are_averaged_over_their_pixels():
    model, samples = tiny_model(), tiny_samples(9)
    name, layer = next(iter(layers_with_statistics(model).items()))
    seen = []
    handle = layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0].detach()))
    predictions_of(model, samples, 9)
    handle.remove()
    mix_statistics(model, samples, 4, {name: 1.0})
    assert torch.allclose(layer.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(layer.running_var, seen[0].var((0, 2, 3), correction=0), rtol=1e-3)


def test_statistics_can_be_put_back():
    model, samples = tiny_model(), tiny_samples(9)
    before = statistics_of(model)
    mix_statistics(model, samples, 4, dict.fromkeys(before, 0.5))
    assert all(not torch.equal(statistics_of(model)[name][0], before[name][0]) for name in before)
    load_statistics(model, before)
    assert all(torch.equal(v, tiny_model().state_dict()[k]) for k, v in model.state_dict().items())
