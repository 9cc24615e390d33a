"""Everything a run measured, as plain data: what ``report.json`` holds and the report draws."""

import base64
import dataclasses
import datetime
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.modules import count_macs, count_parameters
from ttmpd.planning import Planned
from ttmpd.ready import Ready
from ttmpd.records import ACTIONS, Fit, Plan, Samples, agreement
from ttmpd.timing import Rounds, machine

FORMAT = 1
MAX_PARTED = 12
"""Samples shown on which student and teacher part."""


def collect(
    ready: Ready,
    planned: Planned,
    *,
    student: nn.Module,
    rounds: Rounds,
    fit: Fit,
    logits: tuple[Tensor, Tensor, Tensor],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The facts of one run.

    Args:
        ready: what was known before the target.
        planned: what was removed, and how that was decided.
        student: the compressed model.
        rounds: interleaved milliseconds of "original" and "compressed".
        fit: what distillation did.
        logits: on the held-out samples: teacher, student before and after distillation.
        seconds: per stage.
    """
    plan = planned.plan
    teacher, start, final = logits
    settings = ready.settings.to_dict()
    few = ready.samples.batch(slice(0, 2), next(ready.source.parameters()).device)
    return {
        "format": FORMAT,
        "ttmpd": _version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": ready.settings.seed,
        "model": _model(ready.source, few)
        | {"id": ready.opened.id, "class": type(ready.source).__name__, "rebuildable": ready.opened.rebuildable},
        "student": _model(student, few),
        "machine": machine(few.device) | {"batch_size": ready.settings.batch_size},
        "settings": {k: v for k, v in settings.items() if not isinstance(v, dict)},
        "methods": {k: v for k, v in settings.items() if isinstance(v, dict)},
        "samples": {
            "n_fit": len(ready.samples),
            "n_held_out": len(ready.held_out),
            "input_shape": list(few.shape[1:]),
            "skipped": [list(row) for row in ready.samples.skipped],
        },
        "adapt": {"note": ready.adapt_note, "facts": ready.adapt_facts},
        "units": _units(ready, plan),
        "refused": [list(row) for row in ready.found.refused],
        "target": {"asked": str(planned.target), "budget_ms": plan.budget_ms, "harm": plan.harm},
        "attempts": [{"predicted_ms": a.predicted_ms, "measured_ms": a.measured_ms} for a in planned.attempts],
        "front": [dict(row) for row in planned.front],
        "latency": _latency(rounds, plan),
        "agreement": _agreement(teacher, final),
        "agreement_repaired": _agreement(teacher, start),
        "held_out": _held_out(ready.held_out, teacher, final),
        "class_names": list(ready.opened.class_names),
        "parted": _parted(ready.held_out, teacher, final),
        "fit": dataclasses.asdict(fit),
        "seconds": dict(seconds),
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ttmpd")
    except PackageNotFoundError:
        return "unknown"


def _model(model: nn.Module, few: Tensor) -> dict[str, Any]:
    return {"parameters": count_parameters(model), "macs": count_macs(model, few)[""]}


def _units(ready: Ready, plan: Plan) -> list[dict[str, Any]]:
    timings = {timing.unit: timing for timing in ready.timings}
    harms = {(score.unit, score.action): score for score in ready.scores}
    rows = []
    for unit in ready.found.units:
        scores = {action: harms[unit.id, action] for action in ACTIONS if (unit.id, action) in harms}
        rows.append(
            {
                "id": unit.id,
                "module": unit.module,
                "shape": list(unit.shape),
                "parameters": unit.n_params,
                "macs": unit.macs,
                "ms": timings[unit.id].ms,
                **{f"{action}_ms": ms for action, ms in timings[unit.id].stand_ins.items()},
                **{f"harm_{action}": score.harm for action, score in scores.items()},
                "parts": dict(next(iter(scores.values())).parts) if scores else {},
                "action": plan.actions.get(unit.id, "keep"),
            }
        )
    return rows


def _latency(rounds: Rounds, plan: Plan) -> dict[str, Any]:
    ratio = rounds.ratio("original", "compressed")
    return {
        "original_ms": list(rounds.ms["original"]),
        "compressed_ms": list(rounds.ms["compressed"]),
        "original": dataclasses.asdict(rounds.timing("original")),
        "compressed": dataclasses.asdict(rounds.timing("compressed")),
        "speedup": {"median": ratio.median_ms, "low": ratio.low_ms, "high": ratio.high_ms},
        "predicted_ms": plan.predicted_ms,
    }


def _agreement(teacher: Tensor, student: Tensor) -> dict[str, Any] | None:
    if not len(teacher):
        return None
    alike = int((teacher.argmax(-1) == student.argmax(-1)).sum())
    return dataclasses.asdict(agreement(alike, len(teacher)))


def _held_out(samples: Samples, teacher: Tensor, student: Tensor) -> dict[str, Any]:
    sure = [logits.softmax(-1).max(-1) if len(logits) else None for logits in (teacher, student)]
    return {
        "names": list(samples.names),
        "teacher": sure[0].indices.tolist() if sure[0] else [],
        "student": sure[1].indices.tolist() if sure[1] else [],
        "teacher_confidence": sure[0].values.tolist() if sure[0] else [],
        "student_confidence": sure[1].values.tolist() if sure[1] else [],
    }


def _parted(samples: Samples, teacher: Tensor, student: Tensor) -> list[dict[str, Any]]:
    """The held-out samples on which student and teacher part, the surest student answers first."""
    if not len(samples):
        return []
    theirs, ours = teacher.softmax(-1).max(-1), student.softmax(-1).max(-1)
    parted = torch.nonzero(theirs.indices != ours.indices).flatten().tolist()
    parted.sort(key=lambda i: -float(ours.values[i]))
    return [
        {
            "name": samples.names[i] if samples.names else str(i),
            "png": _png(samples, i),
            "teacher": int(theirs.indices[i]),
            "student": int(ours.indices[i]),
            "teacher_confidence": float(theirs.values[i]),
            "student_confidence": float(ours.values[i]),
        }
        for i in parted[:MAX_PARTED]
    ]


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
