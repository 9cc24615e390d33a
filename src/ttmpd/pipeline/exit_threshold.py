"""Choose the threshold for an average latency, from confidences on unlabelled samples and measured milliseconds."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
class Sure:
    """How sure every exit is of every sample.

    Args:
        confidence: (n_exits, N) calibrated probability of each exit's answer; or, where exits have thresholds of their
            own, the highest threshold at the first exit under which it suffices.
        alike: (n_exits, N) whether it is the answer of the whole model.
    """

    confidence: Tensor
    alike: Tensor

    def only(self, numbers: Sequence[int]) -> "Sure":
        """The same of some exits alone."""
        return Sure(self.confidence[list(numbers)], self.alike[list(numbers)])

    def weighed(self, saves: Sequence[float]) -> "Sure":
        """The same where each exit has a threshold of its own, see :class:`ttmpd.surgery.exits.spec.Exits`."""
        share = torch.tensor(saves, dtype=self.confidence.dtype)[:, None]
        return Sure((1 - (1 - self.confidence) / share).clamp_min(0), self.alike)

    @property
    def n_exits(self) -> int:
        """How many exits there are."""
        return len(self.confidence)

    def depths(self, threshold: float) -> Tensor:
        """(N,) number of the exit where each sample leaves; the number of exits for the end."""
        leaves = self.confidence >= threshold
        first = leaves.int().argmax(0)
        return torch.where(leaves.any(0), first, torch.full_like(first, self.n_exits))

    def agreement(self, depths: Tensor) -> float:
        """Share of the samples that get the whole model's answer."""
        alike = torch.cat([self.alike, torch.ones_like(self.alike[:1])])
        return float(alike.gather(0, depths[None]).float().mean())


def exit_answers(model: EarlyExitModel, samples: Samples, batch_size: int) -> tuple[Tensor, Tensor]:
    """(n_exits, N, n_classes) calibrated answers of all exits, and (N, n_classes) those of the model; on the CPU."""
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for batch in samples.batches(batch_size, device):
            read, logits = model.features(batch)
            found.append((model.exit_logits(read).cpu(), logits.float().cpu()))
    if not found:
        return torch.empty(len(model.heads), 0, model.spec.n_classes), torch.empty(0, model.spec.n_classes)
    return torch.cat([exits for exits, _ in found], 1), torch.cat([logits for _, logits in found])


def sure_of(exit_logits: Tensor, logits: Tensor) -> Sure:
    """From (n_exits, N, n_classes) calibrated answers of the exits and (N, n_classes) those of the whole model."""
    confidence, answers = exit_logits.softmax(-1).max(-1)
    return Sure(confidence, answers == logits.argmax(-1))


def mean_ms(depths: Tensor, ms: Sequence[float]) -> float:
    """Mean milliseconds of samples that leave at ``depths``, where leaving at exit k takes ``ms[k]``."""
    return float(torch.tensor(ms, dtype=torch.float64)[depths.cpu()].mean())


def rising(ms: Sequence[float]) -> tuple[float, ...]:
    """The same milliseconds where leaving later never takes less: measurements of near exits may cross."""
    return tuple(itertools.accumulate(ms, max))


def choose_threshold(sure: Sure, ms: Sequence[float], budget_ms: float) -> float:
    """The highest threshold, and so the most cautious, whose mean latency is within the budget.

    Latency falls with the threshold, so it is found by halving the list of all confidences.

    Args:
        sure: on unlabelled samples that the exits were not trained on.
        ms: (n_exits + 1) milliseconds of leaving at each exit and of the end, rising.
        budget_ms: mean latency that is asked for.

    Raises:
        BudgetUnreachableError: even with everybody at the first exit it takes longer.
    """
    candidates: list[float] = [0.0, *torch.unique(sure.confidence).tolist(), NEVER]

    def too_slow(number: int) -> bool:
        return mean_ms(sure.depths(candidates[number]), ms) > budget_ms

    first = bisect.bisect_left(range(len(candidates)), True, key=too_slow)
    if first == 0:
        raise BudgetUnreachableError(
            f"the target must be at least {ms[0]:.4g} ms, which the first exit takes, but got {budget_ms:.4g} ms; ask "
            "for less, put an exit further to the front (early_exit.at), or prune the model first",
            ms[0],
        )
    return candidates[first - 1]


