"""Train the classifiers of exits on features that were read once: convex problems of a few thousand weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.progress import track

FOLDS = 8
"""Number of folds; the samples of each are predicted by heads that were trained on the others.

With few folds these heads are trained on so much less data that they are more overconfident than the final ones.
"""


@dataclass(frozen=True, eq=False)
class Features:
    """Features and logits that the heads are trained on.

    Args:
        read: for each exit (n_views, N, n_blocks, width) float32.
        logits: (n_views, N, n_classes) of the model itself.
    """

    read: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """The head of one exit.

    Args:
        weight: (n_classes, n_blocks * width), standardisation and mixing included.
        bias: (n_classes,).
        mix: (n_blocks,) of unit length: how much of each block is read.
        decay: the weight decay that was chosen.
        out_of_fold: (N, n_classes) logits of each sample by a head that was not trained on it.
    """

    weight: Tensor
    bias: Tensor
    mix: Tensor
    decay: float
    out_of_fold: Tensor


@dataclass(frozen=True, eq=False)
class _Weights:
    mix: Tensor  # (n_blocks,), of any length
    weight: Tensor  # (width, n_classes)
    bias: Tensor  # (n_classes,)

    def logits(self, x: Tensor) -> Tensor:
        """(R, n_classes) of (R, n_blocks, width)."""
        return self.mixed(x) @ self.weight + self.bias

    def mixed(self, x: Tensor) -> Tensor:
        # Normalised here, as a function: the released code made new parameters after every pass and trained none.
        return x[:, 0] if len(self.mix) == 1 else torch.einsum("rbw,b->rw", x, self.unit)

    @property
    def unit(self) -> Tensor:
        unit: Tensor = self.mix / self.mix.norm().clamp_min(1e-12)
        return unit


def exit_targets(logits: Tensor, labels: Tensor | None, label_weight: float) -> Tensor:
    """(..., N, n_classes) probabilities to learn: the model's own, mixed with the labels where there are some."""
    soft = logits.softmax(-1)
    if labels is None:
        return soft
    return torch.lerp(soft, F.one_hot(labels, soft.shape[-1]).to(soft), label_weight)


def train_heads(
    features: Features, targets: Tensor, decays: Sequence[float], steps: int, seed: int
) -> tuple[TrainedHead, ...]:
    """A head for every exit.

    The loss of all exits together is the sum of theirs. The model is frozen, so no weight is in two of them, and each
    is made least by itself. Weight decay is chosen on a quarter of the samples.

    Args:
        features: read off the model.
        targets: (n_views, N, n_classes) probabilities to learn.
        decays: weight decays to choose from, on standardised features.
        steps: of L-BFGS for one fit.
        seed: of the folds.

    Cost: for each exit as many fits as there are decays and folds together.
    """
    n = targets.shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    folds = [part for part in order.chunk(min(FOLDS, n)) if len(part)]
    return tuple(
        _train(read, targets, folds, sorted(decays, reverse=True), steps)
        for read in track(features.read, "exits", len(features.read))
    )


def _train(read: Tensor, targets: Tensor, folds: list[Tensor], decays: Sequence[float], steps: int) -> TrainedHead:
    mean, scale = read.mean((0, 1)), 1 / read.std((0, 1), correction=0).clamp_min(1e-5)
    x = (read - mean) * scale
    answers = torch.zeros_like(targets[0])
    decay = decays[0]
    if len(folds) > 1:
        n_held = max(1, len(folds) // 4)
        held, rest = torch.cat(folds[:n_held]), torch.cat(folds[n_held:])
        path, start = [], _start(x, targets)
        for candidate in decays:  # the strongest first, each from where the one before it ended
            start = _fit(x[:, rest], targets[:, rest], candidate, start, steps)
            path.append((float(F.cross_entropy(start.logits(x[0, held]), targets[0, held])), candidate))
        decay = min(path)[1]
        for number, fold in enumerate(folds):
            rest = torch.cat([*folds[:number], *folds[number + 1 :]])
            answers[fold] = _fit(x[:, rest], targets[:, rest], decay, _start(x, targets), steps).logits(x[0, fold])
    final = _fit(x, targets, decay, _start(x, targets), steps)
    if len(folds) == 1:  # one sample: nothing is out of fold
        answers = final.logits(x[0])
    weight = final.unit[:, None, None] * scale[:, :, None] * final.weight  # (n_blocks, width, n_classes)
    bias = final.bias - (weight * mean[:, :, None]).sum((0, 1))
    return TrainedHead(weight.flatten(0, 1).T.contiguous(), bias, final.unit, decay, answers)


def _start(x: Tensor, targets: Tensor) -> _Weights:
    """The last block alone, and weights of zero."""
    mix = torch.zeros(x.shape[2], device=x.device)
    mix[-1] = 1.0
    return _Weights(mix, x.new_zeros(x.shape[3], targets.shape[2]), x.new_zeros(targets.shape[2]))


def _fit(x: Tensor, targets: Tensor, decay: float, start: _Weights, steps: int) -> _Weights:
    """The least mean cross entropy to ``targets`` plus decay / 2 times the squared weights.

    Args:
        x: (n_views, R, n_blocks, width) standardised.
        targets: (n_views, R, n_classes).
        decay: of the weights; bias and mix have none.
        start: where to begin.
        steps: of L-BFGS.
    """
    rows, goal = x.flatten(0, 1), targets.flatten(0, 1)
    with torch.enable_grad():
        parts = [part.clone().requires_grad_() for part in (start.mix, start.weight, start.bias)]
        now = _Weights(*parts)
        trained = parts if len(start.mix) > 1 else parts[1:]
        optimizer = torch.optim.LBFGS(trained, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(now.logits(rows), goal) + decay / 2 * now.weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return _Weights(*(part.detach() for part in parts))
