"""How far samples lie from a decision boundary: DeepFool in batches, with margins in the units of pixels."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.method import check_fields, check_range
from ttmpd.models.run import evaluating, predict
from ttmpd.models.tokens import carried_task
from ttmpd.progress import track
from ttmpd.tasks.base import Task, check_one_class
from ttmpd.tasks.classification import Classification

NORMS = ("l2", "linf")
RULES = ("clip", "quantile")


def _check_word(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidValueError(f"{name} must be one of {', '.join(choices)}, but got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DeepFoolConfig:
    """How boundaries are searched for.

    Args:
        norm: in which margins are measured, "l2" or "linf".
        max_iter: linearisations before the search is given up.
        overshoot: share of the way that is added, to land behind the boundary and not on it.
        classes: the boundaries to this many likeliest classes are compared, the sample's own counted.
    """

    norm: str = "l2"
    max_iter: int = 50
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        _check_word("norm", self.norm, NORMS)
        check_fields(self, max_iter=1, overshoot=0.0, classes=2)


DEFAULT_DEEPFOOL = DeepFoolConfig()


@dataclass(frozen=True, eq=False)
class DeepFoolResult:
    """The shortest way to another answer that was found.

    Args:
        margin: (B,) length of ``step``; 0 where the answer is wrong already, inf where no boundary was reached, NaN
            where the answer is not finite.
        step: (B, ...) what to add to each sample to come to the boundary; ``1 + overshoot`` times it lies behind.
        iterations: (B,) linearisations that were made.
    """

    margin: Tensor
    step: Tensor
    iterations: Tensor


def margins(
    model: nn.Module,
    samples: Samples,
    search: DeepFoolConfig = DEFAULT_DEEPFOOL,
    *,
    labels: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """(N,) margins on the CPU: how much a sample must change before the answer does.

    They are in pixel units (0..1, the normalisation is divided out), for floating inputs in the units of these.

    Args:
        model: on the device where it shall run; left untouched.
        samples: without augmentation: a margin is a property of the sample.
        search: norm and effort.
        labels: (N,) classes; a sample that is answered otherwise has margin 0. The model's answers without them.
        batch_size: samples per pass.

    Raises:
        UnsupportedError: the samples are text, the model does not predict one class per sample, or its predictions
            cannot be differentiated by the inputs.

    Source: DeepFool (Moosavi-Dezfooli et al., CVPR 2016, arXiv 1511.04599), algorithm 2 and its equation for the
    largest-value norm.
    Cost: per sample and iteration two forward and ``classes - 1`` backward passes; one to four on the demo's network.
    """
    if samples.is_text:
        raise UnsupportedError("margins must be those of inputs that can change a little, but text cannot")
    check_one_class(cast(Task, carried_task(model) or Classification()), "a margin", "choose a method without margins")
    device = next(model.parameters()).device
    std = _std(samples).to(device)
    chunks = [torch.empty(0)]
    starts = range(0, len(samples), batch_size)
    for start in track(starts, "select", len(starts)):
        index = slice(start, start + batch_size)
        target = None if labels is None else labels[index]
        chunks.append(
            deepfool(model, samples.batch(index, device), search, labels=target, std=std).margin.float().cpu()
        )
    return torch.cat(chunks)


def _std(samples: Samples) -> Tensor:
    """What pixels are divided by on their way into the model, broadcast over a batch."""
    if not samples.std:
        return torch.tensor(1.0)
    return torch.tensor(samples.std).view((1, -1) + (1,) * (samples.inputs.dim() - 2))


def deepfool(
    model: nn.Module,
    batch: Tensor,
    search: DeepFoolConfig = DEFAULT_DEEPFOOL,
    *,
    labels: Tensor | None = None,
    std: Tensor | None = None,
) -> DeepFoolResult:
    """For each sample the nearest boundary, by walking to that of the linearised model until the answer changes.

    A sample that has crossed leaves the batch.

    Args:
        model: as in :func:`margins`.
        batch: (B, ...) as the model wants it.
        search: norm and effort.
        labels: (B,) classes; the model's own answers without them.
        std: broadcasts over ``batch``; steps are those of ``batch * std``. Without it they are those of ``batch``.

    Raises:
        UnsupportedError: the answers cannot be differentiated by the inputs.
    """
    scale = torch.ones((), device=batch.device) if std is None else std
    with _differentiated(model):
        logits = _answers(model, batch)
        target = logits.argmax(-1) if labels is None else labels.to(batch.device).long()
        finite = torch.isfinite(logits).all(-1)
        walk = _DeepFool(model, batch, target, _rivals(logits, target, search.classes), scale.to(batch.dtype), search)
        walk.margin[~finite] = math.nan
        active = (finite & (logits.argmax(-1) == target)).nonzero().squeeze(-1)
        for _ in range(search.max_iter):
            active = walk.advance(active)
        walk.margin[active] = math.inf
    return DeepFoolResult(walk.margin, walk.step, walk.iterations)


class _DeepFool:
    """The state of :func:`deepfool`: how far each sample of a batch has come."""

    def __init__(
        self, model: nn.Module, batch: Tensor, target: Tensor, rivals: Tensor, scale: Tensor, search: DeepFoolConfig
    ) -> None:
        self.model, self.batch, self.target = model, batch, target
        self.rivals, self.scale, self.search = rivals, scale, search
        self.step = torch.zeros_like(batch)
        self.margin = batch.new_zeros(len(batch))
        self.iterations = torch.zeros_like(target)

    def advance(self, active: Tensor) -> Tensor:
        """One linearisation for the samples at the given positions; those that have to go on."""
        if not len(active):
            return active
        move, lost = self._nearest(active)
        self.step[active] += move
        self.iterations[active] += 1
        answers = _answers(self.model, self._beyond(active)).argmax(-1)
        # A move of nothing ends on the boundary itself: rounding hides which side is which.
        crossed = ~lost & ((answers != self.target[active]) | (move.flatten(1) == 0).all(-1))
        self.margin[active[lost]] = math.inf
        self.margin[active[crossed]] = row_norms(self.step[active[crossed]], self.search.norm)
        return active[~(crossed | lost)]

    def _beyond(self, active: Tensor) -> Tensor:
        """The samples with their steps, as the model wants them: pixels change by the step, these by step / std."""
        return self.batch[active] + (1 + self.search.overshoot) * self.step[active] / self.scale

    def _nearest(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """(b, ...) the step to the nearest boundary of the linearised model, and (b,) which samples see none.

        w_k = gradient of (g_k - g_t), f_k = g_k - g_t; the nearest has the least |f_k| / |w_k|, in the dual norm.
        """
        here = self._beyond(active).detach().requires_grad_()
        gaps, tiny = self._gaps(here, active)
        best = here.new_full((len(here),), math.inf)
        move = torch.zeros_like(here)
        for number in range(gaps.shape[1]):
            more = number + 1 < gaps.shape[1]
            slope = torch.autograd.grad(gaps[:, number].sum(), here, retain_graph=more)[0] / self.scale
            distance, way = _to_plane(gaps[:, number].detach(), slope, self.search.norm)
            closer = distance < best  # never for NaN
            best = torch.where(closer, distance, best)
            move = torch.where(per_row(closer, move), per_row(distance, move) * way, move)
        lost = ~(torch.isfinite(best) & torch.isfinite(move.flatten(1)).all(-1))
        stays = lost | (gaps.detach().amax(-1) >= -tiny)
        return torch.where(per_row(stays, move), torch.zeros_like(move), move), lost

    def _gaps(self, here: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """(b, K) how far each rival's logit lies above the own one, and (b,) what of it may be rounding."""
        logits = predict(self.model, here)
        if not logits.requires_grad:
            raise UnsupportedError(
                f"{type(self.model).__name__} must have answers that can be differentiated by its inputs, but has "
                "none; select by another method than puma"
            )
        gaps = logits.gather(1, self.rivals[active]) - logits.gather(1, self.target[active, None])
        return gaps, 4 * torch.finfo(logits.dtype).eps * logits.detach().abs().amax(-1)


