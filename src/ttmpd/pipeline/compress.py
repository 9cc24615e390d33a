"""``compress``: join the verbs. Reads like the paper's algorithm.

select -> adapt -> find units -> time and score them -> plan -> cut and repair -> distill -> measure
"""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttmpd.artifact.write import Result, check_output
from ttmpd.distill.base import FitContext
from ttmpd.latency.table import compare
from ttmpd.latency.timing import Timings
from ttmpd.models.modules import to_plain_format
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.models.state import load_tensor_state, tensor_state
from ttmpd.pipeline.analysis import Analysis, scores_of
from ttmpd.pipeline.candidates import PartialPlan, rescored_path
from ttmpd.pipeline.planning import Attempt, MeasuredPlan, make_plan, needed_ms
from ttmpd.pipeline.reach import within_reach
from ttmpd.pipeline.report_data import RunInputs, compressed_report
from ttmpd.pipeline.run import Run, analyzed
from ttmpd.pipeline.settings import Settings, Target, settings_of
from ttmpd.records import UNCHANGED, Plan, Removal, Unit
from ttmpd.repair.sequential import repaired
from ttmpd.storage import fingerprint, locked
from ttmpd.surgery.cut import replay
from ttmpd.surgery.lossless import applied, apply, present
from ttmpd.training.loop import TrainingResult
from ttmpd.training.task import check_finite, task_of
from ttmpd.training.teacher_outputs import load_teacher_outputs, save_teacher_outputs

NOTHING_TO_FIT = TrainingResult(steps=0, stopped="nothing removed", rolled_back=False, best_step=0)
MAX_REPAIR = 512
"""Samples to which closed forms are fitted at most."""


def compress(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    *,
    speedup: float | None = None,
    latency: str | float | None = None,
    macs: str | float | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    **settings: Any,
) -> Result:
    """A faster model, adapted to the samples, with the measurements that prove it.

    Args:
        model: any classifier, or the id of one (``timm:NAME``, ``torchvision:NAME``, ``hf:...``, ``file.py:factory``).
        samples: unlabelled: a folder of images, an array file, a tensor, any iterable of batches, a Dataset or a
            DataLoader; a second element (labels) is ignored.
        speedup: how many times faster the result shall be, e.g. 2.0.
        latency: instead of ``speedup``: ``"12ms"`` per batch, or ``"0.5x"`` of the original.
        macs: instead of ``speedup``: the share of the multiply-accumulates that may stay, e.g. 0.7; nothing is
            promised of the latency then.
        output: folder for the artifact; finished stages are kept there while the run lasts.
        resume: go on with what an interrupted run left in ``output``.
        command: recorded in the report.
        **settings: the fields of :class:`Settings`: ``select``, ``adapt``, ``score``, ``plan``, ``distill``,
            ``runtime`` (methods or their names), ``units``, ``actions``, ``num_samples``, ``pool``, ``holdout``,
            ``batch_size``, ``device``, ``seed``, ``amp``, ``time_budget`` (seconds).

    Returns:
        The result; it is saved already when ``output`` is given.

    Raises:
        BudgetUnreachableError: no plan meets the target; ``best_ms`` says what can be reached.
        SamplesError, ModelError, UnsupportedError, InvalidValueError: see their messages.

    Example:
        >>> import torch
        >>> from ttmpd.distill.one_time import OneTime
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> quick = {"score": "magnitude", "adapt": "none", "distill": OneTime(steps=2, views=1), "batch_size": 8}
        >>> result = compress(tiny_model(), torch.rand(40, 3, 8, 8), macs=0.9, num_samples=40, **quick)
        >>> result.met, result.model(torch.rand(1, 3, 8, 8)).shape
        (True, torch.Size([1, 4]))

    Source: TT-MPD (arXiv 2412.07114).
    """
    target = Target.of(speedup, latency, macs)
    return compress_many(
        model, samples, targets=[target], outputs=[output], resume=resume, command=command, **settings
    )[0]


