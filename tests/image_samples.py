"""Random images and a note of which files are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttmpd.data.preprocessing import Preprocessing

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.5)
RGB = Preprocessing((3, 16, 16), MEAN, STD)


def random_pixels(n: int = 6, size: int = 16, channels: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def note_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list that grows by every file whose bytes are read."""
    seen: list[Path] = []
    original = Path.read_bytes

    def read(path: Path) -> bytes:
        seen.append(path)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    return seen
