"""Which positions of a unit's output matter to the final features: one backward pass for all units."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ttmpd.modules import call, evaluating, find_feature_tap, tapped
from ttmpd.records import Place, Samples, Tap
from ttmpd.text import used_width

MAX_POSITIONS = 64
"""Pixels or tokens per sample that enter a fit; neighbors say nearly the same, and 64 x 100 samples are plenty."""

SENSITIVITY_SAMPLES = 32
"""Samples whose gradients are averaged: a fixed number, so that results do not hang on the batch size."""

_AT_ONCE = 8  # activations of so many are stored: gradients of large images need much memory


def sensitivities(
    model: nn.Module, units: Sequence[Place], batch: Tensor, seed: int = 0, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """Mean squared gradient of the final features at every position of every unit's output, with mean one.

    Where only [CLS] reaches the output, only its position counts in the last layer. The features are projected on
    random signs, drawn per sample, so that one backward pass serves all units.

    Args:
        model: left untouched.
        units: in any order.
        batch: a few dozen samples, (B, ...).
        seed: of the signs.
        kept: (B, S) which tokens of a batch of text are no padding; None for everything else.

    Returns:
        unit id -> (positions,) weights; all ones where nothing reaches the final features. Of text, means are over the
        tokens that are there: they do not depend on how much padding follows.
    """
    tap = find_feature_tap(model, batch[:2], pooled=True)
    taps = {unit.id: Tap(unit.path, "output") for unit in units}
    if tap is not None:
        taps["\0features"] = tap
    with evaluating(model, gradients=True), tapped(model, taps) as seen:
        for parameter in model.parameters():  # inputs may have no gradients (tokens): the weights start the graph
            parameter.requires_grad_(parameter.is_floating_point())
        generator = torch.Generator().manual_seed(seed)
        energies = {unit.id: torch.zeros(_count(unit)) for unit in units}
        for part, there in zip(torch.split(batch, _AT_ONCE), _split(kept, len(batch)), strict=True):
            if there is not None:  # columns of padding alone are left away
                part = part[:, : used_width(there)]
            logits = call(model, part)
            final = seen.get("\0features", logits)
            signs = torch.randint(0, 2, final.shape, generator=generator).to(final) * 2 - 1
            answers = [seen[unit.id] for unit in units]
            gradients = torch.autograd.grad((final * signs).sum(), answers, allow_unused=True)
            for unit, gradient in zip(units, gradients, strict=True):
                if gradient is not None:
                    energy = _energy(gradient, unit)
                    energies[unit.id][: len(energy)] += energy
            seen.clear()
    return {name: _pattern(energy, kept) for name, energy in energies.items()}


def _energy(gradient: Tensor, unit: Place) -> Tensor:
    """(positions,) squared gradients, summed over samples and channels."""
    if unit.layout == "channels_first":
        return gradient.flatten(2).square().sum((0, 1)).cpu()
    return gradient.reshape(len(gradient), -1, unit.channels).square().sum((0, 2)).cpu()


def _pattern(energy: Tensor, kept: Tensor | None = None) -> Tensor:
    """Scaled to mean one; all ones where nothing reaches the final features."""
    if not float(energy.sum()) > 0:
        return torch.ones_like(energy)
    if kept is None or kept.shape[1] != len(energy):
        return energy / energy.mean()
    n_there = kept.sum(0).cpu().to(energy)  # samples that have a token at this position
    return energy / n_there.clamp_min(1) * (n_there.sum() / energy.sum())


def _split(kept: Tensor | None, n: int) -> Sequence[Tensor | None]:
    """What belongs to each part of a batch of ``n``."""
    return [None] * -(-n // _AT_ONCE) if kept is None else torch.split(kept, _AT_ONCE)


def _count(unit: Place) -> int:
    return max(1, int(torch.tensor(unit.shape).prod()) // unit.channels)


def tokens_at(unit: Place, samples: Samples, batch: Tensor) -> Tensor | None:
    """(B, T) which positions of the unit's output hold tokens of the batch and no padding.

    None where its positions are no tokens. A batch of text may be shorter than all samples are.
    """
    per_token = samples.is_text and samples.inputs.shape[1] == _count(unit)
    return samples.kept(batch) if per_token else None


def within(index: Tensor, tokens: Tensor | None) -> Tensor:
    """Those of the positions that a batch holds, see :func:`tokens_at`."""
    return index if tokens is None else index[index < tokens.shape[1]]


def positions(
    unit: Place,
    pattern: Tensor | None = None,
    *,
    seed: int = 0,
    limit: int = MAX_POSITIONS,
    kept: Tensor | None = None,
) -> Tensor:
    """Up to ``limit`` flat positions of the unit's output; the most sensitive one is always among them.

    With ``kept``, (N, S) which tokens of the samples are no padding, positions with more tokens are likelier.
    """
    generator = torch.Generator().manual_seed(seed)
    if kept is None or kept.shape[1] != _count(unit):
        order = torch.randperm(_count(unit), generator=generator)
    else:
        there = kept.any(0).nonzero().flatten().cpu()
        shares = kept.double().mean(0).cpu()[there]
        order = there[torch.multinomial(shares, len(there), generator=generator)]
    if pattern is not None:
        top = int(pattern.argmax())
        order = torch.cat([torch.tensor([top]), order[order != top]])
    return order[:limit].sort().values


def row_weights(
    pattern: Mapping[str, Tensor],
    unit: Place,
    index: Tensor,
    share: float,
    n_items: int,
    tokens: Tensor | None = None,
) -> Tensor:
    """Weights of the rows at the chosen positions, as many times as there are items: samples, or windows of them.

    ``share`` 0 counts all positions alike, 1 trusts the gradients alone. With ``tokens``, see :func:`tokens_at`, the
    rows of padding weigh nothing.
    """
    weights = (1 - share + share * pattern[unit.id][index]).repeat(n_items)
    return weights if tokens is None else weights * tokens[:, index.to(tokens.device)].flatten().to(weights)
