"""``compress``: join the verbs. Reads like the paper's algorithm.

select -> adapt -> find units -> time and score them -> plan -> cut and repair -> distill -> measure
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttmpd.artifact.write import Result, check_output
from ttmpd.distill.base import FitContext
from ttmpd.latency.device import choose_device, machine
from ttmpd.latency.table import compare
from ttmpd.latency.timing import Timings
from ttmpd.models.modules import to_plain_format
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.pipeline.analysis import Analysis, analyze, selected
from ttmpd.pipeline.calibration import Calibration, open_pool, split
from ttmpd.pipeline.candidates import Waypoint, walk
from ttmpd.pipeline.planning import TOLERANCE, Attempt, Planned, make_plan, needed_ms
from ttmpd.pipeline.report_data import collect
from ttmpd.pipeline.settings import Settings, Target, settings_of
from ttmpd.pipeline.stages import Stages
from ttmpd.records import UNCHANGED, Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.storage import disk_guarded, fingerprint, locked, weights_fingerprint
from ttmpd.surgery.cut import replay
from ttmpd.surgery.lossless import applied, apply, present
from ttmpd.training.loop import TrainingResult
from ttmpd.training.task import task_of
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
    """The same for several targets: adaptation, timing, scores and the teacher's answers are made once.

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
    with ExitStack() as locks, prepared(model, samples, chosen, folders[0], resume) as (analysis, stages):
        for folder in folders[1:]:  # the first is locked with its stages
            if folder is not None:
                locks.enter_context(locked(folder))
        # All plans come before any training: a target out of reach ends the run at once.
        waypoints = walk(analysis, max(needed_ms(analysis, target) for target in targets), stages)
        plans = [_planned(analysis, waypoints, target, stages) for target in targets]
        starts = _starts(
            analysis, [_repaired(analysis, planned.plan, stages, _key(planned.target)) for planned in plans]
        )
        fastest = min(_student_ms(analysis, planned) for planned in plans)
        work = _work(analysis, min(start.agreement for start in starts), fastest, stages)
        for planned, start, folder in zip(plans, starts, folders, strict=True):
            result = finish(analysis, planned, start, stages, work, command)
            if folder is not None:
                result.save(folder)
            results.append(result)
    return results


@contextmanager
def prepared(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    chosen: Settings,
    output: Path | None = None,
    resume: bool = False,
) -> Iterator[tuple[Analysis, Stages]]:
    """What is made once for all targets, and the stages: kept in ``output`` until the block ends well."""
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    deadline = time.monotonic() + chosen.time_budget
    calibration = split(open_pool(samples, opened, chosen), chosen)
    with _work_folder(output) as work:
        run = fingerprint(
            weights_fingerprint(opened.module),
            calibration.fit.ids,
            calibration.held_out.ids,
            chosen.to_dict() | {"time_budget": None},
            None if opened.preprocessing is None else opened.preprocessing.to_dict(),
        )
        stages = Stages(work, run, resume, circumstances(chosen))
        n = min(len(calibration), chosen.num_samples) - len(calibration.held_out)
        calibration = Calibration(selected(opened, calibration.fit, n, chosen, stages), calibration.held_out)
        yield analyze(opened, calibration, chosen, stages, deadline), stages


def circumstances(chosen: Settings) -> dict[str, str | int]:
    """What milliseconds of this run depend on: the device that "auto" is, threads, versions, allocator, runtime."""
    runtime = chosen.runtime
    return {
        "ttmpd": installed_version("ttmpd"),
        **machine(choose_device(chosen.device)),
        "runtime": f"{runtime.name} {runtime.version}",
    }


