"""What a run measured, part by part: units, plans, latency, predictions, training and exits, as typed records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ttmpd.latency.timing import Timing
from ttmpd.quality.proportion import Proportion
from ttmpd.records import Action


@dataclass(frozen=True, slots=True)
class WidthReport:
    """A number of members that may stay: milliseconds per batch with so many, and the harm; None where not known."""

    n_kept: int
    ms: float | None
    harm: float | None


@dataclass(frozen=True, slots=True)
class UnitReport:
    """A part that could be removed, and what became of it.

    Args:
        id: unique within the model.
        module: class name.
        shape: of its output for one sample.
        parameters: how many go with all of it.
        macs: multiply-accumulates per sample that go with all of it.
        ms: milliseconds per batch.
        replacement_ms: milliseconds per batch of what may stand in its place, by action.
        harms: predicted harm by action, narrowing left out; empty where nothing was scored.
        parts: quantities that the harm was made of.
        n_members: heads, neurons or channels; None for a unit that goes as a whole.
        widths: how many of them may stay.
        action: what was done.
        n_kept: members that stayed; None for a unit without members.
        saved_ms: milliseconds per batch that its removal was predicted to save; None for a unit that stayed.
    """

    id: str
    module: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    ms: float
    replacement_ms: Mapping[str, float] = field(default_factory=dict)
    harms: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    n_members: int | None = None
    widths: tuple[WidthReport, ...] = ()
    action: Action | Literal["keep"] = "keep"
    n_kept: int | None = None
    saved_ms: float | None = None

    @property
    def harm(self) -> float | None:
        """Predicted harm of what was done; None for a unit that stayed."""
        if self.action == "narrow":
            return next((width.harm for width in self.widths if width.n_kept == self.n_kept), None)
        return self.harms.get(self.action)

    def harm_of(self, action: str) -> float | None:
        """Predicted harm of an action; of narrowing that of the chosen width."""
        return self.harm if action == self.action else self.harms.get(action)


@dataclass(frozen=True, slots=True)
class TargetReport:
    """What was asked for, and whether it is met.

    Args:
        asked: in words.
        met: True when what was measured meets it.
        within_spread: True when only the upper quartile of the speedup does.
        budget_ms: milliseconds per batch to reach; None for a share of the multiply-accumulates.
        harm: predicted harm of the chosen plan; None where nothing is removed by plan.
    """

    asked: str
    met: bool
    within_spread: bool
    budget_ms: float | None = None
    harm: float | None = None


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """A plan or threshold that was tried: milliseconds per batch as predicted and as measured."""

    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """The plan for a share of the original latency: what it would cost."""

    latency_share: float
    predicted_ms: float
    harm: float
    n_removed: int


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast: median and quartiles of the ratios, round by round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LosslessReport:
    """What made the model faster without changing its predictions, and what it brought alone."""

    changes: str
    timing: Timing
    speedup: float


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Measured milliseconds per batch, original and result timed in turn.

    Args:
        batch_size: samples per batch.
        original: of the model that was given.
        compressed: of the result.
        speedup: of the result over the original.
        original_rounds: a value per round.
        compressed_rounds: a value per round; the same round at the same place.
        predicted_ms: of the result, when it was planned.
        lossless: what was done besides; None where nothing was.
        caution: why the figures may be off; "" where nothing says so.
    """

    batch_size: int
    original: Timing
    compressed: Timing
    speedup: Speedup
    original_rounds: tuple[float, ...]
    compressed_rounds: tuple[float, ...]
    predicted_ms: float
    lossless: LosslessReport | None = None
    caution: str = ""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Predictions for the held-out samples, in one order; empty where the task has no such value.

    Args:
        names: of the samples; empty where there is more than one prediction for each.
        teacher: class per prediction, of the teacher.
        student: the same of the student.
        teacher_confidence: from 0 to 1.
        student_confidence: from 0 to 1.
    """

    names: tuple[str, ...] = ()
    teacher: tuple[int, ...] = ()
    student: tuple[int, ...] = ()
    teacher_confidence: tuple[float, ...] = ()
    student_confidence: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A held-out sample to which teacher and student give different classes.

    Args:
        name: of the sample.
        teacher: class.
        student: class.
        teacher_confidence: from 0 to 1.
        student_confidence: from 0 to 1.
        png: a small picture of it, base64; "" where it is none.
        text: what the model read of it; "" where it is no text.
    """

    name: str
    teacher: int
    student: int
    teacher_confidence: float
    student_confidence: float
    png: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class TrainingCheck:
    """A look at the held-out samples during training."""

    step: int
    agreement: float
    loss: float


@dataclass(frozen=True, slots=True)
class Training:
    """What gradient descent did.

    Args:
        steps: optimizer steps that were done.
        stopped: why it ended.
        rolled_back: True if the start was better and was restored.
        best_step: whose weights were kept; 0 is the start.
        start_weight: weight of the start in the average with it that was kept.
        losses: mean training loss between two checks.
        checks: on held-out samples; the first is before training.
    """

    steps: int
    stopped: str
    rolled_back: bool
    best_step: int
    start_weight: float
    losses: tuple[float, ...] = ()
    checks: tuple[TrainingCheck, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitReport:
    """An exit of a model that may answer early.

    Args:
        path: of the block behind which it stands.
        threshold: confidence from which a sample leaves here.
        share: of the samples that do.
        ms: milliseconds per batch of leaving here.
        agreement: of this exit with the whole model; None where the method does not say.
        temperature: by which its logits are divided.
        calibration_error_before: without that temperature.
        calibration_error: with it.
    """

    path: str
    threshold: float
    share: float
    ms: float
    agreement: float | None = None
    temperature: float | None = None
    calibration_error_before: float | None = None
    calibration_error: float | None = None


@dataclass(frozen=True, slots=True)
class ThresholdPoint:
    """What a threshold would bring: mean milliseconds per batch, agreement, share of the samples at each exit."""

    threshold: float
    ms: float
    agreement: float
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExitsReport:
    """A model with early exits.

    Args:
        note: what was made, in a line.
        labelled: True when exits learned from labels, too.
        threshold: that was chosen; above 1 no sample leaves early.
        agreement: with the whole model under it.
        n_samples: on which that was counted.
        predicted_ms: mean milliseconds per batch that were expected of it.
        exits: in the order of the network.
        end_share: of the samples that go through to the end.
        end_ms: milliseconds per batch of going there.
        curve: other thresholds.
    """

    note: str
    labelled: bool
    threshold: float
    agreement: float
    n_samples: int
    predicted_ms: float
    exits: tuple[ExitReport, ...]
    end_share: float
    end_ms: float
    curve: tuple[ThresholdPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a student was trained on.

    Args:
        teacher: id of the teacher; "" without one.
        alpha: weight of the teacher's predictions beside the labels.
        n_samples: how many there were to choose from.
        sample_names: of those that were chosen.
        n_views: views of each sample that the teacher saw.
        accuracy: of the student on held-out samples; None where none were held out.
        teacher_accuracy: of the teacher on the same; None without one.
    """

    teacher: str
    alpha: float
    n_samples: int
    sample_names: tuple[str, ...]
    n_views: int
    accuracy: Proportion | None = None
    teacher_accuracy: Proportion | None = None
