"""DeepFool against closed forms, and what the radii of attacks must obey."""

import math

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.quality.margins import NORMS, DeepFoolConfig, deepfool, margins, radii
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples

DUAL = {"l2": 2.0, "linf": 1.0}
OWN = {"l2": 2.0, "linf": math.inf}


def linear(n_in: int = 12, n_out: int = 5) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out).double().eval()


def points(n: int = 40, n_in: int = 12) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(1)).double()


def expected(net: nn.Linear, x: torch.Tensor, norm: str, std: torch.Tensor | float = 1.0) -> torch.Tensor:
    """min_k |f_k| / |w_k|, where w_k is divided by std: the gradient by what becomes the input after / std."""
    logits = net(x)
    own = logits.argmax(-1)
    found = torch.full((len(x),), math.inf).double()
    for k in range(net.out_features):
        for row in range(len(x)):
            if k != own[row]:
                w = (net.weight[k] - net.weight[own[row]]) / std
                f = logits[row, own[row]] - logits[row, k]
                found[row] = torch.minimum(found[row], f / torch.linalg.vector_norm(w, DUAL[norm]))
    return found


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_classifier_is_solved_in_one_iteration(norm):
    net, x = linear(), points()
    found = deepfool(net, x, DeepFoolConfig(norm=norm))
    assert (found.margin - expected(net, x, norm)).abs().max() < 1e-6
    assert found.iterations.tolist() == [1] * len(x)
    own = net(x).argmax(-1)
    assert bool((net(x + 1.02 * found.step).argmax(-1) != own).all())
    assert bool((net(x + 0.98 * found.step).argmax(-1) == own).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_network_with_one_hidden_layer_flips_behind_the_boundary_and_not_before(norm):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).double().eval()
    x = points(400)
    found = deepfool(net, x, DeepFoolConfig(norm=norm))
    own = net(x).argmax(-1)
    beyond = (net(x + 1.02 * found.step).argmax(-1) != own).double().mean()
    before = (net(x + 0.9 * found.step).argmax(-1) != own).double().mean()
    assert beyond > 0.99
    assert before < 0.1
    lengths = torch.linalg.vector_norm(found.step, OWN[norm], dim=1)
    assert torch.allclose(found.margin, lengths)
    assert int(found.iterations.max()) <= 50


def test_the_largest_value_norm_gives_the_smaller_margin():
    net, samples = tiny_model(), tiny_samples(20)
    by = {norm: margins(net, samples, DeepFoolConfig(norm=norm)) for norm in NORMS}
    assert bool((by["linf"] < by["l2"]).all())


@pytest.mark.parametrize("norm", NORMS)
def test_margins_are_in_units_of_pixels(norm):
    """Pixels move by the step and the model sees them divided by std: a channel with a small std counts for more."""
    std = (0.5, 0.1, 0.25)
    torch.manual_seed(0)
    head = nn.Linear(3 * 4, 4)
    net = nn.Sequential(nn.Flatten(), head).eval()
    pixels = torch.randint(0, 256, (30, 3, 2, 2), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    samples = Samples(pixels, tuple(map(str, range(30))), mean=(0.4, 0.5, 0.6), std=std)
    per_value = torch.tensor(std).repeat_interleave(4)
    x = samples.batch(slice(None)).flatten(1)
    wanted = expected(head, x, norm, per_value).float()
    assert torch.allclose(margins(net, samples, DeepFoolConfig(norm=norm), batch_size=7), wanted, atol=1e-6, rtol=1e-4)
    step = deepfool(
        net, samples.batch(slice(None)), DeepFoolConfig(norm=norm), std=torch.tensor(std).view(1, 3, 1, 1)
    ).step
    shown = pixels.float() / 255 + 1.02 * step
    moved = (shown - torch.tensor(samples.mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert bool((net(moved).argmax(-1) != net(samples.batch(slice(None))).argmax(-1)).all())


def test_labels_make_wrong_answers_margin_0():
    net, samples = tiny_model(), tiny_samples(16)
    answers = net(samples.batch(slice(None))).argmax(-1)
    labels = answers.clone()
    labels[:5] = (labels[:5] + 1) % 4
    with_labels = margins(net, samples, labels=labels)
    assert with_labels[:5].tolist() == [0.0] * 5
    assert torch.allclose(with_labels[5:], margins(net, samples)[5:], rtol=1e-3)
    assert bool((with_labels[5:] > 0).all())


def test_a_boundary_out_of_sight_is_infinitely_far_and_nan_stays_nan():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 0.0]]))

        def forward(self, x):
            return self.weight.expand(len(x), 2) * (x[:, :1] * 0 + 1)

    x = torch.ones(3, 4)
    x[1] = math.nan
    found = deepfool(Flat(), x)
    assert found.margin[0] == math.inf
    assert math.isnan(found.margin[1])
    assert bool((found.step[[0, 2]] == 0).all())


