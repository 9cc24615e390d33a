"""Finished stages on disk, so that a killed run goes on where it was; one run per folder at a time."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttmpd.latency.memory import release_freed_memory
from ttmpd.progress import tell_stage
from ttmpd.storage import _read_json, replacing, write_json

Tensors = dict[str, Tensor]

_log = logging.getLogger("ttmpd")

ADAPT_STAGE = "adapt"
"""The stage whose file holds the weights of the adapted teacher; a watcher of ``progress`` hears when it is there."""
MACHINE_FREE = ("run.json", "select.json", f"{ADAPT_STAGE}.safetensors", "score.json")
"""Files of the stages that do not depend on milliseconds: they stay when a run is resumed on another machine."""
Circumstances = Mapping[str, str | int]
"""What milliseconds depend on, and the version of this package under "ttmpd"."""


class Stages:
    """A folder of finished stages. What is there is not computed again.

    Args:
        folder: made if missing.
        run: fingerprint of everything the stages depend on; a folder of another run is emptied.
        resume: keep what an earlier run with the same fingerprint left.
        circumstances: under which this run measures. An earlier run of another version is not gone on with; of one on
            another device or machine only what does not depend on milliseconds is kept.

    Attributes:
        restarted: what of an earlier run was not taken over, and why; "" when all of it was, or there was none.
    """

    def __init__(
        self, folder: Path, run: str, resume: bool = False, circumstances: Circumstances | None = None
    ) -> None:
        self.folder = folder
        self.restarted = ""
        self.reused: list[str] = []
        self._seconds: dict[tuple[str, str], float] = {}
        marker = folder / "run.json"
        stored = _read_json(marker)
        before = stored.get("circumstances", {}) if isinstance(stored, dict) and stored.get("run") == run else None
        changes = {} if before is None else _changes(before, circumstances or {})
        if not resume or before is None or "ttmpd" in changes:
            shutil.rmtree(folder, ignore_errors=True)
        elif changes:
            for path in folder.iterdir():
                if path.name not in MACHINE_FREE:
                    _remove(path)
        if resume and changes:
            self.restarted = _restarted(changes)
            _log.warning(self.restarted)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"run": run, "circumstances": dict(circumstances or {})})

    def seconds(self, key: str = "") -> dict[str, float]:
        """Seconds of the stages that serve every target and of those of one target; ``name#1`` counts as ``name``."""
        seconds: dict[str, float] = {}
        for (name, of), value in self._seconds.items():
            if of in ("", key):
                label = name.partition("#")[0]
                seconds[label] = seconds.get(label, 0.0) + value
        return seconds

    @contextmanager
    def timed(self, name: str, key: str = "") -> Iterator[None]:
        """Note the seconds of a block as those of a stage, and let the next one begin with little memory."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name, key] = time.perf_counter() - start
            release_freed_memory()

    def json(self, name: str, compute: Callable[[], Any], key: str = "") -> Any:
        """The plain data of a stage: from disk if it is finished, else computed and kept.

        Args:
            name: of the stage.
            compute: makes the data.
            key: of the target, for a stage that does not serve all of them.
        """
        path = self.folder / f"{_file(name, key)}.json"
        stored = _read_json(path)
        if isinstance(stored, dict) and stored.keys() == {"data", "seconds"}:
            data = self._reuse(name, key, stored)
        else:
            with self.timed(name, key):
                data = compute()
            write_json(path, {"data": data, "seconds": self._seconds[name, key]})
        tell_stage(name, path)
        return data

    def tensors(
        self, name: str, compute: Callable[[], tuple[Mapping[str, Tensor], Any]], key: str = ""
    ) -> tuple[Tensors, Any]:
        """The tensors and plain data of a stage, like :meth:`json`."""
        path = self.folder / f"{_file(name, key)}.safetensors"
        stage = self._stored_tensors(path, name, key)
        if stage is None:
            with self.timed(name, key):
                values, data = compute()
            tensors = {label: value.detach().cpu().contiguous().clone() for label, value in values.items()}
            facts = json.dumps({"data": data, "seconds": self._seconds[name, key]})
            with replacing(path) as unfinished:
                save_file(tensors, unfinished, {"stage": facts})
            stage = tensors, data
        tell_stage(name, path)
        return stage

    def _stored_tensors(self, path: Path, name: str, key: str) -> tuple[Tensors, Any] | None:
        """What an earlier run left; None where the file is missing or broken."""
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads(file.metadata()["stage"])
            return load_file(path), self._reuse(name, key, stored)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _reuse(self, name: str, key: str, stored: Any) -> Any:
        self.reused.append(_file(name, key))
        self._seconds[name, key] = stored["seconds"]
        return stored["data"]


def _changes(before: Circumstances, now: Circumstances) -> dict[str, str]:
    """What differs between the two: name -> "old, now new"."""
    names = dict.fromkeys([*now, *before])
    return {
        name: f"{before.get(name, 'unknown')}, now {now.get(name, 'unknown')}"
        for name in names
        if before.get(name) != now.get(name)
    }


def _restarted(changes: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {change}" for name, change in changes.items())
    if "ttmpd" in changes:
        return f"The interrupted run was made by another version ({reasons}): everything is done anew."
    return (
        f"The interrupted run was made under other circumstances ({reasons}): timings, plans and students are made "
        "anew; the selection, the adapted teacher and the scores are kept."
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _file(name: str, key: str) -> str:
    return f"{name}-{key}" if key else name
