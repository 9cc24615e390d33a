"""The answers of a running service as they are watched: do they still look the same, does the student still agree."""

from collections import deque
from dataclasses import asdict
from typing import NamedTuple

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.quality.evidence import Answers
from ttmpd.quality.proportion import Proportion, proportion
from ttmpd.serving.acceptance import predictions_on
from ttmpd.serving.drift import Drift, DriftTest
from ttmpd.serving.policy import Policy
from ttmpd.serving.reservoir import Recent
from ttmpd.serving.state import MonitorState
from ttmpd.training.task import task_of

FEWEST = 16
"""Recent samples below which models are not compared."""


class Served(NamedTuple):
    """A model that answers: "source", "teacher" or "student"; every swap has a number of its own."""

    name: str
    module: nn.Module
    number: int


class AnswerMonitor:
    """Watches the answers of the model in service, against a reference that begins with every swap.

    Args:
        policy: windows, floors and shares.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.recent = Recent()
        self._inbox: deque[tuple[int, Tensor]] = deque(maxlen=1024)  # the oldest go where nobody looks for long
        self._number = -1
        self._drift: Drift | None = None
        self._test: DriftTest | None = None
        self._shadow: Proportion | None = None
        self._n_since = 0

    def note(self, served: Served, batch: Tensor, outputs: Tensor) -> None:
        """Take in (rows, values) predictions for a caller's batch; from any thread, without waiting."""
        by_sample = _by_sample(outputs.detach().clone(), len(batch))  # callers may change what they were given
        self._inbox.append((served.number, by_sample))
        if served.name != "source":
            self.recent.add(batch)

    def begin(self, served: Served, held_out: Samples) -> None:
        """From now on compare answers of this model with those that it gives for the held samples."""
        policy, reference = self.policy, _by_sample(predictions_on(served.module, held_out), len(held_out))
        task = task_of(served.module)
        self._drift = Drift(reference, task, window=policy.window, false_alarm=policy.false_alarm)
        self._number, self._test, self._shadow, self._n_since = served.number, None, None, 0
        self.recent.reset()

    def end(self) -> None:
        """There is no reference any more."""
        self._drift, self._number = None, -1
        self._inbox.clear()

    def moved(self) -> str:
        """Test the new answers for drift: a sentence that says what moved, or "" when nothing did."""
        for _ in range(len(self._inbox)):  # what comes meanwhile waits, so that fast callers cannot hold this up
            number, outputs = self._inbox.popleft()
            if self._drift is not None and number == self._number:
                self._drift.add(outputs)
                self._n_since += len(outputs)
        test = None if self._drift is None else self._drift.test()
        self._test = test or self._test
        if test is None or not test.moved:
            return ""
        return f"the data moved: {test.signal} by {test.statistic:.1f} standard errors"

    def disagreement(self, student: nn.Module, teacher: nn.Module) -> str:
        """A sentence that says so when student and teacher no longer agree on a share of the samples; else ""."""
        if self._n_since * self.policy.shadow < self.recent.capacity:
            return ""
        shadow = self.compare(student, teacher)
        if shadow is None or shadow.high >= self.policy.min_agreement:
            return ""
        return f"student and teacher part: they agree on {shadow.share:.0%} of {shadow.n} recent samples"

    def compare(self, student: nn.Module, teacher: nn.Module) -> Proportion | None:
        """Agreement of two models on the recent samples; None where there are too few."""
        self._n_since = 0
        rows = self.recent.rows()
        if rows is None or len(rows) < FEWEST:
            return None
        share = task_of(teacher).agreement(predictions_on(student, rows), predictions_on(teacher, rows))
        self._shadow = proportion(round(share * len(rows)), len(rows))
        return self._shadow

    def better(self, candidates: list[Served]) -> Served:
        """The model the variety of whose predictions the recent samples explain best.

        There are no labels: it is the criterion by which the teacher's statistics are mixed, and few classes do not
        deceive it. Where there are too few samples, or the task has no such criterion, it is the first one.
        """
        rows, task = self.recent.rows(), task_of(candidates[0].module)
        if rows is None or len(rows) < FEWEST or task.reason_not_to_adapt:
            return candidates[0]
        outputs = [predictions_on(served.module, rows) for served in candidates]
        explained = [Answers(task, values, values).explained() for values in outputs]
        return candidates[explained.index(max(explained))]

    def state(self) -> MonitorState:
        """The last drift test and the last comparison with the teacher, as plain data."""
        test, drift, shadow = self._test, self._drift, self._shadow
        return {
            "drift": {
                "statistic": None if test is None else test.statistic,
                "signal": None if test is None else test.signal,
                "threshold": None if drift is None else drift.threshold,
                "n_tests": 0 if drift is None else drift.n_tests,
                "n_alarms": 0 if drift is None else drift.n_alarms,
            },
            "shadow": None if shadow is None else asdict(shadow),
        }


def _by_sample(outputs: Tensor, n_samples: int) -> Tensor:
    """(n_samples, values) predictions, or (n_samples, rows, values) where each sample has several."""
    return outputs if len(outputs) == n_samples else outputs.view(n_samples, -1, outputs.shape[-1])