def compress_many(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    *,
    targets: Sequence[Target],
    outputs: Sequence[str | Path | None] = (),
    resume: bool = False,
    command: str = "",
    **settings: Any,
) -> list[Result]:
    """Faster models for several targets: adaptation, timing, scores and the teacher's predictions are made once.

    Args:
        model: as in :func:`compress`.
        samples: as in :func:`compress`.
        targets: one result each.
        outputs: one folder each, or none.
        resume: as in :func:`compress`.
        command: as in :func:`compress`.
        **settings: as in :func:`compress`.

    Example:
        >>> import torch
        >>> from ttmpd.distill.one_time import OneTime
        >>> from ttmpd.pipeline.settings import Target
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> quick = {"score": "magnitude", "adapt": "none", "distill": OneTime(steps=2, views=1), "batch_size": 8}
        >>> targets = [Target(macs=0.9), Target(macs=0.8)]
        >>> results = compress_many(tiny_model(), torch.rand(40, 3, 8, 8), targets=targets, num_samples=40, **quick)
        >>> [result.met for result in results]
        [True, True]
    """
    chosen = settings_of(settings)
    folders = [None if o is None else Path(o) for o in (outputs or [None] * len(targets))]
    for folder in folders:
        if folder is not None:
            check_output(folder)
    results = []
    with ExitStack() as locks, analyzed(model, samples, chosen, folders[0], resume) as (analysis, run):
        for folder in folders[1:]:  # the first is locked with its stages
            if folder is not None:
                locks.enter_context(locked(folder))
        # A target out of reach ends the run before anything is scored, and all plans come before any training.
        analysis = within_reach(analysis, targets, chosen, run.stages)
        path = rescored_path(analysis, max(needed_ms(analysis, target) for target in targets), chosen, run.stages)
        plans = [_planned(analysis, path, target, run) for target in targets]
        teacher = predictions_of(analysis.teacher, analysis.calibration.held_out, analysis.pass_size)
        starts = [_started(analysis, planned, teacher, run) for planned in plans]
        context = _fit_context(analysis, starts, teacher, run)
        for start, folder in zip(starts, folders, strict=True):
            result = finish(analysis, start, context, run, command)
            if folder is not None:
                result.save(folder)
            results.append(result)
    return results


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A repaired student before any training.

    Args:
        planned: the plan that it follows.
        student: trained in place later.
        predictions: (M, ...) on the held-out samples.
        agreement: the share of these that are the same as the teacher's; 1 when no samples are held out.
    """

    planned: MeasuredPlan
    student: nn.Module
    predictions: Tensor
    agreement: float


def finish(analysis: Analysis, start: Start, context: FitContext, run: Run, command: str) -> Result:
    """Distill a repaired student and measure it.

    Args:
        analysis: of the model.
        start: the student.
        context: of the distillation of all students: the most damaged one, the fastest one.
        run: what was asked for.
        command: recorded in the report.
    """
    planned, held_out, stages = start.planned, analysis.calibration.held_out, run.stages
    key, plan = _key(planned.target), planned.plan
    fit, teacher = NOTHING_TO_FIT, context.held_out
    if plan.removals:
        fit, teacher = _distill(analysis, start, context, run)
    assert teacher is not None
    lossless = present(start.student, analysis.lossless)
    student = apply(to_plain_format(start.student), lossless)
    final = predictions_of(student, held_out, analysis.pass_size)
    check_finite(student, final)
    with stages.timed("measure", key):
        timings = _measured(analysis, student, plan, run.settings)
    inputs = RunInputs(run.opened, analysis.source, analysis.calibration, run.settings)
    report = compressed_report(
        analysis,
        planned,
        inputs,
        scores=scores_of(analysis, run.settings, stages) if plan.removals else (),
        student=student,
        timings=timings,
        training=fit,
        logits=(teacher, start.predictions, final),
    )
    report = dataclasses.replace(report, seconds=stages.seconds(key), command=command, restarted=stages.restarted)
    return Result(student.cpu(), plan, report, analysis.calibration.ids, run.opened, lossless)


def _measured(analysis: Analysis, student: nn.Module, plan: Plan, settings: Settings) -> Timings:
    """Milliseconds of the model and the student, and of the model with the lossless changes alone where there are."""
    changed = analysis.lossless != UNCHANGED
    unpruned = applied(analysis.source, analysis.lossless) if changed and plan.removals else None
    timings = compare(analysis.source, student, analysis.batch, unpruned=unpruned, runtime=settings.runtime)
    if changed and not plan.removals:  # then the student is all that it is
        return Timings({**timings.ms, "lossless": timings.ms["compressed"]})
    return timings


def first_path(removals: Sequence[Removal]) -> str:
    """Where the student first differs from the teacher: what makes the members of a narrowed unit trains, too."""
    return removals[0].unit.paths[0] if removals else ""


def _key(target: Target) -> str:
    """Marks the files of the stages that belong to one target."""
    return fingerprint(str(target))[:8]


def _planned(analysis: Analysis, path: Sequence[PartialPlan], target: Target, run: Run) -> MeasuredPlan:
    def compute() -> dict[str, Any]:
        planned = make_plan(analysis, path, target, settings=run.settings, stages=run.stages)
        plan = planned.plan
        return {
            "removals": _plain(plan.removals),
            "numbers": [plan.harm, plan.original_ms, plan.budget_ms, plan.predicted_ms],
            "attempts": [[a.predicted_ms, a.measured_ms, a.error_ms, _plain(a.removals)] for a in planned.attempts],
            "front": planned.pareto_front,
        }

    stored = run.stages.json("plan", compute, _key(target))
    plan = Plan(_removals(analysis.units, stored["removals"]), *stored["numbers"])
    attempts = tuple(
        Attempt(predicted, measured, error, _removals(analysis.units, rows))
        for predicted, measured, error, rows in stored["attempts"]
    )
    return MeasuredPlan(target, plan, attempts, tuple(stored["front"]))


def _plain(removals: Sequence[Removal]) -> list[Any]:
    return [[removal.unit.id, removal.action, list(removal.kept)] for removal in removals]


def _removals(units: Sequence[Unit], rows: Sequence[Any]) -> tuple[Removal, ...]:
    by_id = {unit.id: unit for unit in units}
    return tuple(Removal(by_id[unit_id], action, tuple(kept)) for unit_id, action, kept in rows)


def _started(analysis: Analysis, planned: MeasuredPlan, teacher: Tensor, run: Run) -> Start:
    """The repaired student of a plan, and how well it agrees with the teacher on the held-out samples."""
    student = _repaired(analysis, planned, run)
    predictions = predictions_of(student, analysis.calibration.held_out, analysis.pass_size)
    agreement = task_of(analysis.teacher).agreement(predictions, teacher) if len(teacher) else 1.0
    return Start(planned, student, predictions, agreement)


def _repaired(analysis: Analysis, planned: MeasuredPlan, run: Run) -> nn.Module:
    student: nn.Module | None = None
    removals = planned.plan.removals

    def compute() -> tuple[dict[str, Tensor], Any]:
        nonlocal student
        samples, scope = analysis.calibration.fit.first(MAX_REPAIR), run.settings.score.refit_scope
        student = repaired(analysis.teacher, removals, samples, batch_size=analysis.pass_size, refit_scope=scope)
        return tensor_state(student), None

    state, _ = run.stages.tensors("repair", compute, _key(planned.target))
    return student if student is not None else replay(analysis.teacher, removals, state)


def _student_ms(analysis: Analysis, planned: MeasuredPlan) -> float:
    """Milliseconds of a batch in the student: as measured when it was planned, or as predicted."""
    measured = {attempt.removals: attempt.measured_ms for attempt in planned.attempts}
    ms = measured.get(planned.plan.removals, planned.plan.predicted_ms)
    return min(max(ms, 0.05 * analysis.lossless_ms), analysis.lossless_ms)


def _fit_context(analysis: Analysis, starts: Sequence[Start], teacher: Tensor, run: Run) -> FitContext:
    """Where and how long to distill: what serves the most damaged and the fastest student serves all of them."""
    settings = run.settings
    student_ms = min(_student_ms(analysis, start.planned) for start in starts)
    return FitContext(
        folder=run.stages.folder / "targets",
        batch_size=analysis.pass_size,
        seed=settings.seed,
        deadline=run.deadline,
        amp=settings.amp,
        agreement=min(start.agreement for start in starts),
        sample_ms=student_ms / settings.batch_size,
        memory=analysis.memory,
        held_out=teacher,
    )


def _distill(analysis: Analysis, start: Start, context: FitContext, run: Run) -> tuple[TrainingResult, Tensor]:
    """Prepare targets once for all students, then train this student; the teacher is out of reach of ``fit``."""
    method, stages, calibration = run.settings.distill, run.stages, analysis.calibration
    targets = load_teacher_outputs(context.folder) if method.one_time else None
    if targets is None:
        with stages.timed("prepare"):
            targets = method.prepare(analysis.teacher, calibration.fit, calibration.held_out, context)
        if method.one_time:
            save_teacher_outputs(targets, context.folder)
    else:
        stages.reused.append("prepare")
    key = _key(start.planned.target)
    student_context = dataclasses.replace(
        context,
        folder=stages.folder / f"distill-{key}",
        agreement=start.agreement,
        first=first_path(start.planned.plan.removals),
        sample_ms=_student_ms(analysis, start.planned) / run.settings.batch_size,
    )
    student_context.folder.mkdir(exist_ok=True)

    def compute() -> tuple[dict[str, Tensor], Any]:
        fit = method.fit(start.student, calibration.fit, calibration.held_out, targets, student_context)
        return tensor_state(start.student), dataclasses.asdict(fit)

    state, fit = stages.tensors("distill", compute, key)
    load_tensor_state(start.student, state)
    return TrainingResult(**fit), targets.held_out
