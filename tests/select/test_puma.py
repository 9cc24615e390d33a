import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.quality.margins import DeepFoolConfig, margins
from ttmpd.select.puma import PUMA
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def test_the_samples_nearest_to_the_boundary_are_kept():
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[1.0], [-1.0]])
    pool = Samples(torch.tensor([[3.0], [-0.5], [2.0], [0.1], [-1.0]]), tuple("abcde"))
    assert PUMA().select(model, pool, 2) == (1, 3)
    # A wrong answer has margin 0.
    assert PUMA().select(model, pool, 2, labels=torch.tensor([1, 1, 0, 0, 1])) == (0, 3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_norm_is_its_own(norm):
    net, pool = tiny_model(), tiny_samples(24)
    found = margins(net, pool, DeepFoolConfig(norm=norm))
    assert PUMA(norm=norm).select(net, pool, 6) == tuple(sorted((-found).topk(6).indices.tolist()))


def test_wrong_settings():
    with pytest.raises(InvalidValueError, match="norm must be one of l2, linf"):
        PUMA(norm="l1")
