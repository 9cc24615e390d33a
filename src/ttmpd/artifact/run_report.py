"""What a run measured, as one typed record: ``Result.report``, ``report.json``, and what page, card and terminal read.

None and empty tuples stand where a run had nothing to say. The record knows nothing of how it is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ttmpd.artifact.measurements import (
    AttemptReport,
    Disagreement,
    ExitsReport,
    FrontPoint,
    HeldOut,
    LatencyReport,
    Lesson,
    TargetReport,
    Training,
    UnitReport,
)
from ttmpd.artifact.plain import Plain, to_plain
from ttmpd.latency.device import Machine
from ttmpd.quality.proportion import Proportion

FORMAT = 2
"""Of ``report.json``. Format 1 had other names, and no kind."""
Kind = Literal["compressed", "adapted", "exits", "student"]
"""What a command made: `compress`, `adapt`, `early-exit`, `train-student`."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The model that a run was given.

    Args:
        id: as it was given; "" for a module that was passed in.
        class_name: of the module.
        rebuildable: True when the id is enough to build it again.
        parameters: how many numbers it holds.
        macs: multiply-accumulates per sample.
    """

    id: str
    class_name: str
    rebuildable: bool
    parameters: int
    macs: int

    @property
    def name(self) -> str:
        """The id, or the class of a module that was passed in."""
        return self.id or self.class_name


@dataclass(frozen=True, slots=True)
class StudentReport:
    """The model that a run made; ``macs`` is None where how much is computed differs from sample to sample."""

    parameters: int
    macs: int | None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What the model predicts.

    Args:
        name: of a file in ``ttmpd/tasks``, or ``package.module:Class``.
        each: "sample", "token" or "pixel": what a prediction belongs to.
        same: what counts as the same prediction, in words.
        detected: True when it was found by looking at the model, False when it was named.
        settings: its fields, those that were read from the model's output included.
    """

    name: str
    each: str
    same: str
    detected: bool
    settings: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RuntimeReport:
    """What ran the models whose latency was measured.

    Args:
        name: of a file in ``ttmpd/runtimes``, or ``package.module:Class``.
        version: of the software behind it.
        ratio: milliseconds of the model in this runtime over those in eager PyTorch, in which single units are timed:
            theirs were multiplied by it. 1 for eager PyTorch, or where no unit was timed.
    """

    name: str
    version: str
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class MethodReport:
    """A method that was used, with its hyper-parameters."""

    name: str
    settings: Mapping[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Tokens per sample, padding left out."""

    mean: float
    median: float
    longest: int


@dataclass(frozen=True, slots=True)
class SamplesReport:
    """The samples of a run.

    Args:
        n_fit: how many the run learned from.
        n_held_out: how many were kept for comparison.
        input_shape: of one sample; of text as long as the longest in the batch that was timed.
        skipped: (name, reason) of those that could not be used.
        notes: (what, how many) of what was done to samples before the model saw them.
        tokens: how long they are; None where they are no text.
    """

    n_fit: int
    n_held_out: int
    input_shape: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, int], ...] = ()
    tokens: TokenLengths | None = None


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What adaptation did: a line for people, and its numbers by name."""

    note: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Everything that a run of ``compress``, ``adapt``, ``early-exit`` or ``train-student`` measured.

    Args:
        kind: what was made.
        version: of this package.
        created: date and time, ISO 8601.
        seed: of everything random.
        command: as it was typed; "" where there was none.
        model: that was given.
        student: that was made.
        task: what both predict.
        machine: on which it was measured.
        runtime: through which.
        settings: of the run, methods left out.
        methods: by their verbs.
        samples: of the run.
        class_names: when known.
        seconds: of each stage.
        restarted: what of an interrupted run was not taken over, and why; "" when all of it was, or there was none.
        adaptation: of the model to the samples.
        unfitted: (path, reason) of layers behind a removal that are too large to be fitted again on this device.
        target: what was asked for.
        units: what could be removed, in the order of the network.
        not_removable: (path, reason) of what could not.
        attempts: plans or thresholds that were cut or set, and measured.
        front: what other latencies would cost.
        latency: milliseconds; None where none were measured.
        agreement: of the result with the teacher on the held-out samples; None where none were held out.
        agreement_before: the same before distillation.
        held_out: predictions for these samples.
        disagreements: those on which the two differ, the surest student first; not more than fit on a page.
        training: what distillation, or the training of a student, did.
        exits: of a model that may answer early.
        lesson: what a student was trained on.
        hugging_face: class of the library ``transformers`` as which the artifact holds the student, too; "" where it
            cannot.
    """

    kind: Kind
    version: str
    created: str
    seed: int
    model: ModelReport
    student: StudentReport
    task: TaskReport
    machine: Machine
    runtime: RuntimeReport
    settings: Mapping[str, Plain]
    methods: Mapping[str, MethodReport]
    samples: SamplesReport
    command: str = ""
    class_names: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    restarted: str = ""
    adaptation: Adaptation | None = None
    unfitted: tuple[tuple[str, str], ...] = ()
    target: TargetReport | None = None
    units: tuple[UnitReport, ...] = ()
    not_removable: tuple[tuple[str, str], ...] = ()
    attempts: tuple[AttemptReport, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    latency: LatencyReport | None = None
    agreement: Proportion | None = None
    agreement_before: Proportion | None = None
    held_out: HeldOut = field(default_factory=HeldOut)
    disagreements: tuple[Disagreement, ...] = ()
    training: Training | None = None
    exits: ExitsReport | None = None
    lesson: Lesson | None = None
    hugging_face: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``report.json``; :func:`ttmpd.artifact.read_report.read_report` reads it back."""
        return {"format": FORMAT} | to_plain(self)  # type: ignore[no-any-return]

    @property
    def removed(self) -> tuple[UnitReport, ...]:
        """The units that did not stay as they were."""
        return tuple(unit for unit in self.units if unit.action != "keep")

    def class_name(self, index: int) -> str:
        """Name of a class, or its number where it has none."""
        return self.class_names[index] if 0 <= index < len(self.class_names) else f"class {index}"
