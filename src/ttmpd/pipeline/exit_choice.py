"""Which threshold, and what it brings: chosen by predicted milliseconds, measured, and corrected."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.early_exit.base import EarlyExit, Equipped
from ttmpd.latency.exits import exit_ms, mean_timings, speedup_of
from ttmpd.latency.timing import Timings
from ttmpd.pipeline.exit_threshold import (
    ExitConfidences,
    choose_threshold,
    mean_ms,
    ms_of,
    prune_exits,
    rising,
    saved_shares_of,
)
from ttmpd.surgery.exits.model import EarlyExitModel

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdChoice:
    """A threshold with the measurements that led to it.

    Args:
        threshold: that was chosen.
        depths: (N,) exit of each sample under it.
        original_ms: of the model without exits, per batch.
        budget_ms: mean that was asked for.
        ms: of leaving at each exit and of the end, per batch, as corrected by the measurement.
        predicted_ms: mean that was expected of the threshold.
        timings: mean milliseconds per batch of "original" and "compressed", a value per pass through the samples.
        attempts: (predicted, measured) of every threshold that was tried.
    """

    threshold: float
    depths: Tensor
    original_ms: float
    budget_ms: float
    ms: tuple[float, ...]
    predicted_ms: float
    timings: Timings
    attempts: tuple[tuple[float, float], ...]

    @property
    def needed(self) -> float:
        """The speedup of the mean that meets the budget."""
        return self.original_ms / self.budget_ms * (1 - 1e-9)  # sums of times are not exact

    @property
    def met(self) -> bool:
        """True when the mean is within the budget, or the upper quartile of the speedup reaches it."""
        return speedup_of(self.timings)[2] >= self.needed

    @property
    def within_spread(self) -> bool:
        """True when only the upper quartile reaches it."""
        return self.met and speedup_of(self.timings)[1] < self.needed

    def shares(self, n_exits: int) -> tuple[float, ...]:
        """The share of the samples that leaves at each exit, and of those that go to the end."""
        return tuple(float((self.depths == number).double().mean()) for number in range(n_exits + 1))


@dataclass(frozen=True, slots=True)
class ExitLatencies:
    """Milliseconds per batch, measured.

    Args:
        original_ms: of the model without exits.
        ms: of leaving at each exit and of the end, rising.
        batch_size: samples per batch.
    """

    original_ms: float
    ms: tuple[float, ...]
    batch_size: int


def time_exits(source: nn.Module, model: EarlyExitModel, samples: Samples, batch_size: int) -> ExitLatencies:
    """Milliseconds of the model without exits, ``source``, and of leaving at each."""
    original_ms, ms = exit_ms(source, model, samples, batch_size)
    return ExitLatencies(original_ms, rising(ms), batch_size)


def fitted(
    method: EarlyExit, equipped: Equipped, confidences: ExitConfidences, timed: ExitLatencies, budget_ms: float
) -> tuple[Equipped, ExitConfidences, ExitLatencies]:
    """Take off the exits that are not worth their time at this budget, and give each of the others its threshold.

    Raises:
        BudgetUnreachableError: even with every sample at the first exit it takes longer.
    """
    numbers = tuple(range(confidences.n_exits))
    if method.prune:
        numbers = prune_exits(confidences, timed.ms, timed.original_ms, budget_ms, method.by_time)
    ms = ms_of(numbers, timed.ms, timed.original_ms)
    saved_shares = saved_shares_of(ms) if method.by_time else (1.0,) * len(numbers)
    return equipped.only(numbers, saved_shares), confidences.only(numbers).weighed(saved_shares), replace(timed, ms=ms)


def choose(
    source: nn.Module,
    model: EarlyExitModel,
    samples: Samples,
    confidences: ExitConfidences,
    timed: ExitLatencies,
    budget_ms: float,
) -> ThresholdChoice:
    """The most cautious threshold whose mean latency is within the budget, measured.

    Args:
        source: the model without exits, in the form in which it is used.
        model: the same with exits; its threshold is not changed.
        samples: unlabelled.
        confidences: of the exits in them, each by exits that were not trained on that sample.
        timed: milliseconds of leaving at each exit; the mean is predicted by them, and they are corrected where the
            measured mean is above it.
        budget_ms: mean milliseconds per batch to reach.

    Raises:
        BudgetUnreachableError: even with every sample at the first exit it takes longer.
    """
    original_ms, ms = timed.original_ms, timed.ms
    attempts: list[tuple[float, float]] = []
    while True:
        threshold = choose_threshold(confidences, ms, budget_ms)
        depths = confidences.depths(threshold)
        predicted = mean_ms(depths, ms)
        timings = mean_timings(source, model, samples, depths, timed.batch_size, original_ms + predicted)
        # By the ratio: a machine that has changed its pace since the exits were timed changes both alike.
        measured_ms = original_ms / speedup_of(timings)[1]
        attempts.append((predicted, measured_ms))
        choice = ThresholdChoice(threshold, depths, original_ms, budget_ms, ms, predicted, timings, tuple(attempts))
        if speedup_of(timings)[1] >= choice.needed or len(attempts) == _ATTEMPTS:
            return choice
        ms = tuple(1.002 * measured_ms / predicted * value for value in ms)
