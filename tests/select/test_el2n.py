import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.select.el2n import EL2N


def test_the_least_sure_are_chosen_and_with_labels_the_wrong():
    """The model answers with its inputs: two logits per sample."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    logits = torch.tensor([[0.9, 0.1], [0.55, 0.45], [0.3, 0.7], [0.01, 0.99]]).log()
    pool = Samples(logits, ("a", "b", "c", "d"))
    assert EL2N().select(model, pool, 1) == (1,)
    assert EL2N().select(model, pool, 2) == (1, 2)
    # p of the label: 0.1, 0.55, 0.7, 0.99
    assert EL2N().select(model, pool, 2, labels=torch.tensor([1, 0, 1, 1])) == (0, 1)
    # p of the label: 0.9, 0.55, 0.7, 0.01
    assert EL2N().select(model, pool, 1, labels=torch.tensor([0, 0, 1, 0])) == (3,)
