"""Everything a run measured, as plain data: what ``report.json`` holds and the report draws."""

import base64
import dataclasses
import datetime
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.adapt.base import Adapted
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.latency.device import machine
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import count_parameters
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.analysis import Analysis
from ttmpd.pipeline.calibration import Calibration
from ttmpd.pipeline.planning import MeasuredPlan
from ttmpd.pipeline.preparation import latency_batch
from ttmpd.pipeline.settings import Settings
from ttmpd.quality.proportion import proportion
from ttmpd.records import ACTIONS, Action, Plan, Score, WidthUnit
from ttmpd.tasks.base import OneOf, Task
from ttmpd.training.loop import TrainingResult
from ttmpd.training.task import task_of

FORMAT = 1
MAX_COUNTED = 20_000
"""Classes whose answers are counted one by one; a larger vocabulary would fill the report with numbers."""
MAX_PARTED = 12
"""Samples shown on which student and teacher part."""
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


def collect(
    analysis: Analysis,
    planned: MeasuredPlan,
    opened: OpenedModel,
    settings: Settings,
    *,
    student: nn.Module,
    scores: Sequence[Score],
    rounds: Timings,
    fit: TrainingResult,
    logits: tuple[Tensor, Tensor, Tensor],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The facts of one run.

    Args:
        analysis: what was known before the target.
        planned: what was removed, and how that was decided.
        opened: where the model came from.
        settings: of the run.
        student: the compressed model.
        scores: of all units; none where nothing was removed.
        rounds: interleaved milliseconds of "original" and "compressed".
        fit: what distillation did.
        logits: on the held-out samples: teacher, student before and after distillation.
        seconds: per stage.
    """
    plan = planned.plan
    budget_ms = None if planned.target.macs is not None else plan.budget_ms
    (teacher, start, final), task = logits, task_of(analysis.source)
    return _known(opened, analysis.source, student, analysis.calibration, settings) | {
        "adapt": {"note": analysis.adapt_note, "facts": analysis.adapt_facts},
        "units": _units(analysis, plan, scores),
        "refused": [[path, str(refusal)] for path, refusal in analysis.not_removable.items()],
        "target": {"asked": str(planned.target), "budget_ms": budget_ms, "harm": plan.harm},
        "attempts": [{"predicted_ms": a.predicted_ms, "measured_ms": a.measured_ms} for a in planned.attempts],
        "front": [dict(row) for row in planned.pareto_front],
        "lossless": str(analysis.lossless),
        "latency": _latency(rounds, plan, [a.measured_ms for a in planned.attempts if a.removals == plan.removals]),
        "agreement": _agreement(teacher, final, task),
        "agreement_repaired": _agreement(teacher, start, task),
        "held_out": _held_out(analysis.calibration.held_out, teacher, final, task),
        "parted": _parted(analysis.calibration.held_out, teacher, final, opened, task),
        "fit": dataclasses.asdict(fit),
        "seconds": dict(seconds),
    }


def collect_adapted(
    opened: OpenedModel,
    source: nn.Module,
    adapted: Adapted,
    calibration: Calibration,
    settings: Settings,
    logits: tuple[Tensor, Tensor],
    seconds: float,
) -> dict[str, Any]:
    """The facts of an adaptation alone.

    Args:
        opened: where the model came from.
        source: the model before.
        adapted: the model after.
        calibration: samples adapted to, and held-out samples.
        settings: of the run.
        logits: on the held-out samples, before and after.
        seconds: that it took.
    """
    known = _known(opened, source, adapted.model, calibration, settings)
    used = ("num_samples", "holdout", "batch_size", "device", "seed")
    return known | {
        "settings": {name: known["settings"][name] for name in used},
        "methods": {"adapt": known["methods"]["adapt"]},
        "adapt": {"note": adapted.note, "facts": adapted.facts},
        "agreement": _agreement(*logits, task_of(source)),
        "held_out": _held_out(calibration.held_out, *logits, task_of(source)),
        "parted": _parted(calibration.held_out, *logits, opened, task_of(source)),
        "seconds": {"adapt": seconds},
    }


def collect_exits(
    opened: OpenedModel,
    source: nn.Module,
    model: nn.Module,
    calibration: Calibration,
    settings: Settings,
    *,
    found: Mapping[str, Any],
    rounds: Timings,
    plan: Plan,
    logits: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """The facts of exits that were put on a model.

    Args:
        opened: where the model came from.
        source: the model without exits.
        model: the same with exits.
        calibration: samples that exits were trained on, and held-out samples.
        settings: of the run.
        found: what belongs to exits alone: "early_exit", "attempts", "target", "seconds", and the method as plain data.
        rounds: mean milliseconds of "original" and "compressed", a value per pass through the samples.
        plan: nothing removed; its milliseconds.
        logits: on the held-out samples, without and with exits.
    """
    known = _known(opened, source, source, calibration, settings)
    used = ("num_samples", "holdout", "batch_size", "device", "seed")
    return known | {
        "student": {"parameters": count_parameters(model)},  # how much is computed differs from sample to sample
        "settings": {name: known["settings"][name] for name in used},
        "methods": {"early_exit": found["method"]},
        "early_exit": found["early_exit"],
        "target": {"asked": found["target"], "budget_ms": plan.budget_ms},
        "attempts": found["attempts"],
        "latency": _latency(rounds, plan),
        "agreement": _agreement(*logits, task_of(source)),
        "held_out": _held_out(calibration.held_out, *logits, task_of(source)),
        "parted": _parted(calibration.held_out, *logits, opened, task_of(source)),
        "seconds": found["seconds"],
    }


def _known(
    opened: OpenedModel, source: nn.Module, student: nn.Module, calibration: Calibration, settings: Settings
) -> dict[str, Any]:
    """Facts of every run: which model, which machine, which settings, which samples."""
    plain, timed = settings.to_dict(), latency_batch(source, calibration.fit, settings)
    batch = timed[:2]  # operations are counted on what is timed: of text, as long as there
    return {
        "format": FORMAT,
        "ttmpd": _version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": settings.seed,
        "model": _model(source, batch)
        | {"id": opened.id, "class": type(source).__name__, "rebuildable": opened.rebuildable},
        "student": _model(student, batch),
        "machine": machine(batch.device) | {"batch_size": settings.batch_size},
        "runtime": {"name": settings.runtime.name, "version": settings.runtime.version},
        "settings": {k: v for k, v in plain.items() if not isinstance(v, dict)},
        "methods": {k: v for k, v in plain.items() if isinstance(v, dict)},
        "samples": {
            "n_fit": len(calibration.fit),
            "n_held_out": len(calibration.held_out),
            "input_shape": list(timed.shape[1:]),
            "skipped": [list(row) for row in calibration.fit.skipped],
            "notes": [list(row) for row in calibration.fit.notes],
            "tokens": _lengths(calibration.fit),
        },
        "class_names": list(opened.class_names),
        "each": task_of(source).each,
        "task": task_of(source).to_dict() | {"same": task_of(source).same},
    }


def _lengths(samples: Samples) -> dict[str, float] | None:
    """Tokens per sample, padding left out; None for what is no text."""
    kept = samples.token_mask(samples.inputs)
    if kept is None:
        return None
    lengths = kept.sum(1).double()
    return {"mean": float(lengths.mean()), "median": float(lengths.median()), "longest": int(lengths.max())}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ttmpd")
    except PackageNotFoundError:
        return "unknown"


def _model(model: nn.Module, few: Tensor) -> dict[str, Any]:
    return {"parameters": count_parameters(model), "macs": count_macs(model, few)[""]}


def _units(analysis: Analysis, plan: Plan, scores: Sequence[Score]) -> list[dict[str, Any]]:
    timings = {timing.unit: timing for timing in analysis.latencies}
    harms: dict[tuple[str, Action], Score] = {
        (score.unit_id, score.action): score for score in scores if score.action != "narrow"
    }
    widths: dict[str, list[list[float]]] = {}
    for score in scores:
        if score.action == "narrow":
            widths.setdefault(score.unit_id, []).append([len(score.kept), score.harm])
    kept = {removal.unit.id: len(removal.kept) for removal in plan.removals}
    saved = {
        removal.unit.id: timings[removal.unit.id].saved_ms(removal.action, len(removal.kept))
        for removal in plan.removals
    }
    rows = []
    for unit in analysis.units:
        by_action = {action: harms[unit.id, action] for action in ACTIONS if (unit.id, action) in harms}
        rows.append(
            {
                "id": unit.id,
                "module": unit.module,
                "shape": list(unit.shape),
                "parameters": unit.n_params,
                "macs": unit.macs,
                "ms": timings[unit.id].ms,
                **{f"{action}_ms": ms for action, ms in timings[unit.id].replacements.items()},
                **{f"harm_{action}": score.harm for action, score in by_action.items()},
                "parts": dict(next(iter(by_action.values())).parts) if by_action else {},
                **(_members(unit, kept, widths, timings[unit.id]) if isinstance(unit, WidthUnit) else {}),
                "action": plan.actions.get(unit.id, "keep"),
                **({"saved_ms": saved[unit.id]} if unit.id in saved else {}),
            }
        )
    return rows


def _members(
    unit: WidthUnit, kept: Mapping[str, int], widths: Mapping[str, list[list[float]]], timing: UnitLatency
) -> dict[str, Any]:
    """How many members there are and stay; (members, harm) of every width, and milliseconds by members."""
    return {
        "members": unit.n_members,
        "kept": kept.get(unit.id, unit.n_members),
        "width_harms": widths.get(unit.id, []),
        "width_ms": dict(timing.widths),
    }


def _latency(rounds: Timings, plan: Plan, before_ms: Sequence[float] = ()) -> dict[str, Any]:
    """Measured milliseconds; ``before_ms`` are those of the same plan when it was chosen."""
    ratio = rounds.ratio("original", "compressed")
    ms = plan.original_ms / ratio.median_ms
    moved = any(abs(before / ms - 1) > MOVED for before in before_ms)
    unpruned = {}
    if "lossless" in rounds.ms:
        faster = rounds.ratio("original", "lossless").median_ms
        unpruned = {"lossless": dataclasses.asdict(rounds.timing("lossless")), "lossless_speedup": faster}
    return unpruned | {
        "original_ms": list(rounds.ms["original"]),
        "compressed_ms": list(rounds.ms["compressed"]),
        "original": dataclasses.asdict(rounds.timing("original")),
        "compressed": dataclasses.asdict(rounds.timing("compressed")),
        "speedup": {"median": ratio.median_ms, "low": ratio.low_ms, "high": ratio.high_ms},
        "noise": NOISE if ratio.high_ms > NOISY * ratio.low_ms else MOVED_SINCE if moved else "",
        "predicted_ms": plan.predicted_ms,
    }


def _agreement(teacher: Tensor, student: Tensor, task: Task) -> dict[str, Any] | None:
    if not len(teacher):
        return None
    return dataclasses.asdict(proportion(round(task.agreement(student, teacher) * len(teacher)), len(teacher)))


def _held_out(samples: Samples, teacher: Tensor, student: Tensor, task: Task) -> dict[str, Any]:
    by_sample = len(teacher) == len(samples)
    counted = isinstance(task, OneOf) and len(teacher) > 0 and (by_sample or teacher.shape[-1] <= MAX_COUNTED)
    confidence = [task.confidence(outputs) if len(outputs) else None for outputs in (teacher, student)]
    classes = [task.split(outputs)[0].argmax(-1).tolist() if counted else [] for outputs in (teacher, student)]
    return {
        "names": list(samples.names) if by_sample else [],
        "teacher": classes[0],
        "student": classes[1],
        "teacher_confidence": [] if confidence[0] is None else confidence[0].tolist(),
        "student_confidence": [] if confidence[1] is None else confidence[1].tolist(),
    }


def _parted(
    samples: Samples, teacher: Tensor, student: Tensor, opened: OpenedModel, task: Task
) -> list[dict[str, Any]]:
    """The held-out samples to which student and teacher give different classes, the surest student first."""
    if not len(samples) or not isinstance(task, OneOf) or task.each != "sample":
        return []
    theirs, ours = task.split(teacher)[0].softmax(-1).max(-1), task.split(student)[0].softmax(-1).max(-1)
    parted = torch.nonzero(theirs.indices != ours.indices).flatten().tolist()
    parted.sort(key=lambda i: -float(ours.values[i]))
    return [
        {
            "name": samples.names[i] if samples.names else str(i),
            "png": _png(samples, i),
            "text": _text(samples, i, opened),
            "teacher": int(theirs.indices[i]),
            "student": int(ours.indices[i]),
            "teacher_confidence": float(theirs.values[i]),
            "student_confidence": float(ours.values[i]),
        }
        for i in parted[:MAX_PARTED]
    ]


def _text(samples: Samples, number: int, opened: OpenedModel) -> str:
    """What the model read of a text; "" when it is none."""
    if not (samples.is_text and isinstance(opened.preprocessing, Tokenization)):
        return ""
    return opened.preprocessing.text_of(samples.inputs[number])


def _png(samples: Samples, number: int) -> str:
    """A small picture of a sample, base64; "" when it is no image."""
    from torchvision.transforms.functional import to_pil_image

    pixels = samples.inputs[number]
    if not samples.is_image or pixels.dtype != torch.uint8:
        return ""
    image = to_pil_image(pixels)
    image.thumbnail((112, 112))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
