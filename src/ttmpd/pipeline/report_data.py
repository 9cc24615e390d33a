"""What a run measured, put into a :class:`RunReport`: what ``Result.report`` and ``report.json`` hold."""

import dataclasses
import datetime
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ttmpd.adapt.base import Adapted
from ttmpd.artifact.measurements import (
    AttemptReport,
    ExitsReport,
    FrontPoint,
    LatencyReport,
    LosslessReport,
    Speedup,
    TargetReport,
    Training,
    TrainingCheck,
    UnitReport,
    WidthReport,
)
from ttmpd.artifact.plain import Plain, to_plain
from ttmpd.artifact.run_report import (
    Adaptation,
    Kind,
    MethodReport,
    ModelReport,
    RunReport,
    RuntimeReport,
    SamplesReport,
    StudentReport,
    TaskReport,
    TokenLengths,
)
from ttmpd.data.samples import Samples
from ttmpd.latency.device import machine
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.method import Method
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import count_parameters
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import carried_task
from ttmpd.pipeline.analysis import Analysis
from ttmpd.pipeline.calibration import Calibration
from ttmpd.pipeline.planning import TOLERANCE, MeasuredPlan
from ttmpd.pipeline.preparation import latency_batch
from ttmpd.pipeline.report_predictions import Predictions, agreement_of, disagreements_of, held_out_of
from ttmpd.pipeline.settings import Settings
from ttmpd.records import Lossless, Plan, Score, Unit, WidthUnit
from ttmpd.repair.limits import layers_too_large
from ttmpd.training.loop import TrainingResult
from ttmpd.training.task import task_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NOISY = 1.2
"""How many times as large the upper quartile of a speedup is as the lower one where something else is running."""
NOISE = "The rounds differ much, as on a machine that is busy with other things; time it again with: ttmpd bench"
MOVED = 0.1
"""By what share a student's milliseconds differ from those of the same plan, measured minutes before, where that is
more than noise."""
MOVED_SINCE = (
    "The speedup is not the one that the plan was chosen for, as on a machine that is busy with other things; "
    "time it again with: ttmpd bench"
)
SHORT_RUN = ("num_samples", "holdout", "batch_size", "device", "seed")
"""The settings that runs without a plan look at."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RunInputs:
    """What a run began with.

    Args:
        opened: where the model came from.
        source: the model on its device, as it was given.
        calibration: what is learned from, and what teacher and student are compared on.
        settings: of the run.
    """

    opened: OpenedModel
    source: nn.Module
    calibration: Calibration
    settings: Settings

    def predictions(self, teacher: Tensor, student: Tensor) -> Predictions:
        """Outputs for the held-out samples."""
        return Predictions(task_of(self.source), self.calibration.held_out, teacher, student)


def compressed_report(
    analysis: Analysis,
    planned: MeasuredPlan,
    inputs: RunInputs,
    *,
    scores: Sequence[Score],
    student: nn.Module,
    timings: Timings,
    training: TrainingResult,
    logits: tuple[Tensor, Tensor, Tensor],
) -> RunReport:
    """The report of a compression.

    Args:
        analysis: what was known before the target.
        planned: what was removed, and how that was decided.
        inputs: what the run began with.
        scores: of all units; none where nothing was removed.
        student: the compressed model.
        timings: interleaved milliseconds of "original" and "compressed".
        training: what distillation did.
        logits: on the held-out samples: teacher, student before and after distillation.
    """
    report, (teacher, start, final) = _described("compressed", inputs, student), logits
    measured = [attempt.measured_ms for attempt in planned.attempts if attempt.removals == planned.plan.removals]
    latency = latency_report(timings, planned.plan, inputs.settings.batch_size, measured, analysis.lossless)
    return dataclasses.replace(
        _compared(report, inputs, teacher, final),
        runtime=dataclasses.replace(report.runtime, ratio=analysis.runtime_ratio),
        adaptation=Adaptation(analysis.adapt_note, dict(analysis.adapt_facts)),
        unfitted=tuple(layers_too_large(analysis.source).items()) if planned.plan.removals else (),
        units=unit_reports(analysis, planned.plan, scores),
        not_removable=tuple((path, str(reason)) for path, reason in analysis.not_removable.items()),
        target=_target(planned, report, latency),
        attempts=tuple(AttemptReport(attempt.predicted_ms, attempt.measured_ms) for attempt in planned.attempts),
        front=tuple(
            FrontPoint(row["target"], row["predicted_ms"], row["harm"], int(row["n_removed"]))
            for row in planned.pareto_front
        ),
        latency=latency,
        agreement_before=agreement_of(inputs.predictions(teacher, start)),
        training=training_report(training),
    )


def adapted_report(inputs: RunInputs, adapted: Adapted, logits: tuple[Tensor, Tensor], seconds: float) -> RunReport:
    """The report of an adaptation alone.

    Args:
        inputs: what the run began with.
        adapted: the model after.
        logits: on the held-out samples, before and after.
        seconds: that it took.
    """
    report = _described("adapted", inputs, adapted.model)
    return dataclasses.replace(
        _compared(report, inputs, *logits),
        settings={name: report.settings[name] for name in SHORT_RUN},
        methods={"adapt": report.methods["adapt"]},
        adaptation=Adaptation(adapted.note, dict(adapted.facts)),
        seconds={"adapt": seconds},
    )


def exits_report(
    inputs: RunInputs, model: nn.Module, exits: ExitsReport, *, method: Method, logits: tuple[Tensor, Tensor]
) -> RunReport:
    """The report of exits that were put on a model; latency, target and attempts are left open.

    Args:
        inputs: what the run began with.
        model: with exits.
        exits: where they stand and what they do.
        method: that made them.
        logits: on the held-out samples, without and with exits.
    """
    report = _described("exits", inputs, inputs.source)
    return dataclasses.replace(
        _compared(report, inputs, *logits),
        student=StudentReport(count_parameters(model), None),  # how much is computed differs from sample to sample
        settings={name: report.settings[name] for name in SHORT_RUN},
        methods={"early_exit": method_report(method)},
        exits=exits,
    )


def _described(kind: Kind, inputs: RunInputs, student: nn.Module) -> RunReport:
    """What every run says: which model, which machine, which settings, which samples."""
    settings, timed = inputs.settings, latency_batch(inputs.source, inputs.calibration.fit, inputs.settings)
    batch = timed[:2]  # operations are counted on what is timed: of text, as long as there
    return RunReport(
        kind=kind,
        version=installed_version(),
        created=now(),
        seed=settings.seed,
        model=model_report(inputs.opened, inputs.source, batch),
        student=student_report(student, batch),
        task=task_report(inputs.source, settings.task is None and carried_task(inputs.opened.module) is None),
        machine=machine(batch.device),
        runtime=RuntimeReport(settings.runtime.name, settings.runtime.version),
        settings=plain_settings(settings),
        methods=method_reports(settings),
        samples=samples_report(inputs.calibration.fit, len(inputs.calibration.held_out), timed.shape[1:]),
        class_names=tuple(inputs.opened.class_names),
    )


def _compared(report: RunReport, inputs: RunInputs, teacher: Tensor, student: Tensor) -> RunReport:
    """With how far teacher and student agree."""
    predictions = inputs.predictions(teacher, student)
    return dataclasses.replace(
        report,
        agreement=agreement_of(predictions),
        held_out=held_out_of(predictions),
        disagreements=disagreements_of(predictions, inputs.opened),
    )


def installed_version() -> str:
    """Version of this package, "unknown" where it is not installed."""
    try:
        return version("ttmpd")
    except PackageNotFoundError:
        return "unknown"


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def model_report(opened: OpenedModel, module: nn.Module, batch: Tensor) -> ModelReport:
    """The model as it was given; its operations are counted on the batch, per sample."""
    size = student_report(module, batch)
    return ModelReport(opened.id, type(module).__name__, opened.rebuildable, size.parameters, size.macs or 0)


def student_report(module: nn.Module, batch: Tensor) -> StudentReport:
    """How large a model is; its operations are counted on the batch, per sample."""
    return StudentReport(count_parameters(module), count_macs(module, batch)[""])


def task_report(model: nn.Module, detected: bool) -> TaskReport:
    """What a model predicts, and whether that was detected."""
    task = task_of(model)
    report = method_report(task)
    return TaskReport(task.name, task.each, task.same, detected, report.settings)


def method_report(method: Method) -> MethodReport:
    """A method with its hyper-parameters."""
    settings = to_plain(method.to_dict())
    return MethodReport(settings.pop("name"), settings)


def method_reports(settings: "DataclassInstance") -> dict[str, MethodReport]:
    """The methods of a run by their verbs; the task has a place of its own."""
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings) if item.name != "task"}
    return {name: method_report(value) for name, value in values.items() if isinstance(value, Method)}


def plain_settings(settings: "DataclassInstance") -> dict[str, Plain]:
    """The settings of a run that are no methods."""
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings) if item.name != "task"}
    return {name: to_plain(value) for name, value in values.items() if not isinstance(value, Method)}


def samples_report(samples: Samples, n_held_out: int, shape: Sequence[int]) -> SamplesReport:
    """The samples of a run; ``shape`` is that of one input."""
    return SamplesReport(
        n_fit=len(samples),
        n_held_out=n_held_out,
        input_shape=tuple(shape),
        skipped=tuple((str(name), str(reason)) for name, reason in samples.skipped),
        notes=tuple((str(what), int(n)) for what, n in samples.notes),
        tokens=_token_lengths(samples),
    )


def _token_lengths(samples: Samples) -> TokenLengths | None:
    """Tokens per sample, padding left out; None for what is no text."""
    mask = samples.token_mask(samples.inputs)
    if mask is None:
        return None
    lengths = mask.sum(1).double()
    return TokenLengths(float(lengths.mean()), float(lengths.median()), int(lengths.max()))


def unit_reports(analysis: Analysis, plan: Plan, scores: Sequence[Score]) -> tuple[UnitReport, ...]:
    """Every unit with what it costs, what its removal was predicted to do, and what became of it."""
    latencies = {latency.unit: latency for latency in analysis.latencies}
    scores_by_unit: dict[str, list[Score]] = {}
    for score in scores:
        scores_by_unit.setdefault(score.unit_id, []).append(score)
    return tuple(
        _unit_report(unit, latencies[unit.id], scores_by_unit.get(unit.id, []), plan) for unit in analysis.units
    )


def _unit_report(unit: Unit, latency: UnitLatency, scores: Sequence[Score], plan: Plan) -> UnitReport:
    removal = next((removal for removal in plan.removals if removal.unit.id == unit.id), None)
    is_width = isinstance(unit, WidthUnit)
    whole = [score for score in scores if score.action != "narrow"]
    n_kept = None
    if isinstance(unit, WidthUnit):
        n_kept = unit.n_members if removal is None else len(removal.kept)
    return UnitReport(
        id=unit.id,
        module=unit.module,
        shape=tuple(unit.shape),
        parameters=unit.n_params,
        macs=unit.macs,
        ms=latency.ms,
        replacement_ms=dict(latency.replacements),
        harms={score.action: score.harm for score in whole},
        parts=dict(whole[0].parts) if whole else {},
        n_members=unit.n_members if isinstance(unit, WidthUnit) else None,
        widths=_width_reports(latency, scores) if is_width else (),
        action="keep" if removal is None else removal.action,
        n_kept=n_kept,
        saved_ms=None if removal is None else latency.saved_ms(removal.action, len(removal.kept)),
    )


def _width_reports(latency: UnitLatency, scores: Sequence[Score]) -> tuple[WidthReport, ...]:
    """Milliseconds and harm of every number of members that may stay, most first."""
    harms = {len(score.kept): score.harm for score in scores if score.action == "narrow"}
    ms = {int(width): value for width, value in latency.widths.items()}
    return tuple(WidthReport(width, ms.get(width), harms.get(width)) for width in sorted({*harms, *ms}, reverse=True))


def latency_report(
    timings: Timings,
    plan: Plan,
    batch_size: int,
    planned_ms: Sequence[float] = (),
    lossless: Lossless | None = None,
) -> LatencyReport:
    """Measured milliseconds.

    Args:
        timings: of "original" and "compressed", and of "lossless" where that was timed.
        plan: with the milliseconds that were predicted.
        batch_size: samples per batch.
        planned_ms: those of the same plan when it was chosen.
        lossless: what was done besides.
    """
    ratio = timings.ratio("original", "compressed")
    ms = plan.original_ms / ratio.median_ms
    has_moved = any(abs(before / ms - 1) > MOVED for before in planned_ms)
    return LatencyReport(
        batch_size=batch_size,
        original=timings.timing("original"),
        compressed=timings.timing("compressed"),
        speedup=Speedup(ratio.median_ms, ratio.low_ms, ratio.high_ms),
        original_rounds=tuple(timings.ms["original"]),
        compressed_rounds=tuple(timings.ms["compressed"]),
        predicted_ms=plan.predicted_ms,
        lossless=_lossless_report(timings, lossless),
        caution=NOISE if ratio.high_ms > NOISY * ratio.low_ms else MOVED_SINCE if has_moved else "",
    )


def _lossless_report(timings: Timings, lossless: Lossless | None) -> LosslessReport | None:
    if lossless is None or "lossless" not in timings.ms:
        return None
    speedup = timings.ratio("original", "lossless").median_ms
    return LosslessReport(str(lossless), timings.timing("lossless"), speedup)


def _target(planned: MeasuredPlan, report: RunReport, latency: LatencyReport) -> TargetReport:
    """Whether the target is met: MACs are counted, milliseconds are measured and have a spread."""
    asked, plan = str(planned.target), planned.plan
    if planned.target.macs is not None:
        share = (report.student.macs or 0) / report.model.macs
        return TargetReport(asked, share <= planned.target.macs * (1 + TOLERANCE), False, None, plan.harm)
    needed = plan.original_ms / plan.budget_ms
    is_met = latency.speedup.high >= needed
    return TargetReport(asked, is_met, is_met and latency.speedup.median < needed, plan.budget_ms, plan.harm)


def training_report(result: TrainingResult) -> Training:
    """What training did."""
    return Training(
        steps=result.steps,
        stopped=result.stopped,
        rolled_back=result.rolled_back,
        best_step=result.best_step,
        start_weight=result.start_weight,
        losses=tuple(result.losses),
        checks=tuple(TrainingCheck(*check) for check in result.checks),
    )
