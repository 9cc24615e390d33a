"""Files whole or not at all, fingerprints and locks."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError, TTMPDError


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """A short hash of a model's class, its weight names and their values."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=12)
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # what a module keeps as plain data beside its weights
            digest.update(f"{name}{value!r}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` for the block to write to; it takes the place of ``path`` when the block ends.

    Another process that reads ``path`` finds the old file or the new one, never a part. When the block raises, the old
    file stays and what was written is removed. A killed process leaves its temporary file, which nobody reads.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> with replacing(path) as unfinished:
        ...     _ = unfinished.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write strict JSON to a file, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")


def write_copy(source: Path, goal: Path) -> None:
    """Copy a file, whole or not at all."""
    with replacing(goal) as unfinished:
        shutil.copyfile(source, unfinished)


@contextmanager
def disk_guarded(folder: Path) -> Iterator[None]:
    """Turn errors of writing to ``folder`` into clear ones: the disk is full, or the folder cannot be written.

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
        is_below = str(getattr(error, "filename", "")).startswith(str(folder))  # else it is the user's data
        if is_below and number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise InvalidValueError(
                f"output must be a folder that can be written, but {str(folder)!r} is not "
                f"({getattr(error, 'strerror', error)}); choose another"
            ) from error
        raise


def _read_json(path: Path) -> Any:
    """The data in a JSON file; None when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this run; the lock of a killed run is released.

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