def test_a_tie_has_margin_0():
    net = nn.Linear(3, 2, bias=False)
    nn.init.ones_(net.weight)
    net.weight.data[1, 0] = -1.0
    x = torch.tensor([[0.0, 1.0, 1.0]])
    assert float(deepfool(net, x).margin) == 0.0


def test_fewer_classes_can_only_hide_boundaries():
    net, samples = tiny_model(), tiny_samples(20)
    own = {k: margins(net, samples, DeepFoolConfig(classes=k)) for k in (2, 4, 10)}
    assert torch.equal(own[4], own[10])
    assert bool((own[4] <= own[2] * 1.05).all())


def test_the_size_of_the_batch_changes_no_margin_and_nothing_is_touched():
    net, samples = tiny_model(dropout=0.5), tiny_samples(11)
    with assert_untouched(net, samples):
        found = margins(net, samples, batch_size=4)
    assert torch.allclose(found, margins(net, samples, batch_size=11), rtol=1e-3)
    assert margins(net, samples.subset([])).shape == (0,)


def test_answers_without_gradients_are_refused():
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    with pytest.raises(UnsupportedError, match="differentiated"):
        deepfool(Cut(3, 2), torch.randn(2, 3))


# --- radii


@pytest.mark.parametrize("rule", [{"rule": "clip"}, {"rule": "clip", "kappa": 0.5}, {"rule": "quantile"},
                                  {"rule": "quantile", "share": 1.0}, {"rule": "quantile", "share": 0.0}])  # fmt: skip
def test_radii_are_bounded_and_rise_with_the_margin(rule):
    margin = torch.cat([torch.rand(50), torch.zeros(3), torch.tensor([math.inf])]).sort().values
    found = radii(margin, 0.3, **rule)
    assert bool(((found >= 0) & (found <= 0.3)).all())
    assert bool((found.diff() >= 0).all())
    assert float(found[-1]) == pytest.approx(0.3)


def test_the_two_rules_by_hand():
    margin = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.8])
    assert radii(margin, 0.3).tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3])
    assert radii(margin, 0.3, kappa=2.0, eps_min=0.05).tolist() == pytest.approx([0.05, 0.2, 0.3, 0.3, 0.3])
    # The three lowest of five; the margin at that share is 0.2.
    found = radii(margin, 0.3, rule="quantile", share=0.6)
    assert found.tolist() == pytest.approx([0.0, 0.15, 0.3, 0.3, 0.3])


def test_margins_that_are_no_numbers():
    margin = torch.tensor([math.nan, math.inf, 0.1])
    for rule in ("clip", "quantile"):
        found = radii(margin, 0.3, rule=rule, share=0.5)
        assert bool(torch.isfinite(found).all())
        assert found[0] == 0.0
        assert found[1] == pytest.approx(0.3)
    assert radii(torch.full((4,), math.inf), 0.3, rule="quantile").tolist() == pytest.approx([0.3] * 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeepFoolConfig(norm="l7"), "norm must be one of l2, linf"),
        (lambda: DeepFoolConfig(classes=1), "classes"),
        (lambda: DeepFoolConfig(max_iter=0), "max_iter"),
        (lambda: radii(torch.ones(2), 0.3, rule="guess"), "rule must be one of clip, quantile"),
        (lambda: radii(torch.ones(2), -0.3), "eps"),
        (lambda: radii(torch.ones(2), 0.3, eps_min=0.4), "eps_min"),
        (lambda: radii(torch.ones(2), 0.3, share=1.1), "share"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(InvalidValueError, match=message):
        call()