@contextmanager
def _differentiated(model: nn.Module) -> Iterator[None]:
    """In eval mode, with gradients by the inputs alone."""
    with evaluating(model, gradients=True):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


def _answers(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return predict(model, batch)


def _rivals(logits: Tensor, target: Tensor, classes: int) -> Tensor:
    """(B, K) the likeliest classes beside each sample's own."""
    rivals = torch.nan_to_num(logits).scatter(1, target[:, None], -math.inf)
    return rivals.topk(min(classes, logits.shape[1]) - 1, dim=1).indices


def _to_plane(gap: Tensor, slope: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """(b,) distances to where gap + slope . r = 0, and (b, ...) the direction of length 1 that leads there."""
    length = row_norms(slope, "l2" if norm == "l2" else "l1")
    return gap.abs() / length, slope / per_row(length, slope) if norm == "l2" else slope.sign()


def row_norms(steps: Tensor, norm: str) -> Tensor:
    """(b,) norm of each row: "l2", "linf", or the dual of the latter, "l1"."""
    order = {"l1": 1.0, "l2": 2.0, "linf": math.inf}[norm]
    length: Tensor = torch.linalg.vector_norm(steps.flatten(1), order, dim=1)
    return length


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(b,) values shaped to multiply rows of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def radii(
    margin: Tensor, eps: float, *, rule: str = "clip", kappa: float = 1.0, eps_min: float = 0.0, share: float = 0.2
) -> Tensor:
    """(N,) how strongly each sample may be attacked in adversarial training with labels, never more than ``eps``.

    An attack that goes farther than the margin moves a sample across the boundary while its label stays.

    Args:
        margin: (N,) from :func:`margins`, in the norm of the attack; NaN counts as 0.
        eps: the radius of the attack, in the same units.
        rule: "clip" takes kappa x margin, between ``eps_min`` and ``eps``; "quantile" changes the lowest ``share`` of
            the samples alone, eps x margin / (the margin at that share).
        kappa: factor of "clip".
        eps_min: least radius of "clip".
        share: of "quantile", from 0 to 1.

    Raises:
        InvalidValueError: an argument is out of its range.

    Source: PUMA (arXiv 2405.06298): that radii of low margins fall; both rules are this project's own, since
    the paper's was not at hand.
    """
    _check_word("rule", rule, RULES)
    check_range("eps", eps, 0.0)
    check_range("eps_min", eps_min, 0.0, eps)
    check_range("kappa", kappa, 0.0)
    check_range("share", share, 0.0, 1.0)
    finite_margin = torch.where(torch.isnan(margin), 0.0, margin)
    if rule == "clip":  # 0 x inf is no number
        return (kappa * finite_margin).nan_to_num(nan=0.0, posinf=math.inf).clamp(eps_min, eps)
    n_low = math.ceil(share * len(finite_margin))
    if not n_low:
        return torch.full_like(finite_margin, eps)
    limit = finite_margin.kthvalue(n_low).values
    if not bool(torch.isfinite(limit)):  # even these reach no boundary
        limit = torch.where(torch.isfinite(finite_margin), finite_margin, 0.0).max()
    return torch.where(
        finite_margin < limit, eps * finite_margin / limit, eps * (finite_margin > 0).to(finite_margin.dtype)
    ).clamp(max=eps)
