"""Removals of a model that was compressed before, and units that lie in one another."""

import pytest
import torch
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError
from ttmpd.records import Removal, Unit
from ttmpd.surgery.cut import cut, joined
from ttmpd.surgery.find import find_units
from ttmpd.testing.tiny_models import tiny_tokens, tiny_transformer

TOKENS = tiny_tokens(2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_transformer()


@pytest.fixture(scope="module")
def units(model: nn.Module) -> dict[str, Unit]:
    return {unit.id: unit for unit in find_units(model, TOKENS).units}


def removal(unit: Unit) -> Removal:
    return Removal(unit, "narrow", (0,)) if unit.kind in ("head", "neuron") else Removal(unit, "drop")


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(TOKENS)
    return output


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("head:blocks.0.attention.proj", "attention:blocks.0.attention"),
        ("head:blocks.0.attention.proj", "blocks.0"),
        ("neuron:blocks.0.down", "mlp:blocks.0.down"),
        ("neuron:blocks.0.down", "blocks.0"),
        ("attention:blocks.0.attention", "blocks.0"),
        ("mlp:blocks.0.down", "blocks.0"),
    ],
)
def test_what_goes_with_a_larger_unit_later_needs_no_removal(model, units, inner, outer):
    first, second = removal(units[inner]), removal(units[outer])
    for pair in ((first, second), (second, first)):
        with pytest.raises(InvalidValueError, match=f"{inner} goes with {outer}"):
            cut(model, pair)
    smaller = cut(model, [first])
    again = cut(smaller, [removal({unit.id: unit for unit in find_units(smaller, TOKENS).units}[outer])])
    assert joined([first], [second]) == (second,)
    assert torch.equal(answer(cut(model, joined([first], [second]))), answer(again))


def test_an_attention_and_an_mlp_of_one_block_both_go(model, units):
    pair = [removal(units["attention:blocks.0.attention"]), removal(units["mlp:blocks.0.down"])]
    assert joined(pair[:1], pair[1:]) == tuple(pair)
    assert torch.allclose(answer(cut(model, pair)), answer(cut(model, [removal(units["blocks.0"])])), atol=1e-6)
