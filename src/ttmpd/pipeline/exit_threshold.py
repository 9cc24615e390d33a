"""Choose the threshold for an average latency, from confidences on unlabelled samples and measured milliseconds."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttmpd.artifact.measurements import ThresholdPoint
from ttmpd.data.samples import Samples
from ttmpd.errors import BudgetUnreachableError
from ttmpd.models.run import evaluating
from ttmpd.surgery.exits.model import EarlyExitModel
from ttmpd.surgery.exits.spec import NEVER

_COST = 0.04
"""Share of the whole model that an exit can cost; what seems more is the noise of two measurements."""
_LEAST = 1e-3  # what leaving saves is more than nothing: above 1 no exit may be taken
_POINTS = 40
"""Thresholds that the curve of a report has at most."""


@dataclass(frozen=True, eq=False)
class ExitConfidences:
    """Confidence of every exit in every sample, and where its prediction is the model's.

    Args:
        confidence: (n_exits, N) calibrated probability of each exit's answer; or, where exits have thresholds of their
            own, the highest threshold at the first exit under which it suffices.
        agrees: (n_exits, N) true where the exit predicts what the whole model does.
    """

    confidence: Tensor
    agrees: Tensor

    def only(self, numbers: Sequence[int]) -> "ExitConfidences":
        """The confidences of some of the exits."""
        return ExitConfidences(self.confidence[list(numbers)], self.agrees[list(numbers)])

    def weighed(self, saved_shares: Sequence[float]) -> "ExitConfidences":
        """Confidences for exits with thresholds of their own, see :meth:`ttmpd.surgery.exits.spec.Exits.thresholds`."""
        share = torch.tensor(saved_shares, dtype=self.confidence.dtype)[:, None]
        return ExitConfidences((1 - (1 - self.confidence) / share).clamp_min(0), self.agrees)

    @property
    def n_exits(self) -> int:
        """Number of exits."""
        return len(self.confidence)

    def depths(self, threshold: float) -> Tensor:
        """(N,) number of the exit where each sample leaves; the number of exits for the end."""
        leaves = self.confidence >= threshold
        first = leaves.int().argmax(0)
        return torch.where(leaves.any(0), first, torch.full_like(first, self.n_exits))

    def agreement(self, depths: Tensor) -> float:
        """Share of the samples that get the whole model's answer."""
        agrees = torch.cat([self.agrees, torch.ones_like(self.agrees[:1])])
        return float(agrees.gather(0, depths[None]).float().mean())


def exit_answers(model: EarlyExitModel, samples: Samples, batch_size: int) -> tuple[Tensor, Tensor]:
    """(n_exits, N, n_classes) calibrated answers of all exits, and (N, n_classes) those of the model; on the CPU."""
    device, outputs = next(model.parameters()).device, []
    with evaluating(model):
        for batch in samples.batches(batch_size, device):
            read, logits = model.features(batch)
            outputs.append((model.exit_logits(read).cpu(), logits.float().cpu()))
    if not outputs:
        return torch.empty(len(model.heads), 0, model.spec.n_classes), torch.empty(0, model.spec.n_classes)
    return torch.cat([exits for exits, _ in outputs], 1), torch.cat([logits for _, logits in outputs])


def exit_confidences(exit_logits: Tensor, logits: Tensor) -> ExitConfidences:
    """From (n_exits, N, n_classes) calibrated answers of the exits and (N, n_classes) those of the whole model."""
    confidence, answers = exit_logits.softmax(-1).max(-1)
    return ExitConfidences(confidence, answers == logits.argmax(-1))


def mean_ms(depths: Tensor, ms: Sequence[float]) -> float:
    """Mean milliseconds of samples that leave at ``depths``, where leaving at exit k takes ``ms[k]``."""
    return float(torch.tensor(ms, dtype=torch.float64)[depths.cpu()].mean())


def rising(ms: Sequence[float]) -> tuple[float, ...]:
    """Make leaving later never take less: measurements of neighbouring exits may cross."""
    return tuple(itertools.accumulate(ms, max))


def choose_threshold(confidences: ExitConfidences, ms: Sequence[float], budget_ms: float) -> float:
    """The highest threshold, and so the most cautious, whose mean latency is within the budget.

    Latency falls with the threshold, so it is found by halving the list of all confidences.

    Args:
        confidences: on unlabelled samples that the exits were not trained on.
        ms: (n_exits + 1) milliseconds of leaving at each exit and of the end, rising.
        budget_ms: mean latency that is asked for.

    Raises:
        BudgetUnreachableError: even with every sample at the first exit it takes longer.
    """
    candidates: list[float] = [0.0, *torch.unique(confidences.confidence).tolist(), NEVER]

    def too_slow(number: int) -> bool:
        return mean_ms(confidences.depths(candidates[number]), ms) > budget_ms

    first = bisect.bisect_left(range(len(candidates)), True, key=too_slow)
    if first == 0:
        raise BudgetUnreachableError(
            f"the target must be at least {ms[0]:.4g} ms, which the first exit takes, but got {budget_ms:.4g} ms; ask "
            "for less, put an exit further to the front (early_exit.at), or prune the model first",
            ms[0],
        )
    return candidates[first - 1]


