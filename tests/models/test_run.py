"""One batch through a model: what is read from its output."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ttmpd.models.run import output_tensors


@dataclasses.dataclass
class Output:
    """An output as libraries write them."""

    boxes: Tensor
    more: Any = None


A, B = torch.zeros(2, 5), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("raw", "tensors"),
    [
        (A, [A]),
        ((A, B), [A, B]),
        ([A, (B, None)], [A, B]),
        ({"embedding": A, "logits": B}, [A, B]),
        (collections.OrderedDict(out=A, aux=[B]), [A, B]),
        (Output(A, {"x": B}), [A, B]),
        ("text", []),
        (None, []),
    ],
)
def test_all_tensors_of_an_output_are_listed_in_their_order(raw: Any, tensors: list[Tensor]) -> None:
    assert [id(tensor) for tensor in output_tensors(raw)] == [id(tensor) for tensor in tensors]
