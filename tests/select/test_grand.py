import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.errors import UnsupportedError
from ttmpd.select.grand import GraNd
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def head_only(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Linear(3, 2, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_the_order_is_that_of_the_true_gradient_norms(bias):
    model = head_only(bias)
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 5, 12)[:, None]
    labels = torch.arange(12) % 2
    norms = []
    for row, label in zip(x, labels, strict=True):
        loss = F.cross_entropy(model(row[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    pool = Samples(x, tuple(map(str, range(12))))
    for n in (1, 4, 9):
        wanted = tuple(sorted(torch.stack(norms).topk(n).indices.tolist()))
        assert GraNd().select(model, pool, n, labels=labels) == wanted


def test_two_classes_by_hand():
    """|p - y| = 0.1 sqrt(2), 0.2 sqrt(2), 0.3 sqrt(2) times the length of the features."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.eye_(model[0].weight)
    rows = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).log()
    rows[0] += 10.0  # the same probabilities, but long features
    pool = Samples(rows, ("a", "b", "c"))
    assert GraNd().select(model, pool, 1) == (0,)
    assert GraNd().select(model, pool, 2) == (0, 2)


def test_the_gradient_is_that_of_the_last_layer_alone():
    net, pool = tiny_model(), tiny_samples(20)
    norms = []
    for place in range(20):
        logits = net(pool.batch(slice(place, place + 1)))
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(-1)), list(net.head.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    wanted = tuple(sorted(torch.stack(norms).topk(5).indices.tolist()))
    assert GraNd().select(net, pool, 5, batch_size=8) == wanted


def test_a_model_without_a_head_is_refused(samples):
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.mean((2, 3)) * self.scale

    with pytest.raises(UnsupportedError, match="one layer that gives the logits"):
        GraNd().select(Headless(), samples, 3)
