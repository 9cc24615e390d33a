"""Fixtures that the tests of data share."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in three class folders, sorted by class: the value of a pixel is 20 times the image's number."""
    for i in range(12):
        path = tmp_path / "photos" / f"class{i // 4}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (i * 20,) * 3).save(path)
    return tmp_path / "photos"
