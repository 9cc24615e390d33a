"""What a run makes, and how it is written: a readable plan and safetensors, each file whole or not at all."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ttmpd.artifact.plain import to_plain
from ttmpd.artifact.run_report import RunReport
from ttmpd.errors import InvalidValueError
from ttmpd.models.open import is_rebuildable
from ttmpd.models.opened import OpenedModel
from ttmpd.models.state import tensor_state
from ttmpd.records import UNCHANGED, Lossless, Plan
from ttmpd.storage import disk_guarded, write_json
from ttmpd.surgery.cut import joined
from ttmpd.surgery.exits.model import exits_data

FORMAT = 2
"""Format 1 did not say its kind, nor what was folded into what, nor where it was measured."""
PLAN, WEIGHTS = "plan.json", "model.safetensors"
STOCK = "transformers"
"""Folder with the same student as its own library writes models, where that can say what is left of it."""
_FILES = (WEIGHTS, "report.json", "report.html", "README.md")
UNFINISHED = ".unfinished"


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A model that was made faster, adapted or given exits, with its proof.

    Args:
        model: a plain ``nn.Module`` in eval mode, on the CPU; with exits an :class:`ttmpd.EarlyExitModel`, whose
            ``threshold`` may be changed at any time.
        plan: what was removed, and the milliseconds.
        report: everything that was measured; page, card and ``report.json`` are made of it.
        sample_ids: content hashes of the unlabelled samples that were used.
        opened: where the model came from.
        lossless: what was done to the model besides, in this run.
    """

    model: nn.Module
    plan: Plan
    report: RunReport
    sample_ids: tuple[str, ...]
    opened: OpenedModel
    lossless: Lossless = UNCHANGED

    @property
    def met(self) -> bool:
        """True when what was measured meets the target, or none was set."""
        return self.report.target is None or self.report.target.met

    def save(self, folder: str | Path) -> Path:
        """Write the artifact: plan.json, model.safetensors, README.md, report.html, report.json.

        Args:
            folder: made if missing; an artifact that is there is replaced.

        Returns:
            The folder: :func:`ttmpd.load` reads it.

        Raises:
            TTMPDError: there is no room or no permission to write.
        """
        return write_artifact(Path(folder), self)

    save_pretrained = save


def write_artifact(folder: Path, result: Result) -> Path:
    """Write an artifact of any kind, each file whole or not at all.

    Args:
        folder: made if missing.
        result: what was made.
    """
    from ttmpd.artifact.report import write_report

    check_output(folder)
    with disk_guarded(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        try:
            # Tied tensors are written once each: loading copies them into one place again.
            state = {
                key: value.detach().cpu().contiguous().clone() for key, value in tensor_state(result.model).items()
            }
            save_file(state, unfinished / WEIGHTS)
            hugging_face = _stock(result, unfinished / STOCK)
            write_report(dataclasses.replace(result.report, hugging_face=hugging_face), unfinished)
            data = _described(result) | exits_data(result.model)
            data["weights"] = {"file": WEIGHTS, "sha256": sha256(unfinished / WEIGHTS)}
            write_json(unfinished / PLAN, data)
            shutil.copymode(unfinished / PLAN, unfinished / WEIGHTS)  # safetensors makes it private
            (folder / UNFINISHED).touch()  # from here to the last rename the folder is no artifact
            (folder / PLAN).unlink(missing_ok=True)
            _discard(folder / STOCK)  # of another student
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == PLAN):
                _discard(folder / path.name)
                path.replace(folder / path.name)
            (folder / UNFINISHED).unlink()
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _discard(path: Path) -> None:
    """Remove a folder of an artifact that is written anew; a file is replaced in one step."""
    if path.is_dir():
        shutil.rmtree(path)


def _stock(result: Result, folder: Path) -> str:
    """Write the student as its own library does; the name of its class, "" where that cannot say what is left."""
    from ttmpd.artifact.huggingface import save_stock, stock_model

    opened, shape = result.opened, result.report.samples.input_shape
    fresh = stock_model(result.model, joined(opened.removed, result.plan.removals), opened.preprocessing, shape)
    if fresh is None:
        return ""
    save_stock(fresh, opened.preprocessing, folder)
    return type(fresh).__name__


def check_output(folder: Path) -> None:
    """Refuse to write where nothing can be written, or among files that are not ours, before any time is spent.

    Raises:
        InvalidValueError: the folder is a file or lies below one, may not be written to, or holds files of an
            artifact's names and is no artifact.
    """
    try:
        _check_place(folder)
        if not folder.is_dir() or _is_ours(folder):
            return
        others = [name for name in (PLAN, *_FILES) if (folder / name).exists()]
    except OSError as error:
        raise InvalidValueError(
            f"output must be a folder that can be made, but {str(folder)[:200]!r} cannot ({error.strerror}); choose "
            "another"
        ) from error
    if others:
        raise InvalidValueError(
            f"output must be a new or empty folder, or an artifact, but {str(folder)!r} holds other files "
            f"({', '.join(others[:3])}) that would be overwritten; choose another"
        )


def _check_place(folder: Path) -> None:
    """Refuse a folder that is a file, lies below one, or may not be written to."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        where = "is" if place == folder else f"lies below {str(place)!r}, which is"
        raise InvalidValueError(f"output must be a folder, but {str(folder)!r} {where} a file; choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InvalidValueError(f"output must be a folder to write to, but {str(place)!r} is read-only; choose another")


def _is_ours(folder: Path) -> bool:
    """Whether an artifact lies there, or an unfinished one: its plan states the format and the version of ttmpd."""
    if (folder / UNFINISHED).exists():
        return True
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(plan, dict) and isinstance(plan.get("format"), int) and "ttmpd" in plan


def _described(result: Result) -> dict[str, Any]:
    plan, opened, report = result.plan, result.opened, result.report
    numbers = {key: getattr(plan, key) for key in ("harm", "original_ms", "budget_ms", "predicted_ms")}
    removals = joined(opened.removed, plan.removals)
    return {
        "format": FORMAT,
        "kind": report.kind,
        "ttmpd": report.version,
        "task": {"name": report.task.name, **report.task.settings},
        "runtime": to_plain(report.runtime),
        "machine": to_plain(report.machine),
        "model": {
            "id": opened.id,
            "rebuildable": is_rebuildable(opened.id),
            "class": type(opened.module).__name__,
        },
        "preprocessing": opened.preprocessing.to_dict() if opened.preprocessing else None,
        "class_names": list(opened.class_names),
        "input_shape": list(report.samples.input_shape),
        "plan": {"removals": [removal.to_dict() for removal in removals]} | numbers,
        "lossless": (opened.lossless | result.lossless).to_dict(),
        "folded": dataclasses.asdict(opened.folded),
        "methods": {verb: {"name": method.name, **method.settings} for verb, method in report.methods.items()},
        "settings": dict(report.settings),
        "sample_ids": list(dict.fromkeys((*opened.used_ids, *result.sample_ids))),
    }


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