def saves_of(ms: Sequence[float]) -> tuple[float, ...]:
    """What leaving at each exit saves of the way to the end, as a share of what leaving at the first one does."""
    most = ms[-1] - ms[0]
    return tuple(min(1.0, max(_LEAST, (ms[-1] - value) / most)) if most > 0 else 1.0 for value in ms[:-1])


def worth_keeping(
    sure: Sure, ms: Sequence[float], original_ms: float, budget_ms: float, by_time: bool = True
) -> tuple[int, ...]:
    """Numbers of the exits that are worth their time at the threshold that the budget leads to.

    Every exit costs time for all samples that pass it. One is taken off where those that left there, going on, would
    cost no more than that, if agreement within the budget does not fall either. One by one, the most useless first.

    Args:
        sure: of all exits, all under the same threshold.
        ms: (n_exits + 1) milliseconds of leaving at each of them and of the end, rising.
        original_ms: of the model without exits.
        budget_ms: mean latency that is asked for.
        by_time: exits shall have thresholds of their own, by what leaving there saves.

    Raises:
        BudgetUnreachableError: as :func:`choose_threshold`.
    """

    def chosen(kept: tuple[int, ...]) -> tuple[Sure, float, float]:
        """What is known of some exits, the threshold for the budget, and the agreement under it."""
        left, few = ms_of(kept, ms, original_ms), sure.only(kept)
        few = few.weighed(saves_of(left)) if by_time else few
        threshold = choose_threshold(few, left, budget_ms)
        return few, threshold, few.agreement(few.depths(threshold))

    def mean(few: Sure, threshold: float, kept: tuple[int, ...], rest: Sequence[int]) -> float:
        """Milliseconds with the exits at the places ``rest`` alone, each with the threshold that it has."""
        numbers = tuple(kept[place] for place in rest)
        return mean_ms(few.only(rest).depths(threshold), ms_of(numbers, ms, original_ms))

    kept = tuple(range(sure.n_exits))
    few, threshold, agreement = chosen(kept)
    while len(kept) > 1:
        every = range(len(kept))
        rests = [tuple(other for other in every if other != place) for place in every]
        rest = min(rests, key=lambda rest: mean(few, threshold, kept, rest))
        if mean(few, threshold, kept, rest) > mean(few, threshold, kept, every):
            break
        fewer = tuple(kept[place] for place in rest)
        few, threshold, now = chosen(fewer)
        if now < agreement:
            break
        kept, agreement = fewer, now
    return kept


def ms_of(numbers: Sequence[int], ms: Sequence[float], original_ms: float) -> tuple[float, ...]:
    """Expected milliseconds with some of the exits alone: what is taken off is taken to cost as much as any other."""
    each = min(max(0.0, ms[-1] - original_ms) / (len(ms) - 1), _COST * original_ms)
    return rising([ms[number] - each * (number - place) for place, number in enumerate((*numbers, len(ms) - 1))])


def curve(sure: Sure, ms: Sequence[float]) -> list[dict[str, Any]]:
    """What thresholds over the whole range bring: threshold, mean ms, agreement, share of the samples at every exit."""
    known = torch.unique(sure.confidence)
    places = torch.linspace(0, len(known) - 1, min(_POINTS, len(known))).round().long()
    rows = []
    for threshold in dict.fromkeys([0.0, *known[places].tolist(), NEVER]):
        depths = sure.depths(threshold)
        shares = torch.bincount(depths, minlength=sure.n_exits + 1).double() / len(depths)
        rows.append(
            {
                "threshold": threshold,
                "ms": mean_ms(depths, ms),
                "agreement": sure.agreement(depths),
                "shares": shares.tolist(),
            }
        )
    return rows
