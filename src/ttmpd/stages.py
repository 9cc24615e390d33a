"""Finished stages on disk, so that a killed run goes on where it was; one run per folder at a time."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError, TTMPDError
from ttmpd.memory import release_freed_memory

Tensors = dict[str, Tensor]


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """A short hash of a model's class, its weight names and their values."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=12)
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write strict JSON under a temporary name and rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")
    temporary.replace(path)


@contextmanager
def disk_guarded(folder: Path) -> Iterator[None]:
    """Say plainly that the disk is full, or that ``folder`` cannot be written.

    Raises:
        TTMPDError: there is no room left.
        InvalidValueError: ``folder`` is a file, or may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise TTMPDError(
                f"the disk must have room for {str(folder)!r}, but it is full; free some space, then run the same "
                "command with --resume: finished stages are kept"
            ) from error
        ours = str(getattr(error, "filename", "")).startswith(str(folder))  # not the user's data
        if ours and number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InvalidValueError(
                f"output must be a folder that can be written, but {str(folder)!r} is not "
                f"({getattr(error, 'strerror', error)}); choose another"
            ) from error
        raise


def _read_json(path: Path) -> Any:
    """What the file holds; None when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this run alone; a killed run lets go of it.

    Raises:
        InvalidValueError: another run is writing there.
    """
    with disk_guarded(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise InvalidValueError(
            f"output must be a folder that no other run is writing to, but {str(folder)!r} is in use; "
            "wait for that run or choose another folder"
        ) from None


class Stages:
    """A folder of finished stages. What is there is not computed again.

    Args:
        folder: made if missing.
        run: fingerprint of everything the stages depend on; a folder of another run is emptied.
        resume: keep what an earlier run with the same fingerprint left.
    """

    def __init__(self, folder: Path, run: str, resume: bool = False) -> None:
        self.folder = folder
        self.reused: list[str] = []
        self._seconds: dict[tuple[str, str], float] = {}
        marker = folder / "run.json"
        if not (resume and _read_json(marker) == run):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, run)

    def seconds(self, key: str = "") -> dict[str, float]:
        """Seconds of the stages that serve every target and of those of one target; ``name#1`` counts as ``name``."""
        found: dict[str, float] = {}
        for (name, of), value in self._seconds.items():
            if of in ("", key):
                label = name.partition("#")[0]
                found[label] = found.get(label, 0.0) + value
        return found

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
            return self._again(name, key, stored)
        with self.timed(name, key):
            data = compute()
        write_json(path, {"data": data, "seconds": self._seconds[name, key]})
        return data

    def tensors(
        self, name: str, compute: Callable[[], tuple[Mapping[str, Tensor], Any]], key: str = ""
    ) -> tuple[Tensors, Any]:
        """The tensors and plain data of a stage, like :meth:`json`."""
        path = self.folder / f"{_file(name, key)}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads(file.metadata()["stage"])
            return load_file(path), self._again(name, key, stored)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass  # not there, or broken: compute it
        with self.timed(name, key):
            found, data = compute()
        kept = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
        temporary = path.with_name(f"{path.name}.tmp")
        facts = json.dumps({"data": data, "seconds": self._seconds[name, key]})
        save_file(kept, temporary, {"stage": facts})
        temporary.replace(path)
        return kept, data

    def _again(self, name: str, key: str, stored: Any) -> Any:
        self.reused.append(_file(name, key))
        self._seconds[name, key] = stored["seconds"]
        return stored["data"]


def _file(name: str, key: str) -> str:
    return f"{name}-{key}" if key else name
