"""The teacher's outputs: written to disk once, memory-mapped from then on."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ttmpd.models.taps import Tap
from ttmpd.storage import write_json

WIDE = 4096
"""Logits with more values than this are stored in half precision, as features are."""


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """The teacher's outputs for fixed views of the samples: all that ``fit`` is given of it.

    Args:
        tap: where the features are read, in teacher and student; None when only logits are mimicked.
        features: (n_views, n_samples, ...) teacher features, memory-mapped, half precision where safe.
        logits: (n_views, n_samples, n_classes) teacher logits.
        feature_variance: mean variance of the features over samples: the scale of the feature loss.
        held_out: (n_held_out, n_classes) logits on the held-out samples, for the guard.
        teacher: the teacher itself, only for methods that keep asking it (``one_time = False``).
    """

    tap: Tap | None
    features: Tensor | None
    logits: Tensor
    feature_variance: float
    held_out: Tensor
    teacher: nn.Module | None = None


class TeacherOutputsWriter:
    """Writes ``features.npy`` and ``logits.npy``, each (views, samples, ...), batch by batch.

    Args:
        folder: made if missing.
        n_views: fixed views per sample.
        n_samples: samples.
    """

    def __init__(self, folder: Path, n_views: int, n_samples: int) -> None:
        self.folder, self.shape = folder, (n_views, n_samples)
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays: dict[str, np.memmap] = {}

    def write(self, view: int, start: int, features: Tensor | None, logits: Tensor) -> None:
        """Store one batch; features, and logits over large vocabularies, in half precision where that is safe."""
        values = {"logits": logits.float()} | ({} if features is None else {"features": features.float()})
        for name, value in values.items():
            if name not in self.arrays:
                half = (name == "features" or value.shape[-1] > WIDE) and float(value.abs().max()) < 1e3
                self.arrays[name] = np.lib.format.open_memmap(
                    self.folder / f"{name}.npy",
                    mode="w+",
                    dtype=np.float16 if half else np.float32,
                    shape=(*self.shape, *value.shape[1:]),
                )
                _claim(self.folder / f"{name}.npy")
            stored = self.arrays[name]
            if stored.dtype == np.float16:
                value = value.clamp(-65504, 65504)
            stored[view, start : start + len(value)] = value.cpu().numpy()

    def finish(self) -> tuple[Tensor | None, Tensor]:
        """(features, logits) as memory-mapped tensors."""
        for array in self.arrays.values():
            array.flush()
        features = self.arrays.get("features")
        return None if features is None else torch.from_numpy(features), torch.from_numpy(self.arrays["logits"])


def _claim(path: Path) -> None:
    """Reserve the file's space on the disk now: writing to a mapped file on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot promise room
                    raise


def save_teacher_outputs(targets: TeacherOutputs, folder: Path) -> None:
    """Write what :func:`load_teacher_outputs` needs beside the arrays.

    ``targets.json`` is written last: without it the arrays are ignored.
    """
    np.save(folder / "held_out.npy", targets.held_out.cpu().numpy())
    facts = {
        "tap": None if targets.tap is None else [targets.tap.path, targets.tap.side, targets.tap.token],
        "feature_variance": targets.feature_variance,
        "arrays": ["logits", "held_out"] + (["features"] if targets.features is not None else []),
    }
    write_json(folder / "targets.json", facts)


def load_teacher_outputs(folder: Path) -> TeacherOutputs | None:
    """Targets that an earlier run finished in ``folder``, or None."""
    facts = folder / "targets.json"
    if not facts.exists():
        return None
    data = json.loads(facts.read_text(encoding="utf-8"))
    # Copy on write: torch wants writable memory, the files stay as they are.
    arrays = {
        name: torch.from_numpy(np.lib.format.open_memmap(folder / f"{name}.npy", mode="c")) for name in data["arrays"]
    }
    return TeacherOutputs(
        tap=None if data["tap"] is None else Tap(*data["tap"]),
        features=arrays.get("features"),
        logits=arrays["logits"],
        feature_variance=data["feature_variance"],
        held_out=arrays["held_out"],
    )
