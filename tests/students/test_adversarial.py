"""Attacks stay in their ball and among the pixels, reach what can be worked out by hand, and leave no traces."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.students.adversarial import Attack, Pixels, attacked, pgd_loss, pixels_of, trades_loss
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples
from ttmpd.training.losses import soft_label_loss

LABELS = torch.arange(12) % 4
RADIUS = torch.linspace(0.0, 0.4, 12)
FREE = Pixels(torch.zeros(()), torch.ones(()), -torch.inf, torch.inf)


def against(labels):
    return lambda logits: F.cross_entropy(logits, labels)


def moved(samples, model=None, **settings):
    """(N, ...) how far every pixel was moved, and the pixels, both in 0..1."""
    model, pixels = model or tiny_model(), pixels_of(samples)
    batch = samples.batch(slice(None))
    attack = Attack(eps=0.4, **settings)
    found = attacked(model, batch, against(LABELS), radius=RADIUS, attack=attack, pixels=pixels)
    return (found - batch) * pixels.std, found * pixels.std + pixels.mean


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(("norm", "order"), [("linf", torch.inf), ("l2", 2.0)])
def test_no_sample_leaves_its_ball_and_no_pixel_its_range(norm, order, random_start):
    step, values = moved(tiny_samples(), norm=norm, random_start=random_start)
    length = torch.linalg.vector_norm(step.flatten(1), order, dim=1)
    assert bool((length <= RADIUS + 1e-5).all())
    assert bool((length[1:] > 0.5 * RADIUS[1:]).all())  # and goes to its border
    assert float(values.min()) >= -1e-6
    assert float(values.max()) <= 1 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_radius_of_0_changes_nothing(norm):
    samples = tiny_samples()
    batch = samples.batch(slice(None))
    found = attacked(tiny_model(), batch, against(LABELS), radius=torch.zeros(12), attack=Attack(norm=norm),
                     pixels=pixels_of(samples))  # fmt: skip
    assert torch.equal(found, batch)


def test_a_linear_classifier_is_moved_to_the_worst_corner():
    # Two classes: the loss of class 0 grows along w1 - w0; within a box the worst is radius x its sign.
    net = nn.Linear(5, 2)
    batch, radius = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1.0, 7)
    found = attacked(net, batch, against(torch.zeros(7, dtype=torch.long)), radius=radius, attack=Attack(), pixels=FREE)
    slope = (net.weight[1] - net.weight[0]).detach()
    assert torch.allclose(found, batch + radius[:, None] * slope.sign(), atol=1e-6)


def test_in_the_l2_norm_it_is_moved_along_the_gradient_in_pixels():
    # Inputs are (pixel - mean) / std, so that the gradient by pixels is that by inputs over std.
    net, std = nn.Linear(5, 2), torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0])
    batch, radius = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.1, 0.3])
    attack = Attack(norm="l2", random_start=False)
    pixels = Pixels(torch.zeros(()), std, -torch.inf, torch.inf)
    found = attacked(net, batch, against(torch.zeros(3, dtype=torch.long)), radius=radius, attack=attack, pixels=pixels)
    slope = (net.weight[1] - net.weight[0]).detach() / std
    assert torch.allclose(found, batch + radius[:, None] * slope / slope.norm() / std, atol=1e-5)


def test_pixels_at_the_end_of_their_range_move_only_inwards():
    samples = Samples(torch.tensor([[[[0]], [[255]], [[100]]]], dtype=torch.uint8), ("a",), (0.5,) * 3, (0.25,) * 3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    net[1].weight.data = torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])  # down, up, down
    found = attacked(net, samples.batch(slice(None)), against(torch.tensor([0])), radius=torch.tensor([0.1]),
                     attack=Attack(), pixels=pixels_of(samples))  # fmt: skip
    assert (found * 0.25 + 0.5).flatten().tolist() == pytest.approx([0.0, 1.0, 100 / 255 - 0.1], abs=1e-6)


def test_the_pixels_behind_the_inputs():
    samples = tiny_samples()
    pixels = pixels_of(samples)
    assert torch.allclose(samples.batch(slice(None)) * pixels.std + pixels.mean, samples.inputs / 255, atol=1e-6)
    values = Samples(torch.randn(2, 5), ("a", "b"))
    assert pixels_of(values).low == -torch.inf
    assert torch.equal(values.inputs * pixels_of(values).std + pixels_of(values).mean, values.inputs)


def test_attacks_leave_gradients_statistics_and_random_state():
    samples, model = tiny_samples(), tiny_model(dropout=0.5)
    batch, attack = samples.batch(slice(None)), Attack(random_start=False)
    with assert_untouched(model, samples):
        attacked(model, batch, against(LABELS), radius=RADIUS, attack=attack, pixels=pixels_of(samples))


def test_the_other_samples_of_a_batch_do_not_matter_even_in_train_mode():
    samples, model = tiny_samples(), tiny_model().train()
    whole = moved(samples, model, random_start=False)[0]
    batch, pixels = samples.batch(slice(0, 3)), pixels_of(samples)
    few = attacked(
        model, batch, against(LABELS[:3]), radius=RADIUS[:3], attack=Attack(random_start=False), pixels=pixels
    )
    assert torch.allclose((few - batch) * pixels.std, whole[:3], atol=1e-5)
    assert model.training


def test_without_a_weight_for_attacks_trades_is_cross_entropy():
    samples, model = tiny_samples(), tiny_model()
    batch, settings = samples.batch(slice(None)), {"radius": RADIUS, "pixels": pixels_of(samples)}
    model.requires_grad_(False)
    plain = F.cross_entropy(model(batch), LABELS)
    assert torch.equal(trades_loss(model, batch, LABELS, attack=Attack(beta=0.0), **settings), plain)
    settings["radius"] = torch.zeros(12)
    assert float(trades_loss(model, batch, LABELS, attack=Attack(), **settings)) == pytest.approx(
        float(plain), abs=1e-5
    )
    assert float(pgd_loss(model, batch, LABELS, attack=Attack(), **settings)) == pytest.approx(float(plain), abs=1e-6)


def test_the_losses_by_hand_on_a_linear_classifier():
    net = nn.Linear(5, 2).requires_grad_(False)
    batch, labels = torch.randn(4, 5), torch.zeros(4, dtype=torch.long)
    radius = torch.full((4,), 0.2)
    worst = batch + 0.2 * (net.weight[1] - net.weight[0]).detach().sign()
    attack = Attack(eps=0.2, beta=2.0)
    pgd = pgd_loss(net, batch, labels, radius=radius, attack=attack, pixels=FREE)
    assert float(pgd) == pytest.approx(float(F.cross_entropy(net(worst), labels)), rel=1e-5)
    # The divergence is largest at one of two opposite corners.
    other = batch - 0.2 * (net.weight[1] - net.weight[0]).detach().sign()
    each = [
        [float(soft_label_loss(net(x[i : i + 1]), net(batch[i : i + 1]))) for x in (worst, other)] for i in range(4)
    ]
    trades = trades_loss(net, batch, labels, radius=radius, attack=attack, pixels=FREE)
    most = float(F.cross_entropy(net(batch), labels)) + 2.0 * sum(map(max, each)) / 4
    assert float(F.cross_entropy(net(batch), labels)) < float(trades) <= most + 1e-5


def test_both_losses_train():
    samples = tiny_samples()
    for loss in (pgd_loss, trades_loss):
        model = tiny_model().train()
        loss(model, samples.batch(slice(None)), LABELS, radius=RADIUS, attack=Attack(steps=2),
             pixels=pixels_of(samples)).backward()  # fmt: skip
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_answers_without_gradients_are_refused():
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    with pytest.raises(UnsupportedError, match="differentiated"):
        attacked(Cut(3, 2), torch.randn(2, 3), against(torch.zeros(2, dtype=torch.long)), radius=torch.ones(2),
                 attack=Attack(), pixels=FREE)  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": "l7"}, "attack.norm must be one of l2, linf"),
        ({"loss": "mart"}, "attack.loss must be one of trades, pgd"),
        ({"rule": "guess"}, "attack.rule must be one of eps, clip, quantile"),
        ({"eps": -1.0}, "attack.eps must be from 0"),
        ({"steps": 0}, "attack.steps must be from 1"),
    ],
)
def test_impossible_attacks_are_refused(wrong, message):
    with pytest.raises(InvalidValueError, match=message):
        Attack(**wrong)
