"""Labels from class folders."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ttmpd.data.labels import class_indices, open_labels
from ttmpd.errors import SamplesError


def image_tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_folders_that_are_numbers_are_indices(tmp_path):
    folder = image_tree(tmp_path, "7/a.png", "7/deeper/b.png", "0/a.png")
    assert dict(open_labels(folder, folder).values) == {"7/a.png": 7, "7/deeper/b.png": 7, "0/a.png": 0}


def test_folders_are_ordered_by_the_classes_of_the_model(tmp_path):
    folder = image_tree(tmp_path, "cat/a.png", "dog/b.png")
    assert dict(open_labels(folder, folder, ["dog", "bird", "Cat"]).values) == {"cat/a.png": 2, "dog/b.png": 0}
    with pytest.raises(SamplesError, match="but got cat, dog; rename them"):
        open_labels(folder, folder, ["fish", "bird"])


def test_other_folders_are_sorted_and_the_order_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="ttmpd"):
        assert class_indices(["cat", "dog"]) == {"cat": 0, "dog": 1}
    assert "cat = 0, dog = 1" in caplog.text


def test_files_beside_class_folders_are_refused(tmp_path):
    folder = image_tree(tmp_path, "cat/a.png", "b.png")
    with pytest.raises(SamplesError, match=r"1 files lie beside them, e.g. b.png"):
        open_labels(folder, folder)