def saved_shares_of(ms: Sequence[float]) -> tuple[float, ...]:
    """What leaving at each exit saves of the way to the end, as a share of what leaving at the first one does."""
    most = ms[-1] - ms[0]
    return tuple(min(1.0, max(_LEAST, (ms[-1] - value) / most)) if most > 0 else 1.0 for value in ms[:-1])


def prune_exits(
    confidences: ExitConfidences, ms: Sequence[float], original_ms: float, budget_ms: float, by_time: bool = True
) -> tuple[int, ...]:
    """Numbers of the exits that stay: those that are worth their time under the threshold for the budget.

    Every exit costs time for all samples that pass it. One is taken off where those that left there, going on, would
    cost no more than that, if agreement within the budget does not fall either. One by one, the most useless first.

    Args:
        confidences: of all exits, all under the same threshold.
        ms: (n_exits + 1) milliseconds of leaving at each of them and of the end, rising.
        original_ms: of the model without exits.
        budget_ms: mean latency that is asked for.
        by_time: exits shall have thresholds of their own, by what leaving there saves.

    Raises:
        BudgetUnreachableError: as :func:`choose_threshold`.
    """
    exits = _ExitSubset.for_budget(confidences, tuple(range(confidences.n_exits)), ms, original_ms, budget_ms, by_time)
    while len(exits.numbers) > 1:
        positions = range(len(exits.numbers))
        rests = [tuple(other for other in positions if other != position) for position in positions]
        rest = min(rests, key=exits.mean_ms)
        if exits.mean_ms(rest) > exits.mean_ms(positions):
            break
        numbers = tuple(exits.numbers[position] for position in rest)
        fewer = _ExitSubset.for_budget(confidences, numbers, ms, original_ms, budget_ms, by_time)
        if fewer.agreement < exits.agreement:
            break
        exits = fewer
    return exits.numbers


@dataclass(frozen=True, eq=False)
class _ExitSubset:
    """Some of the exits, under the threshold that the budget leads to.

    Args:
        numbers: of these exits.
        confidences: of these exits, weighed where they have thresholds of their own.
        threshold: at the first of them.
        agreement: with the whole model, under that threshold.
        ms: (n_exits + 1) milliseconds of leaving at each of *all* exits and of the end.
        original_ms: of the model without exits.
    """

    numbers: tuple[int, ...]
    confidences: ExitConfidences
    threshold: float
    agreement: float
    ms: Sequence[float]
    original_ms: float

    @classmethod
    def for_budget(
        cls,
        confidences: ExitConfidences,
        numbers: tuple[int, ...],
        ms: Sequence[float],
        original_ms: float,
        budget_ms: float,
        by_time: bool,
    ) -> "_ExitSubset":
        subset_ms = ms_of(numbers, ms, original_ms)
        subset = confidences.only(numbers)
        subset = subset.weighed(saved_shares_of(subset_ms)) if by_time else subset
        threshold = choose_threshold(subset, subset_ms, budget_ms)
        return cls(numbers, subset, threshold, subset.agreement(subset.depths(threshold)), ms, original_ms)

    def mean_ms(self, positions: Sequence[int]) -> float:
        """Mean milliseconds with the exits at these positions alone, each with the threshold that it has."""
        numbers = tuple(self.numbers[position] for position in positions)
        depths = self.confidences.only(positions).depths(self.threshold)
        return mean_ms(depths, ms_of(numbers, self.ms, self.original_ms))


def ms_of(numbers: Sequence[int], ms: Sequence[float], original_ms: float) -> tuple[float, ...]:
    """Expected milliseconds with some of the exits alone: what is taken off is taken to cost as much as any other."""
    each = min(max(0.0, ms[-1] - original_ms) / (len(ms) - 1), _COST * original_ms)
    return rising([ms[number] - each * (number - place) for place, number in enumerate((*numbers, len(ms) - 1))])


def curve(confidences: ExitConfidences, ms: Sequence[float]) -> tuple[ThresholdPoint, ...]:
    """What thresholds over the whole range would bring."""
    values = torch.unique(confidences.confidence)
    places = torch.linspace(0, len(values) - 1, min(_POINTS, len(values))).round().long()
    points = []
    for threshold in dict.fromkeys([0.0, *values[places].tolist(), NEVER]):
        depths = confidences.depths(threshold)
        shares = torch.bincount(depths, minlength=confidences.n_exits + 1).double() / len(depths)
        points.append(
            ThresholdPoint(threshold, mean_ms(depths, ms), confidences.agreement(depths), tuple(shares.tolist()))
        )
    return tuple(points)
