"""Tensors of a state, beside what modules keep as plain data."""

import pytest
import torch
from torch import nn

from ttmpd.models.state import load_tensor_state, tensor_state
from ttmpd.storage import weights_fingerprint


class Noted(nn.Linear):
    """A layer with plain data in its state."""

    def __init__(self, note: str = "first") -> None:
        super().__init__(2, 2)
        self.note = note

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_plain_data_stay_where_they_are():
    model, other = nn.Sequential(Noted("one")), nn.Sequential(Noted("two"))
    state = tensor_state(model)
    assert sorted(state) == ["0.bias", "0.weight"]
    load_tensor_state(other, state)
    assert torch.equal(other[0].weight, model[0].weight)
    assert (model[0].note, other[0].note) == ("one", "two")


def test_weights_of_another_model_are_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        load_tensor_state(Noted(), {"weight": torch.zeros(2, 2)})


def test_plain_data_are_part_of_the_fingerprint():
    torch.manual_seed(0)
    first = Noted("a")
    torch.manual_seed(0)
    second = Noted("b")
    assert weights_fingerprint(first) != weights_fingerprint(second)
    second.note = "a"
    assert weights_fingerprint(first) == weights_fingerprint(second)
