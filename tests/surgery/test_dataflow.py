"""What becomes of a layer's answer, on networks written for the purpose."""

import torch
from torch import nn
from torch.nn import functional as F

from ttmpd.surgery.dataflow import layers_of


class Post(nn.Module):
    """conv - norm - relu - conv - norm + shortcut - relu, as in ResNets; sums in place where wanted."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.in_place = in_place

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=self.in_place)))
        if self.in_place:
            y += x
        else:
            y = x + y
        return F.relu(y, inplace=self.in_place)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 1), block, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def found(block: nn.Module):
    return layers_of(Net(block).eval(), torch.randn(2, 3, 5, 5))


def test_norms_sums_and_clippings_are_seen():
    for in_place in (False, True):
        layers = found(Post(in_place))
        first, second = layers["block.conv1"], layers["block.conv2"]
        assert (first.norm, first.adds_to_residual, first.activation) == ("block.bn1", False, "relu")
        assert (second.norm, second.adds_to_residual, second.adder) == ("block.bn2", True, "block")
        assert second.activation == "relu"
        assert (second.shape, second.plain) == ((4, 5, 5), True)


def test_a_sum_that_others_read_too_is_not_clipped_alone():
    class Linear(Post):
        def forward(self, x):
            y = x + self.conv2(torch.clamp(self.conv1(x), 0, 6))
            return y + self.bn1(y)

    layers = found(Linear())
    assert layers["block.conv2"].adds_to_residual
    assert layers["block.conv2"].activation == ""
    assert layers["block.conv1"].activation == ""  # `clamp` is not known: its bounds are the caller's


def test_an_answer_that_two_read_is_neither_normed_nor_joined():
    class Twice(Post):
        def forward(self, x):
            y = self.conv1(x)
            return self.bn1(y) + y

    layer = found(Twice())["block.conv1"]
    assert (layer.norm, layer.adds_to_residual) == ("", False)


def test_relu6_and_dropout_are_looked_through():
    class Six(Post):
        def __init__(self):
            super().__init__()
            self.drop, self.act = nn.Dropout(0.5), nn.ReLU6()

        def forward(self, x):
            return self.act(self.drop(self.conv1(x)))

    assert found(Six())["block.conv1"].activation == "relu6"


def test_a_layer_that_runs_twice_and_one_that_pads_by_itself_are_told_apart():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    class Shared(Post):
        def __init__(self):
            super().__init__()
            self.own = Own(4, 4, 3)

        def forward(self, x):
            return self.own(self.conv1(self.conv1(x)))

    layers = found(Shared())
    assert "block.conv1" not in layers
    assert not layers["block.own"].plain


def test_the_model_is_left_as_it_was():
    net = Net(Post()).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layers_of(net, torch.randn(2, 3, 5, 5))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
