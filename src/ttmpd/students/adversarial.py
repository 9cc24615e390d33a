"""Attacks within a radius of each sample, and the two losses that make a student withstand them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.method import check_range
from ttmpd.models.run import evaluating, predict
from ttmpd.quality.margins import NORMS, RULES, per_row, row_norms
from ttmpd.training.losses import soft_label_loss

LOSSES = ("trades", "pgd")


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack on samples while a student learns.

    Args:
        eps: the largest radius, in pixel units (0..1); for floating inputs in the units of these.
        norm: of the radius, "linf" or "l2".
        steps: gradient steps, each a quarter of the sample's radius long.
        random_start: begin anywhere within the radius instead of at the sample.
        loss: "trades" (:func:`trades_loss`) or "pgd" (:func:`pgd_loss`).
        beta: what TRADES weighs the attacked answers with; "pgd" has no use for it.
        rule: radius of each sample: "eps" for all alike; "clip" or "quantile" by margins, see ``quality.margins``.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    steps: int = 10
    random_start: bool = True
    loss: str = "trades"
    beta: float = 6.0
    rule: str = "eps"

    def __post_init__(self) -> None:
        check_range("attack.eps", self.eps, 0.0)
        check_range("attack.steps", self.steps, 1)
        check_range("attack.beta", self.beta, 0.0)
        for name, choices in (("norm", NORMS), ("loss", LOSSES), ("rule", ("eps", *RULES))):
            if getattr(self, name) not in choices:
                raise InvalidValueError(
                    f"attack.{name} must be one of {', '.join(choices)}, but got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, eq=False)
class Pixels:
    """Scale from inputs to pixels: mean + std x input, from ``low`` to ``high``; broadcasts over a batch."""

    mean: Tensor
    std: Tensor
    low: float
    high: float


def pixels_of(samples: Samples, device: torch.device | str = "cpu") -> Pixels:
    """The pixels behind prepared samples; floating inputs are their own pixels and have no known range."""
    if samples.inputs.dtype != torch.uint8:
        return Pixels(torch.zeros((), device=device), torch.ones((), device=device), -torch.inf, torch.inf)
    shape = (1, -1) + (1,) * (samples.inputs.dim() - 2)
    mean = torch.tensor(samples.mean or (0.0,), device=device).view(shape)
    return Pixels(mean, torch.tensor(samples.std or (1.0,), device=device).view(shape), 0.0, 1.0)


def attacked(
    model: nn.Module,
    batch: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    radius: Tensor,
    attack: Attack,
    pixels: Pixels,
) -> Tensor:
    """The batch moved to where ``objective`` is large: no sample farther than its radius, no pixel out of its range.

    The model runs in eval mode with gradients by the inputs alone: an attack neither moves batch statistics, nor leaves
    gradients, and does not depend on the other samples of its batch. A random start draws from torch's random state.

    Args:
        model: left untouched.
        batch: (B, ...) as the model wants it.
        objective: from (B, n_classes) logits to one number, a sum or mean over the samples.
        radius: (B,) in pixel units; a sample with radius 0 stays exactly as it is.
        attack: norm and steps.
        pixels: of the samples.

    Raises:
        UnsupportedError: the answers cannot be differentiated by the inputs.

    Source: projected gradient ascent (Madry et al., ICLR 2018, arXiv 1706.06083), equation 2.4.
    Cost: ``attack.steps`` forward and backward passes.
    """
    size = radius.to(batch).view(-1, *[1] * (batch.dim() - 1))
    value = batch * pixels.std + pixels.mean
    room = (pixels.low - value).clamp(max=0.0), (pixels.high - value).clamp(min=0.0)
    start = _drawn(batch, attack.norm) if attack.random_start else torch.zeros_like(batch)
    step = _within(size * start, size, room, attack.norm)
    with evaluating(model, gradients=True):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for _ in range(attack.steps):
            slope = _slope(model, batch, step, objective, pixels)
            step = _within(step + size / 4 * _steepest(slope, attack.norm), size, room, attack.norm)
    return batch + step / pixels.std


def pgd_loss(
    model: nn.Module, batch: Tensor, labels: Tensor, *, radius: Tensor, attack: Attack, pixels: Pixels
) -> Tensor:
    """Mean cross entropy of the attacked samples. Arguments as :func:`attacked`, and (B,) labels.

    Source: Madry et al., ICLR 2018 (arXiv 1706.06083), equation 2.1.
    """
    moved = attacked(
        model, batch, lambda logits: F.cross_entropy(logits, labels), radius=radius, attack=attack, pixels=pixels
    )
    return F.cross_entropy(predict(model, moved), labels)


def trades_loss(
    model: nn.Module, batch: Tensor, labels: Tensor, *, radius: Tensor, attack: Attack, pixels: Pixels
) -> Tensor:
    """Mean cross entropy of the samples, and beta times how far the attacked answers diverge from those to the samples.

    Arguments as :func:`attacked`, and (B,) labels. With a beta of 0 nothing is attacked.

    Source: TRADES (Zhang et al., ICML 2019, arXiv 1901.08573), equation 5 with the divergence of its code,
    KL(f(x) || f(x')).
    """
    if attack.beta == 0:
        return F.cross_entropy(predict(model, batch), labels)
    with evaluating(model):
        here = predict(model, batch)
    moved = attacked(
        model, batch, lambda logits: soft_label_loss(logits, here), radius=radius, attack=attack, pixels=pixels
    )
    logits = predict(model, batch)
    return F.cross_entropy(logits, labels) + attack.beta * soft_label_loss(predict(model, moved), logits)


def adversarial_loss(
    model: nn.Module, batch: Tensor, labels: Tensor, *, radius: Tensor, attack: Attack, pixels: Pixels
) -> Tensor:
    """:func:`trades_loss` or :func:`pgd_loss`, as the attack says."""
    loss = trades_loss if attack.loss == "trades" else pgd_loss
    return loss(model, batch, labels, radius=radius, attack=attack, pixels=pixels)


def _slope(
    model: nn.Module, batch: Tensor, step: Tensor, objective: Callable[[Tensor], Tensor], pixels: Pixels
) -> Tensor:
    """Gradient of the objective by the pixels; 0 where it is not finite."""
    here = step.detach().requires_grad_()
    value = objective(predict(model, batch + here / pixels.std))
    if not value.requires_grad:
        raise UnsupportedError(
            f"{type(model).__name__} must have answers that can be differentiated by its inputs, but has none; train "
            "it without an attack"
        )
    return torch.autograd.grad(value, here)[0].nan_to_num(0.0, 0.0, 0.0)


def _drawn(batch: Tensor, norm: str) -> Tensor:
    """A step drawn uniformly from the ball of radius 1, for each sample."""
    if norm == "linf":
        return 2 * torch.rand_like(batch) - 1
    share = torch.rand_like(_lengths(batch)) ** (1 / batch[0].numel())
    return share * _steepest(torch.randn_like(batch), norm)


def _steepest(slope: Tensor, norm: str) -> Tensor:
    """The step of length 1 that climbs most; none where there is no slope."""
    return slope.sign() if norm == "linf" else slope / _lengths(slope).clamp_min(1e-12)


def _within(step: Tensor, size: Tensor, room: tuple[Tensor, Tensor], norm: str) -> Tensor:
    """The step cut to the radius, then to the range of pixels, which only makes it shorter."""
    if norm == "linf":
        return step.clamp(-size, size).clamp(*room)
    return (step * (size / _lengths(step).clamp_min(1e-12)).clamp(max=1.0)).clamp(*room)


def _lengths(steps: Tensor) -> Tensor:
    """Euclidean length of each sample's step, shaped to broadcast over the batch."""
    return per_row(row_norms(steps, "l2"), steps)
