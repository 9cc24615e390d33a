"""Looking inside a model without leaving a trace."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ttmpd.errors import InvalidValueError, ModelError
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import (
    clone,
    count_parameters,
    has_nan,
    module_at,
    patched_forward,
    prefers_channels_last,
    replace_module,
    to_fast_format,
    to_plain_format,
)
from ttmpd.models.run import evaluating, first_tensor, predict
from ttmpd.models.taps import Tap, find_feature_tap, find_output_layer, read_taps, tapped
from ttmpd.testing.tiny_models import assert_untouched

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Output:
    loss: None
    logits: torch.Tensor


def test_first_tensor_of_nested_outputs():
    t, other = torch.zeros(1), torch.ones(1)
    assert first_tensor(t) is t
    assert first_tensor((None, "text", [t, other])) is t
    assert first_tensor({"aux": None, "out": t}) is t
    assert first_tensor(Output(None, t)) is t
    assert first_tensor("text") is None
    assert first_tensor(None) is None


def test_call_refuses_a_model_without_an_answer():
    class Mute(nn.Module):
        def forward(self, x):
            return {"loss": None}

    with pytest.raises(ModelError, match="Mute"):
        predict(Mute(), X)


def test_paths(net):
    assert module_at(net, "blocks.1.conv1") is net.blocks[1].conv1
    with pytest.raises(InvalidValueError, match=r"blocks\.9"):
        module_at(net, "blocks.9")


def test_replace_finds_every_name_of_a_module():
    shared = nn.Linear(2, 2)
    model = nn.Module()
    model.first, model.all = shared, nn.ModuleList([shared, nn.Linear(2, 2)])
    new = nn.Identity()
    replace_module(model, "first", new)
    assert model.first is new
    assert model.all[0] is new
    assert isinstance(model.all[1], nn.Linear)


def test_clone_is_independent(net):
    twin = clone(net)
    twin.head.weight.data.zero_()
    assert bool(net.head.weight.any())


def test_evaluating_leaves_no_trace_even_after_an_error(net):
    def work() -> None:
        assert not any(module.training for module in net.modules())
        torch.rand(1)
        net.requires_grad_(True)
        net(X).sum().backward()
        raise RuntimeError

    with assert_untouched(net), pytest.raises(RuntimeError), evaluating(net, gradients=True):
        work()


def test_evaluating_switches_gradients_off_unless_asked(net):
    with evaluating(net):
        assert not net(X).requires_grad
    with evaluating(net, gradients=True):
        assert net(X).requires_grad


def test_stubs_answer_in_the_place_of_modules_and_go_again(net):
    before = net(X)
    with assert_untouched(net), evaluating(net):
        with patched_forward(net, {"blocks.0": lambda x: x * 0, "blocks.1": lambda x: x}):
            assert not torch.equal(net(X), before)
        assert torch.equal(net(X), before)


def test_a_stub_gives_an_instance_its_own_forward_back():
    layer = nn.Linear(2, 2)
    layer.forward = own = lambda x: x + 1
    model = nn.Sequential(layer)
    with patched_forward(model, {"0": lambda x: x}):
        assert float(model(torch.zeros(1))) == 0.0
    assert layer.forward is own


def test_taps_read_inputs_and_outputs(net):
    taps = {"x": Tap("blocks.1", "input"), "y": Tap("blocks.1", "output"), "before": Tap("blocks.0", "output")}
    with assert_untouched(net), evaluating(net), tapped(net, taps) as seen:
        net(X)
    assert torch.equal(seen["x"], seen["before"])
    with evaluating(net):
        assert torch.equal(net.blocks[1](seen["x"]), seen["y"])


def test_read_stops_at_the_last_tap(net):
    ran = []
    net.blocks[1].register_forward_hook(lambda *_: ran.append("blocks.1"))
    net.blocks[2].register_forward_hook(lambda *_: ran.append("blocks.2"))
    with evaluating(net):
        seen = read_taps(net, X, {"a": Tap("blocks.0", "output"), "b": Tap("blocks.1", "output")})
    assert set(seen) == {"a", "b"}
    assert ran == ["blocks.1"]


def test_keyword_inputs_are_read():
    class Inner(nn.Module):
        def forward(self, *, hidden):
            return hidden + 1

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(hidden=x)

    assert torch.equal(read_taps(Outer(), X, {"x": Tap("inner", "input")})["x"], X)


# --- head and features


def test_head_and_feature_map(net):
    with assert_untouched(net):
        assert find_output_layer(net, X) == "head"
        assert find_feature_tap(net, X) == Tap("blocks", "output")
        assert find_feature_tap(net, X, pooled=True) == Tap("head", "input")


def test_the_patches_of_a_transformer_are_no_final_features():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 4, stride=4)  # a map as wide as the head's input
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    assert find_feature_tap(Net(), X) == Tap("head", "input")


def test_a_map_with_channels_last_is_found():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.norm(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))

    assert find_feature_tap(Net(), X) == Tap("norm", "output")


@pytest.mark.parametrize(
    "tail", [nn.Sequential(nn.Linear(6, 4), nn.Softmax(-1)), nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))]
)
def test_logits_that_no_single_layer_gives_have_no_head(tail):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), tail)
    assert find_output_layer(model, X) is None
    assert find_feature_tap(model, X) is None


def test_a_convolution_may_be_the_head():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.Flatten())
    assert find_output_layer(model, X) == "2"


# --- counting


def test_parameters_and_macs_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(384, 5))
    assert count_parameters(model) == 6 * 3 * 9 + 6 + 384 * 5 + 5
    macs = count_macs(model, X)
    assert macs["0"] == 64 * 6 * 3 * 9
    assert macs["2"] == 384 * 5
    assert macs[""] == macs["0"] + macs["2"]


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12


def test_macs_of_a_model_with_a_learned_token():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Parameter(torch.zeros(1, 4)), nn.Sequential(nn.Linear(4, 2))

        def forward(self, x):
            return self.head(self.token) + 0 * x.mean()

    model = Net()
    with assert_untouched(model):
        assert count_macs(model, X[:1])[""] == 8


def test_has_nan():
    assert not has_nan(X)
    assert has_nan(torch.tensor([1.0, float("nan")]))
    assert has_nan(torch.tensor([float("inf")]))


def test_memory_formats_change_no_value(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    weight = net.blocks[0].conv1.weight
    assert prefers_channels_last(net)
    assert not prefers_channels_last(net.head)
    assert to_fast_format(net).blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    to_plain_format(net)
    assert weight.is_contiguous()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
