import math

import pytest
import torch
from torch import nn

from ttmpd.errors import InvalidValueError
from ttmpd.select.base import answers, error_norm, head_tap, top_n
from ttmpd.select.el2n import EL2N
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def test_highest_takes_equal_values_in_their_order_and_nan_last():
    values = torch.tensor([math.nan, 1.0, -math.inf, 3.0, 1.0, math.inf])
    assert top_n(values, 6) == [5, 3, 1, 4, 2, 0]
    assert top_n(values, 2) == [5, 3]


def test_error_norm_of_two_classes_by_hand():
    logits = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]).log()
    root = math.sqrt(2)  # both classes are off by the same
    assert error_norm(logits, None).tolist() == pytest.approx([0.1 * root, 0.5 * root, 0.2 * root])
    labels = torch.tensor([1, 0, 1])
    assert error_norm(logits, labels).tolist() == pytest.approx([0.9 * root, 0.5 * root, 0.2 * root])


def test_answers_are_the_logits_and_what_the_head_is_given():
    net, pool = tiny_model(), tiny_samples(9)
    tap = head_tap(net, pool)
    logits, features = answers(net, pool, tap, 4)
    with torch.no_grad():
        assert torch.allclose(logits, net(pool.batch(slice(None))), atol=1e-5)
        assert torch.allclose(net.head(features), logits, atol=1e-5)
    same = answers(net, pool, None, 4)
    assert torch.equal(*same)


def test_wrong_arguments(net, samples):
    with pytest.raises(InvalidValueError, match="n must be from 1"):
        EL2N().select(net, samples, 0)
    with pytest.raises(InvalidValueError, match=r"one class per sample, \(12,\)"):
        EL2N().select(net, samples, 3, labels=torch.zeros(11))


def test_nothing_is_chosen_from_an_empty_pool(net, samples):
    assert EL2N().select(net, samples.subset([]), 3) == ()


def test_a_pool_of_which_no_sample_is_answered(samples):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    net[1].weight.data.fill_(math.nan)
    assert len(EL2N().select(net, samples, 3)) == 3
