"""Which threshold, and what it brings: chosen by predicted milliseconds, measured, and corrected."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.early_exit.base import EarlyExit, Equipped
from ttmpd.latency.exits import exit_ms, mean_rounds, speedup_of
from ttmpd.latency.timing import Rounds
from ttmpd.pipeline.exit_threshold import Sure, choose_threshold, curve, mean_ms, ms_of, rising, saves_of, worth_keeping
from ttmpd.surgery.exits.model import EarlyExitModel

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A threshold with its proof.

    Args:
        threshold: that was chosen.
        depths: (N,) exit of each sample under it.
        original_ms: of the model without exits, per batch.
        budget_ms: mean that was asked for.
        ms: of leaving at each exit and of the end, per batch, as corrected by the measurement.
        predicted_ms: mean that was expected of the threshold.
        rounds: mean milliseconds per batch of "original" and "compressed", a value per pass through the samples.
        attempts: (predicted, measured) of every threshold that was tried.
    """

    threshold: float
    depths: Tensor
    original_ms: float
    budget_ms: float
    ms: tuple[float, ...]
    predicted_ms: float
    rounds: Rounds
    attempts: tuple[tuple[float, float], ...]

    @property
    def needed(self) -> float:
        """How many times faster the mean has to be."""
        return self.original_ms / self.budget_ms * (1 - 1e-9)  # sums of times are not exact

    @property
    def met(self) -> bool:
        """Whether the mean is within the budget, or the spread of the measurement reaches it."""
        return speedup_of(self.rounds)[2] >= self.needed

    @property
    def within_spread(self) -> bool:
        """Whether only the spread reaches it."""
        return self.met and speedup_of(self.rounds)[1] < self.needed

    def facts(self, sure: Sure) -> dict[str, Any]:
        """Plain data for the report."""
        shares = [float((self.depths == number).double().mean()) for number in range(sure.n_exits + 1)]
        return {
            "threshold": self.threshold,
            "agreement": sure.agreement(self.depths),
            "n_samples": len(self.depths),
            "predicted_ms": self.predicted_ms,
            "ms": list(self.ms),
            "shares": shares,
            "curve": curve(sure, self.ms),
        }


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds per batch, measured.

    Args:
        original_ms: of the model without exits.
        ms: of leaving at each exit and of the end, rising.
        batch_size: samples per batch.
    """

    original_ms: float
    ms: tuple[float, ...]
    batch_size: int


def time_exits(source: nn.Module, model: EarlyExitModel, samples: Samples, batch_size: int) -> Timed:
    """Milliseconds of the model without exits, ``source``, and of leaving at each."""
    original_ms, ms = exit_ms(source, model, samples, batch_size)
    return Timed(original_ms, rising(ms), batch_size)


def fitted(
    method: EarlyExit, equipped: Equipped, sure: Sure, timed: Timed, budget_ms: float
) -> tuple[Equipped, Sure, Timed]:
    """The same with the exits alone that are worth their time at that budget, and with a threshold for each of them.

    Raises:
        BudgetUnreachableError: even with everybody at the first exit it takes longer.
    """
    kept = tuple(range(sure.n_exits))
    if method.prune:
        kept = worth_keeping(sure, timed.ms, timed.original_ms, budget_ms, method.by_time)
    ms = ms_of(kept, timed.ms, timed.original_ms)
    saves = saves_of(ms) if method.by_time else (1.0,) * len(kept)
    return equipped.only(kept, saves), sure.only(kept).weighed(saves), replace(timed, ms=ms)


def choose(
    source: nn.Module, model: EarlyExitModel, samples: Samples, sure: Sure, timed: Timed, budget_ms: float
) -> Choice:
    """The most cautious threshold whose mean latency is within the budget, measured.

    Args:
        source: the model without exits, in the form in which it is used.
        model: the same with exits; its threshold is not changed.
        samples: unlabelled.
        sure: how sure the exits are of them, each by exits that were not trained on it.
        timed: milliseconds of leaving at each exit; the mean is predicted by them, and they are corrected where the
            measured mean is above it.
        budget_ms: mean milliseconds per batch to reach.

    Raises:
        BudgetUnreachableError: even with everybody at the first exit it takes longer.
    """
    original_ms, ms = timed.original_ms, timed.ms
    attempts: list[tuple[float, float]] = []
    while True:
        threshold = choose_threshold(sure, ms, budget_ms)
        depths = sure.depths(threshold)
        predicted = mean_ms(depths, ms)
        rounds = mean_rounds(source, model, samples, depths, timed.batch_size, original_ms + predicted)
        # By the ratio: a machine that has changed its pace since the exits were timed changes both alike.
        found_ms = original_ms / speedup_of(rounds)[1]
        attempts.append((predicted, found_ms))
        choice = Choice(threshold, depths, original_ms, budget_ms, ms, predicted, rounds, tuple(attempts))
        if speedup_of(rounds)[1] >= choice.needed or len(attempts) == _ATTEMPTS:
            return choice
        ms = tuple(1.002 * found_ms / predicted * value for value in ms)
