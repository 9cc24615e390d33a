"""Which positions of a unit's output matter to the final features: one backward pass for all units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import trim_padding
from ttmpd.models.run import evaluating, predict
from ttmpd.models.taps import Tap, find_feature_tap, tapped
from ttmpd.records import Location

MAX_POSITIONS = 64
"""Pixels or tokens per sample that enter a fit; neighbors say nearly the same, and 64 x 100 samples are plenty."""

SENSITIVITY_SAMPLES = 32
"""Samples whose gradients are averaged: a fixed number, so that results do not hang on the batch size."""

_AT_ONCE = 8  # activations of so many are stored: gradients of large images need much memory


def squared_gradients(
    model: nn.Module, units: Sequence[Location], samples: Samples, seed: int = 0
) -> dict[str, Tensor]:
    """Mean squared gradient of the final features at every position of every unit's output, with mean one.

    Where only [CLS] reaches the output, only its position counts in the last layer. The features are projected on
    random signs, drawn per sample, so that one backward pass serves all units.

    Args:
        model: left untouched.
        units: in any order.
        samples: the first few dozen are looked at.
        seed: of the signs.

    Returns:
        unit id -> (positions,) weights; all ones where nothing reaches the final features. Of text, means are over the
        tokens that are there: they do not depend on how much padding follows.
    """
    few, device = samples.first(SENSITIVITY_SAMPLES), next(model.parameters()).device
    tap = find_feature_tap(model, few.batch(slice(0, 2), device), pooled=True)
    taps = {unit.id: Tap(unit.path, "output") for unit in units}
    if tap is not None:
        taps["\0features"] = tap
    with evaluating(model, gradients=True), tapped(model, taps) as seen:
        for parameter in model.parameters():  # inputs may have no gradients (tokens): the weights start the graph
            parameter.requires_grad_(parameter.is_floating_point())
        generator = torch.Generator().manual_seed(seed)
        energies = {unit.id: torch.zeros(_count(unit)) for unit in units}
        for part in few.batches(_AT_ONCE, device):
            logits = predict(model, part)
            final = seen.get("\0features", logits)
            signs = torch.randint(0, 2, final.shape, generator=generator).to(final) * 2 - 1
            answers = [seen[unit.id] for unit in units]
            gradients = torch.autograd.grad((final * signs).sum(), answers, allow_unused=True)
            for unit, gradient in zip(units, gradients, strict=True):
                if gradient is not None:
                    energy = _energy(gradient, unit)
                    energies[unit.id][: len(energy)] += energy  # a batch of text may be shorter than all samples are
            seen.clear()
    return {unit.id: _pattern(energies[unit.id], tokens_at(unit, few, few.inputs)) for unit in units}


def _energy(gradient: Tensor, unit: Location) -> Tensor:
    """(positions,) squared gradients, summed over samples and channels."""
    if unit.layout == "channels_first":
        return gradient.flatten(2).square().sum((0, 1)).cpu()
    return gradient.reshape(len(gradient), -1, unit.channels).square().sum((0, 2)).cpu()


def _pattern(energy: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Scaled to mean one; all ones where nothing reaches the final features."""
    if not float(energy.sum()) > 0:
        return torch.ones_like(energy)
    if tokens is None:
        return energy / energy.mean()
    n_there = tokens.sum(0).cpu().to(energy)  # samples that have a token at this position
    return energy / n_there.clamp_min(1) * (n_there.sum() / energy.sum())


def _count(unit: Location) -> int:
    return max(1, int(torch.tensor(unit.shape).prod()) // unit.channels)


def tokens_at(unit: Location, samples: Samples, batch: Tensor) -> Tensor | None:
    """(B, T) which positions of the unit's output hold tokens of the batch and no padding; None where they are none."""
    per_token = samples.is_text and samples.inputs.shape[1] == _count(unit)
    return samples.token_mask(batch) if per_token else None


def choose_positions(
    unit: Location,
    pattern: Tensor | None = None,
    *,
    seed: int = 0,
    limit: int = MAX_POSITIONS,
    tokens: Tensor | None = None,
) -> Tensor:
    """Up to ``limit`` flat positions of the unit's output; the most sensitive one is always among them.

    With ``tokens`` of all samples, see :func:`tokens_at`, positions with more tokens are likelier.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokens is None:
        order = torch.randperm(_count(unit), generator=generator)
    else:
        there = tokens.any(0).nonzero().flatten().cpu()
        shares = tokens.double().mean(0).cpu()[there]
        order = there[torch.multinomial(shares, len(there), generator=generator)]
    if pattern is not None:
        top = int(pattern.argmax())
        order = torch.cat([torch.tensor([top]), order[order != top]])
    return order[:limit].sort().values


@dataclass(frozen=True, eq=False)
class PositionSample:
    """Which rows of each unit's output enter a fit, and how much each weighs.

    Args:
        samples: all of them.
        pattern: what each position of a unit means to the final features, see :func:`squared_gradients`.
        chosen: (positions,) of each unit, see :func:`choose_positions`.
        share: 0 counts all positions alike, 1 trusts the gradients alone.
    """

    samples: Samples
    pattern: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    share: float

    def index(self, unit: Location, batch: Tensor) -> Tensor:
        """The positions that a pass over the batch holds: of text, those within its longest sample."""
        tokens, chosen = self._tokens(unit, batch), self.chosen[unit.id]
        return chosen if tokens is None else chosen[chosen < tokens.shape[1]]

    def weights(self, unit: Location, batch: Tensor, n_rows: int) -> Tensor:
        """(n_rows,) weights of the rows at these positions: of samples, or of each window of them; 0 of padding."""
        index, tokens = self.index(unit, batch), self._tokens(unit, batch)
        weights = 1 - self.share + self.share * self.pattern[unit.id][index]
        weights = weights.repeat(n_rows // max(1, len(index)))
        return weights if tokens is None else weights * tokens[:, index.to(tokens.device)].flatten().to(weights)

    def _tokens(self, unit: Location, batch: Tensor) -> Tensor | None:
        return tokens_at(unit, self.samples, trim_padding(batch, self.samples.padding))

    def n_rows(self, unit: Location) -> int:
        """Rows that weigh anything, over all samples."""
        tokens, chosen = tokens_at(unit, self.samples, self.samples.inputs), self.chosen[unit.id]
        return len(self.samples) * len(chosen) if tokens is None else int(tokens[:, chosen].sum())


def sample_positions(
    model: nn.Module,
    units: Sequence[Location],
    samples: Samples,
    share: float,
    *,
    seed: int = 0,
    limit: int = MAX_POSITIONS,
) -> PositionSample:
    """Rows at up to ``limit`` positions of every sample; arguments as in :class:`PositionSample`.

    Cost: one pass with gradients over a few dozen samples.
    """
    pattern = squared_gradients(model, units, samples, seed)
    chosen = {
        unit.id: choose_positions(
            unit, pattern[unit.id], seed=seed, limit=limit, tokens=tokens_at(unit, samples, samples.inputs)
        )
        for unit in units
    }
    return PositionSample(samples, pattern, chosen, share)