@contextmanager
def _work_folder(output: Path | None) -> Iterator[Path]:
    """Where stages are kept: inside the output folder, removed once the artifact is written; else temporary."""
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="ttmpd-")
        with temporary as folder, disk_guarded(Path(folder)):
            yield Path(folder) / "work"
        return
    with locked(output), disk_guarded(output):
        for left in output.glob(".writing-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = output / ".work"
        yield work
        shutil.rmtree(work, ignore_errors=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A repaired student before any training.

    Args:
        student: trained in place later.
        logits: (N, n_classes) its answers on the held-out samples.
        agreement: the share of these on which the teacher answers alike; 1 when none are held out.
    """

    student: nn.Module
    logits: Tensor
    agreement: float


def finish(
    analysis: Analysis, planned: Planned, start: Start, stages: Stages, work: FitContext, command: str
) -> Result:
    """Distill a repaired student and measure it; ``work`` is that of all students: the most lost, the fastest."""
    key, plan = _key(planned.target), planned.plan
    if plan.removals:
        fit, teacher_logits = _distill(analysis, start, planned, work, stages)
    else:
        fit, teacher_logits = (
            NOTHING_TO_FIT,
            predictions_of(analysis.teacher, analysis.calibration.held_out, analysis.pass_size),
        )
    how = present(start.student, analysis.lossless)
    student = apply(to_plain_format(start.student), how)
    final = predictions_of(student, analysis.calibration.held_out, analysis.pass_size)
    with stages.timed("measure", key):
        unpruned = (
            applied(analysis.source, analysis.lossless) if analysis.lossless != UNCHANGED and plan.removals else None
        )
        rounds = compare(analysis.source, student, analysis.batch, unpruned=unpruned, runtime=analysis.settings.runtime)
        if analysis.lossless != UNCHANGED and not plan.removals:  # then the student is all that it is
            rounds = Timings({**rounds.ms, "lossless": rounds.ms["compressed"]})
    facts = collect(
        analysis,
        planned,
        student=student,
        rounds=rounds,
        fit=fit,
        logits=(teacher_logits, start.logits, final),
        seconds=stages.seconds(key),
    )
    facts["command"] = command
    facts["restarted"] = stages.restarted
    facts["target"] |= _verdict(planned, facts)
    return Result(student.cpu(), plan, facts, analysis.calibration.ids, analysis.opened, facts["target"]["met"], how)


def _verdict(planned: Planned, facts: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the target is met: MACs are counted, milliseconds are measured and have a spread."""
    if planned.target.macs is not None:
        left = facts["student"]["macs"] / facts["model"]["macs"]
        return {"met": left <= planned.target.macs * (1 + TOLERANCE), "within_spread": False}
    speedup, needed = facts["latency"]["speedup"], planned.plan.original_ms / planned.plan.budget_ms
    met = speedup["high"] >= needed
    return {"met": met, "within_spread": met and speedup["median"] < needed}


def first_path(removals: Sequence[Removal]) -> str:
    """Where the student first differs from the teacher: what makes the members of a narrowed unit trains, too."""
    if not removals:
        return ""
    unit = removals[0].unit
    return unit.paths[0]


def _key(target: Target) -> str:
    """Marks the files of the stages that belong to one target."""
    return fingerprint(str(target))[:8]


def _planned(analysis: Analysis, waypoints: Sequence[Waypoint], target: Target, stages: Stages) -> Planned:
    def compute() -> dict[str, Any]:
        made = make_plan(analysis, waypoints, target)
        return {
            "removals": _plain(made.plan.removals),
            "numbers": [made.plan.harm, made.plan.original_ms, made.plan.budget_ms, made.plan.predicted_ms],
            "attempts": [[a.predicted_ms, a.measured_ms, a.error_ms, _plain(a.removals)] for a in made.attempts],
            "front": made.front,
        }

    stored = stages.json("plan", compute, _key(target))
    plan = Plan(_removals(analysis, stored["removals"]), *stored["numbers"])
    attempts = tuple(
        Attempt(predicted, measured, error, _removals(analysis, rows))
        for predicted, measured, error, rows in stored["attempts"]
    )
    return Planned(target, plan, attempts, tuple(stored["front"]))


def _plain(removals: Sequence[Removal]) -> list[Any]:
    return [[removal.unit.id, removal.action, list(removal.kept)] for removal in removals]


def _removals(analysis: Analysis, rows: Sequence[Any]) -> tuple[Removal, ...]:
    units = {unit.id: unit for unit in analysis.found.units}
    return tuple(Removal(units[name], action, tuple(kept)) for name, action, kept in rows)


def _repaired(analysis: Analysis, plan: Plan, stages: Stages, key: str) -> nn.Module:
    made: nn.Module | None = None

    def compute() -> tuple[dict[str, Tensor], Any]:
        few = analysis.calibration.fit.first(MAX_REPAIR)
        scope = analysis.settings.score.refit_scope
        student = repaired(analysis.teacher, plan.removals, few, batch_size=analysis.pass_size, refit_scope=scope)
        nonlocal made
        made = student
        return student.state_dict(), None

    state, _ = stages.tensors("repair", compute, key)
    return made if made is not None else replay(analysis.teacher, plan.removals, state)


def _starts(analysis: Analysis, students: Sequence[nn.Module]) -> list[Start]:
    answers = [predictions_of(student, analysis.calibration.held_out, analysis.pass_size) for student in students]
    if not len(analysis.calibration.held_out):
        return [Start(student, logits, 1.0) for student, logits in zip(students, answers, strict=True)]
    wanted = predictions_of(analysis.teacher, analysis.calibration.held_out, analysis.pass_size)
    task = task_of(analysis.teacher)
    return [
        Start(student, logits, task.agreement(logits, wanted))
        for student, logits in zip(students, answers, strict=True)
    ]


def _student_ms(analysis: Analysis, planned: Planned) -> float:
    """Milliseconds of a batch in the student: as measured when it was planned, or as predicted."""
    tried = {attempt.removals: attempt.measured_ms for attempt in planned.attempts}
    found = tried.get(planned.plan.removals, planned.plan.predicted_ms)
    return min(max(found, 0.05 * analysis.lossless_ms), analysis.lossless_ms)


def _work(analysis: Analysis, agreement: float, student_ms: float, stages: Stages) -> FitContext:
    """Where and how long to distill."""
    settings = analysis.settings
    return FitContext(
        folder=stages.folder / "targets",
        batch_size=analysis.pass_size,
        seed=settings.seed,
        deadline=analysis.deadline,
        amp=settings.amp,
        agreement=agreement,
        sample_ms=student_ms / settings.batch_size,
    )


def _distill(
    analysis: Analysis, start: Start, planned: Planned, work: FitContext, stages: Stages
) -> tuple[TrainingResult, Tensor]:
    """Prepare targets once for all students, then train this student; the teacher is out of reach of ``fit``."""
    method, key = analysis.settings.distill, _key(planned.target)
    targets = load_teacher_outputs(work.folder) if method.one_time else None
    if targets is None:
        with stages.timed("prepare"):
            targets = method.prepare(analysis.teacher, analysis.calibration.fit, analysis.calibration.held_out, work)
        if method.one_time:
            save_teacher_outputs(targets, work.folder)
    else:
        stages.reused.append("prepare")
    own = dataclasses.replace(
        work,
        folder=stages.folder / f"distill-{key}",
        agreement=start.agreement,
        first=first_path(planned.plan.removals),
        sample_ms=_student_ms(analysis, planned) / analysis.settings.batch_size,
    )
    own.folder.mkdir(exist_ok=True)

    def compute() -> tuple[dict[str, Tensor], Any]:
        fit = method.fit(start.student, analysis.calibration.fit, analysis.calibration.held_out, targets, own)
        return start.student.state_dict(), dataclasses.asdict(fit)

    state, told = stages.tensors("distill", compute, key)
    start.student.load_state_dict(state)
    return TrainingResult(**told), targets.held_out
