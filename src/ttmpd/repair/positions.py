"""Which positions of an output enter a fit, and their weights: squared gradients, from one backward pass for all."""

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
"""Pixels or tokens per sample that enter a fit; neighbors are nearly the same, and 64 x 100 samples are plenty."""

GRADIENT_SAMPLES = 32
"""Samples whose gradients are averaged: a fixed number, so that results do not depend on the batch size."""

GRADIENT_BATCH = 8
"""Samples whose activations are stored for a backward pass: those of large images take much memory."""


def squared_gradients(
    model: nn.Module, locations: Sequence[Location], samples: Samples, seed: int = 0
) -> dict[str, Tensor]:
    """Mean squared gradient of the final features at every position of every location's output, scaled to mean one.

    Where only [CLS] reaches the output, for example, only its position counts in the last layer. The features are
    projected on random signs, drawn per sample, so that one backward pass serves all locations.

    Args:
        model: left untouched.
        locations: units or layers, in any order.
        samples: the first ``GRADIENT_SAMPLES`` are used.
        seed: of the signs.

    Returns:
        id -> (positions,) weights; all ones where nothing reaches the final features. For text the means are over
        tokens, so that they do not depend on how much padding follows.
    """
    samples, device = samples.first(GRADIENT_SAMPLES), next(model.parameters()).device
    feature_tap = find_feature_tap(model, samples.batch(slice(0, 2), device), pooled=True)
    taps = {location.id: Tap(location.path, "output") for location in locations}
    energies = {location.id: torch.zeros(n_positions(location)) for location in locations}
    generator = torch.Generator().manual_seed(seed)
    features_at = {} if feature_tap is None else {"": feature_tap}
    with (
        evaluating(model, gradients=True),
        tapped(model, taps) as outputs,
        tapped(model, features_at) as features,
    ):
        for parameter in model.parameters():  # inputs may have no gradients (tokens): the weights start the graph
            parameter.requires_grad_(parameter.is_floating_point())
        for batch in samples.batches(GRADIENT_BATCH, device):
            predictions = predict(model, batch)
            final = features.get("", predictions)
            signs = torch.randint(0, 2, final.shape, generator=generator).to(final) * 2 - 1
            tensors = [outputs[location.id] for location in locations]
            gradients = torch.autograd.grad((final * signs).sum(), tensors, allow_unused=True)
            for location, gradient in zip(locations, gradients, strict=True):
                if gradient is not None:
                    energy = _energy(gradient, location)
                    energies[location.id][: len(energy)] += energy  # a batch of text may be shorter than all samples
            outputs.clear()
            features.clear()
    return {
        location.id: _scaled(energies[location.id], tokens_at(location, samples, samples.inputs))
        for location in locations
    }


def _energy(gradient: Tensor, location: Location) -> Tensor:
    """(positions,) squared gradients, summed over samples and channels."""
    if location.layout == "channels_first":
        return gradient.flatten(2).square().sum((0, 1)).cpu()
    return gradient.reshape(len(gradient), -1, location.channels).square().sum((0, 2)).cpu()


def _scaled(energy: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The energies of positions, scaled to mean one; all ones where nothing reaches the final features."""
    if not float(energy.sum()) > 0:
        return torch.ones_like(energy)
    if tokens is None:
        return energy / energy.mean()
    n_samples = tokens.sum(0).cpu().to(energy)  # that have a token at this position
    return energy / n_samples.clamp_min(1) * (n_samples.sum() / energy.sum())


def n_positions(location: Location) -> int:
    """Pixels or tokens of an output, for one sample."""
    return max(1, int(torch.tensor(location.shape).prod()) // location.channels)


def tokens_at(location: Location, samples: Samples, batch: Tensor) -> Tensor | None:
    """(B, T) mask of the positions that hold tokens of the batch, not padding; None where positions are no tokens."""
    per_token = samples.is_text and samples.inputs.shape[1] == n_positions(location)
    return samples.token_mask(batch) if per_token else None


def choose_positions(
    location: Location,
    weights: Tensor | None = None,
    *,
    seed: int = 0,
    limit: int = MAX_POSITIONS,
    tokens: Tensor | None = None,
) -> Tensor:
    """Up to ``limit`` random flat positions of an output, in rising order; the one of most weight is always included.

    Args:
        location: of the output.
        weights: (positions,) or None.
        seed: of the draw.
        limit: how many.
        tokens: (N, T) mask of the tokens of all samples, see :func:`tokens_at`: positions with more of them are
            likelier.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokens is None:
        order = torch.randperm(n_positions(location), generator=generator)
    else:
        occupied = tokens.any(0).nonzero().flatten().cpu()
        shares = tokens.double().mean(0).cpu()[occupied]
        order = occupied[torch.multinomial(shares, len(occupied), generator=generator)]
    if weights is not None:
        top = int(weights.argmax())
        order = torch.cat([torch.tensor([top]), order[order != top]])
    return order[:limit].sort().values


@dataclass(frozen=True, eq=False)
class PositionSample:
    """The positions of each location that enter a fit, and the weight of each.

    Args:
        samples: all of them.
        position_weights: by location, see :func:`squared_gradients`.
        chosen: by location, (positions,), see :func:`choose_positions`.
        sensitivity: 0 weighs all positions alike, 1 by the squared gradients alone.
    """

    samples: Samples
    position_weights: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    sensitivity: float

    def positions(self, location: Location, batch: Tensor) -> Tensor:
        """The chosen positions that exist in a pass over the batch: in text, those within its longest sample."""
        tokens, chosen = self._tokens(location, batch), self.chosen[location.id]
        return chosen if tokens is None else chosen[chosen < tokens.shape[1]]

    def row_weights(self, location: Location, batch: Tensor, n_rows: int) -> Tensor:
        """(n_rows,) weights of the rows at these positions, sample by sample (or window by window); 0 for padding."""
        positions, tokens = self.positions(location, batch), self._tokens(location, batch)
        weights = 1 - self.sensitivity + self.sensitivity * self.position_weights[location.id][positions]
        weights = weights.repeat(n_rows // max(1, len(positions)))
        return weights if tokens is None else weights * tokens[:, positions.to(tokens.device)].flatten().to(weights)

    def _tokens(self, location: Location, batch: Tensor) -> Tensor | None:
        return tokens_at(location, self.samples, trim_padding(batch, self.samples.padding))

    def n_rows(self, location: Location) -> int:
        """Number of rows with a weight above zero, over all samples."""
        tokens, chosen = tokens_at(location, self.samples, self.samples.inputs), self.chosen[location.id]
        return len(self.samples) * len(chosen) if tokens is None else int(tokens[:, chosen].sum())


def sample_positions(
    model: nn.Module,
    locations: Sequence[Location],
    samples: Samples,
    sensitivity: float,
    *,
    seed: int = 0,
    limit: int = MAX_POSITIONS,
) -> PositionSample:
    """Draw up to ``limit`` positions of every sample at each location; arguments as in :class:`PositionSample`.

    Cost: one pass with gradients over ``GRADIENT_SAMPLES`` samples.
    """
    weights = squared_gradients(model, locations, samples, seed)
    chosen = {
        location.id: choose_positions(
            location, weights[location.id], seed=seed, limit=limit, tokens=tokens_at(location, samples, samples.inputs)
        )
        for location in locations
    }
    return PositionSample(samples, weights, chosen, sensitivity)
