"""Changes that leave a model's outputs as they are: exact, and replayed on the original model."""

import pytest
import torch
from torch import nn

from ttmpd.models.modules import clone
from ttmpd.records import Lossless, Removal
from ttmpd.surgery.cut import cut, replay
from ttmpd.surgery.lossless import applied, foldable, present, with_norms_gone, within
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units


def answers(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


@pytest.fixture
def batch():
    return tiny_samples(6).batch(slice(None))


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_norms_are_folded_exactly(batch):
    model = tiny_model()
    pairs = foldable(model, batch[:2])
    assert sorted(norm for _, norm in pairs) == sorted(norms(model))
    folded = applied(model, Lossless(pairs, channels_last=True))
    assert norms(folded) == []
    assert norms(model)  # the model is left as it was
    assert torch.allclose(answers(folded, batch), answers(model, batch), atol=1e-5)


def test_depthwise_convolutions_and_matrices_fold_too():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8),
    ).eval()  # fmt: skip
    x = torch.randn(5, 4, 4, 4)
    pairs = foldable(net, x[:2])
    assert pairs == (("0", "1"), ("4", "5"))
    assert torch.allclose(answers(applied(net, Lossless(pairs)), x), answers(net, x), atol=1e-5)


def test_a_norm_before_a_layer_is_left_alone():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert foldable(net, torch.randn(2, 3, 5, 5)) == ()


def test_a_folded_student_is_replayed_on_the_stock_model(batch):
    model = tiny_model()
    units = tiny_units(model)
    how = Lossless(foldable(model, batch[:2]), channels_last=True)
    removals = [Removal(units[1], "drop")]
    student = cut(model, removals)
    here = present(student, how)
    assert len(here.folded) == len(how.folded) - 2  # the norms of the block that is gone
    made = applied(student, here)
    again = replay(model, removals, made.state_dict(), here)
    assert torch.equal(answers(again, batch), answers(made, batch))
    kernels = [m.weight for m in again.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert norms(model)


def test_a_part_of_a_model_gets_its_own_share():
    how = Lossless((("stem", "bn"), ("stage.0.conv1", "stage.0.bn1")))
    assert within(how, "stage.0").folded == (("conv1", "bn1"),)
    assert within(how, "stage.0", "held").folded == (("held.conv1", "held.bn1"),)
    assert within(how, "").folded == how.folded


def test_norms_that_are_gone_leave_a_bias_behind(batch):
    model = tiny_model()
    how = Lossless(foldable(model, batch[:2]))
    fresh = with_norms_gone(clone(model), how)
    fresh.load_state_dict(applied(model, how).state_dict())
    assert torch.allclose(answers(fresh, batch), answers(model, batch), atol=1e-5)


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has them."""

    def __init__(self, n):
        super().__init__(n)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias))


def test_a_norm_that_holds_an_activation_leaves_it_behind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), NormAct(4), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(5, 3, 6, 6)
    net[1].running_mean.copy_(torch.randn(4))
    pairs = foldable(net, x[:2])
    assert pairs == (("0", "1"),)
    folded = applied(net, Lossless(pairs))
    assert norms(folded) == []
    assert torch.allclose(answers(folded, x), answers(net, x), atol=1e-5)
    again = replay(net, [], folded.state_dict(), Lossless(pairs))
    assert torch.equal(answers(again, x), answers(folded, x))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "regnetx_002"])
def test_all_norms_of_timms_networks_are_folded(name):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, pretrained=False, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    folded = applied(net, Lossless(foldable(net, x)))
    assert norms(net)
    assert norms(folded) == []
    assert torch.allclose(answers(folded, x), answers(net, x), rtol=1e-3, atol=1e-5)
