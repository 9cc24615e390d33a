"""What looks like a block and is no unit."""

import pytest
import torch
import torchvision
from torch import nn

from block_nets import BLOCK, ROWS, Net, Plain, Res, image, paths
from ttmpd.errors import InvalidValueError, ModelError
from ttmpd.surgery.cut import check_units
from ttmpd.surgery.reasons import Reason
from ttmpd.testing.tiny_models import TinyNet


def test_single_layers_in_a_row_are_no_blocks():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(self.linear(x)).relu()

    assert paths(Net(Layer(), Layer()), ROWS) == []


def test_norms_with_an_activation_are_no_blocks():
    class NormAct(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.LayerNorm(6), nn.ReLU()

        def forward(self, x):
            return self.act(self.norm(x))

    assert paths(Net(NormAct(), NormAct()), ROWS) == []


def test_gates_are_no_units_even_in_a_row():
    class Gate(Plain):
        def forward(self, x):
            return x * self.layer(x).sigmoid()

    found = BLOCK.find(Net(Gate(), Gate()), ROWS)
    assert found.units == ()


def test_squeeze_and_excitation_is_never_a_unit():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.first = torchvision.ops.SqueezeExcitation(8, 4)
            self.second = torchvision.ops.SqueezeExcitation(8, 4)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))

    found = BLOCK.find(Net(), image(8))
    assert found.units == ()


def test_a_block_that_is_called_twice_is_refused():
    model = Net(Res(), Res(), run=lambda body, x: body[1](body[1](body[0](x))))
    assert paths(model, ROWS) == ["body.0"]


class Twice(TinyNet):
    """Runs its first block twice."""

    def forward(self, x):
        x = self.stem(x)
        for block in (self.blocks[0], *self.blocks):
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_a_refused_block_on_a_map_is_named_with_the_reason():
    found = BLOCK.find(Twice().eval(), image(8))
    assert [unit.path for unit in found.units] == ["blocks.1", "blocks.2"]
    assert str(found.not_removable["blocks.0"]) == "is called more than once in one pass: 2 times"


def test_a_tuple_of_which_more_is_used_is_refused():
    class Layer(Res):
        def forward(self, x):
            x = super().forward(x)
            return x, x.mean()

    def run(body, x):
        for layer in body:
            x, extra = layer(x)
        return x + extra

    found = BLOCK.find(Net(Layer(), Layer(), run=run), ROWS)
    assert found.units == ()
    assert found.not_removable["body.0"].reason is Reason.NEEDED


def test_a_block_on_a_list_of_tensors_is_no_unit():
    class Layer(Res):
        def forward(self, xs):
            return [super(Layer, self).forward(x) for x in xs]

    assert paths(Net(Layer(), Layer(), run=lambda body, x: body([x, x])[0]), ROWS) == []


def test_an_attribute_that_the_model_reads_keeps_the_block():
    class Layer(Res):
        gain = 2.0

    model = Net(Layer(), Layer(), run=lambda body, x: body[1](body[0](x) * body[0].gain))
    found = BLOCK.find(model, ROWS)
    assert [unit.path for unit in found.units] == ["body.1"]
    assert "gain" in str(found.not_removable["body.0"])


def test_a_block_that_writes_into_its_input_is_refused():
    class Layer(Res):
        def forward(self, x):
            return x.relu_() + self.layer(x)

    assert paths(Net(Layer(), Res(), Res()), ROWS) == ["body.1", "body.2"]


def test_a_block_whose_output_is_written_into_is_refused():
    model = Net(Res(), Res(), run=lambda body, x: body[1](body[0](x).relu_()))
    assert paths(model, ROWS) == ["body.1"]


def test_a_first_block_that_reads_the_input_itself():
    model = nn.Sequential(nn.Sequential(Res(5)), nn.Linear(5, 3))
    assert paths(model, ROWS) == ["0.0"]


def test_an_input_that_does_not_fit_is_a_model_error():
    with pytest.raises(ModelError, match="shape"):
        BLOCK.find(Net(Res()), torch.zeros(2, 7))


def test_answers_of_nan_are_a_model_error():
    model = Net(Res())
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        BLOCK.find(model, ROWS)


def test_units_of_another_model_are_refused():
    units = BLOCK.find(Net(Res(), Res()), ROWS).units
    check_units(Net(Res(), Res()), units)
    with pytest.raises(InvalidValueError, match="another model"):
        check_units(Net(Res(6), nn.Linear(6, 6)), units)
    with pytest.raises(InvalidValueError, match="body"):
        check_units(Net(Res()), units)
