"""Read ``report.json`` of format 1: other names, no kind, whatever was absent left out."""

from collections.abc import Mapping
from typing import Any

_DEFAULTS = {"command": "", "class_names": [], "seconds": {}, "restarted": ""}


def upgraded_report(data: Mapping[str, Any]) -> dict[str, Any]:
    """A report of format 1 in the words of format 2; what it does not say is unknown, and says so.

    Args:
        data: what ``report.json`` holds; it is not changed.

    Raises:
        KeyError, TypeError, AttributeError: a value is missing or of another kind; a report that ``train-student``
            wrote is one of these, since it had no format.
    """
    exits, target, adapt = data.get("early_exit"), data.get("target"), data.get("adapt")
    machine = {"freed_memory": "unknown", **data["machine"]}
    batch_size = machine.pop("batch_size")
    return {name: data.get(name, value) for name, value in _DEFAULTS.items()} | {
        "kind": "exits" if exits else "compressed" if target else "adapted",
        "version": data["ttmpd"],
        "created": data["created"],
        "seed": data["seed"],
        "model": _model(data["model"]),
        "student": {"macs": None, **data["student"]},
        "task": _task(data),
        "machine": machine,
        "runtime": {"name": "eager", "version": machine["torch"], "ratio": 1.0, **data.get("runtime", {})},
        "settings": data["settings"],
        "methods": {verb: _method(method) for verb, method in data["methods"].items()},
        "samples": data["samples"],
        "adaptation": None if adapt is None else {"note": adapt["note"], "numbers": adapt["facts"]},
        "target": None if target is None else {"harm": None, **target},
        "units": [_unit(row) for row in data.get("units", [])],
        "not_removable": data.get("refused", []),
        "attempts": data.get("attempts", []),
        "front": [_renamed(row, target="latency_share") for row in data.get("front", [])],
        "latency": _latency(data, batch_size),
        "agreement": _proportion(data["agreement"]),
        "agreement_before": _proportion(data.get("agreement_repaired")),
        "held_out": data["held_out"],
        "disagreements": data["parted"],
        "training": None if data.get("fit") is None else _training(data["fit"]),
        "exits": None if exits is None else _exits(exits),
        "lesson": None,
        "hugging_face": data.get("stock", ""),
    }


def _renamed(row: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The row with other names for some keys: old=new."""
    return {names.get(key, key): value for key, value in row.items()}


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    return _renamed(model, **{"class": "class_name"})


def _proportion(agreement: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if agreement is None else _renamed(agreement, n_samples="n")


def _method(method: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": method["name"], "settings": {key: value for key, value in method.items() if key != "name"}}


def _task(data: Mapping[str, Any]) -> dict[str, Any]:
    """Early reports of the format knew one class for each sample or token, and nothing else."""
    each = data.get("each", "sample")
    task = dict(data.get("task", {"name": "classification" if each == "sample" else "token_classification"}))
    name, same = task.pop("name"), task.pop("same", "the same class")
    return {"name": name, "each": each, "same": same, "detected": True, "settings": task}


def _unit(row: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds and harms by action had keys of their own; 3x3 replacements are no longer known."""
    replacement_ms = {"linear": row["linear_ms"]} if "linear_ms" in row else {}
    harms = {action: row[f"harm_{action}"] for action in ("drop", "linear") if f"harm_{action}" in row}
    members = row.get("members")
    return {
        **{name: row[name] for name in ("id", "module", "shape", "parameters", "macs", "ms", "parts", "action")},
        "replacement_ms": replacement_ms,
        "harms": harms,
        "n_members": members,
        "widths": _widths(row),
        "n_kept": row["kept"] if members else None,
        "saved_ms": row.get("saved_ms"),
    }


def _widths(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    harms = {int(width): harm for width, harm in row.get("width_harms", [])}
    ms = {int(width): value for width, value in row.get("width_ms", {}).items()}
    widths = sorted({*harms, *ms}, reverse=True)
    return [{"n_kept": width, "ms": ms.get(width), "harm": harms.get(width)} for width in widths]


def _latency(data: Mapping[str, Any], batch_size: int) -> dict[str, Any] | None:
    latency = data.get("latency")
    if latency is None:
        return None
    lossless = latency.get("lossless")
    if lossless is not None:
        lossless = {"changes": data["lossless"], "timing": lossless, "speedup": latency["lossless_speedup"]}
    return {
        **{name: latency[name] for name in ("original", "compressed", "speedup", "predicted_ms")},
        "batch_size": batch_size,
        "original_rounds": latency["original_ms"],
        "compressed_rounds": latency["compressed_ms"],
        "lossless": lossless,
        "caution": latency["noise"],
    }


def _training(fit: Mapping[str, Any]) -> dict[str, Any]:
    checks = [{"step": step, "agreement": agreement, "loss": loss} for step, agreement, loss in fit["checks"]]
    return _renamed(fit, mixed="start_weight") | {"checks": checks}


def _exits(exits: Mapping[str, Any]) -> dict[str, Any]:
    names = ("path", "threshold", "share", "ms", "agreement", "temperature", "calibration_error_before",
             "calibration_error")  # fmt: skip
    return {
        **{name: exits[name] for name in ("note", "labelled", "threshold", "agreement", "n_samples", "predicted_ms")},
        "exits": [{name: row.get(name) for name in names} for row in exits["exits"]],
        "end_share": exits["end"]["share"],
        "end_ms": exits["end"]["ms"],
        "curve": exits["curve"],
    }
