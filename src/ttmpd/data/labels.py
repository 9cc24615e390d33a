"""Class indices for evaluation; compression never sees them."""

import csv
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ttmpd.data.files import image_files, is_labelled, npz_member, place_of, read_array
from ttmpd.data.samples import Samples
from ttmpd.data.tables import kind_of, read_table, text_files
from ttmpd.errors import SamplesError

_log = logging.getLogger("ttmpd")


@dataclass(frozen=True, slots=True)
class Labels:
    """Class indices for evaluation, by the name of a sample: a path relative to its folder, or a row.

    Args:
        values: name -> class index.
        source: where they came from, for messages.
    """

    values: Mapping[str, int]
    source: str

    def of(self, samples: Samples) -> Tensor:
        """The label of every sample, (N,) int64.

        Raises:
            SamplesError: a sample has no label.
        """
        if len(samples.names) != len(samples):
            raise SamplesError("samples must have names to find their labels, but got none; open them from their file")
        missing = [name for name in samples.names if name not in self.values]
        if missing:
            raise SamplesError(
                f"{self.source} must hold a label for every sample, but has none for {len(missing)} of {len(samples)} "
                f"({', '.join(missing[:5])}); add them or take these samples away"
            )
        return torch.tensor([self.values[name] for name in samples.names], dtype=torch.int64)


def open_labels(labels: str | Path | None, data: Any, class_names: Sequence[str] = ()) -> Labels:
    """The labels of ``data``, looked up by sample.

    Args:
        labels: a .npz with ``y``, one label per row of ``data``; or a .csv with the columns ``file`` and ``label``,
            where a file is a path relative to the folder, a base name that is unique, or a row; or, for text, a .tsv,
            .csv or .jsonl with a column ``label`` and as many rows as ``data``, such as ``data`` itself; or the folder
            ``data`` with a sub-folder for each class; None takes them from ``data``.
        data: what the samples are opened from.
        class_names: of the model's outputs, in their order; for folders that are named after classes.

    Raises:
        SamplesError: the file has another form, a label is no class index, or the counts differ.
    """
    place = Path(data).expanduser() if isinstance(data, str | Path) else None
    if labels is None:
        if place is None or not (place.suffix.lower() == ".npz" or _is_table(place)):
            raise SamplesError(
                f"labels must be given, but got none for {place_of(data)}; pass a .csv or .npz file, or the "
                "folder itself where it has a sub-folder per class"
            )
        labels = place
    path = Path(labels).expanduser()
    if place is not None and path.is_dir() and path.resolve() == place.resolve():
        return Labels(_folder_labels(place, class_names), str(path))
    if not path.is_file() or not (path.suffix.lower() == ".npz" or _is_table(path)):
        problem = "another kind of file" if path.exists() else "no such file"
        raise SamplesError(
            f"labels must be a .csv, .tsv, .jsonl or .npz file, or the data folder with a sub-folder per class, "
            f"but got {problem}: {str(path)!r}; check the path"
        )
    if place is not None and _is_table(path) and kind_of(place):
        rows = _table_labels(path, place)
        if rows is not None:
            return Labels(rows, path.name)
    if path.suffix.lower() == ".csv":
        return Labels(_csv_labels(path, place), path.name)
    if path.suffix.lower() != ".npz":
        raise SamplesError(f"labels in {path.name} must belong to a file of text, but data are {place_of(data)}")
    if place is not None and place.is_dir():
        raise SamplesError(f"labels of a folder must be a .csv file, but got {path.name}; rows say nothing about files")
    return Labels(_npz_labels(path, data if place is None else place), path.name)


def _folder_labels(folder: Path, class_names: Sequence[str]) -> dict[str, int]:
    """The labels of files in class folders: those of the first folder below ``folder`` that a file lies in."""
    files = image_files(folder) or text_files(folder)
    loose = [name for name in files if "/" not in name]
    if loose or not files:
        problem = f"{len(loose)} files lie beside them, e.g. {loose[0]}" if loose else "there are no files"
        raise SamplesError(
            f"{str(folder)!r} must hold one sub-folder for each class, but {problem}; pass a .csv "
            "with the columns 'file' and 'label' instead"
        )
    folders = {name: name.partition("/")[0] for name in files}
    indices = class_indices(sorted(set(folders.values())), class_names)
    return {name: indices[folder_name] for name, folder_name in folders.items()}


def class_indices(folders: Sequence[str], class_names: Sequence[str] = ()) -> dict[str, int]:
    """The class index of each class folder.

    Folders that are all named by numbers are those indices. Other names are looked up in the model's class names.
    Without class names they are numbered in alphabetical order, as torchvision's ImageFolder does; the log says so.

    Raises:
        SamplesError: the model has class names, and a folder's is not among them.

    Example:
        >>> class_indices(["0", "7"]), class_indices(["cat", "dog"], ["dog", "cat"])
        ({'0': 0, '7': 7}, {'cat': 1, 'dog': 0})
    """
    if all(name.isascii() and name.isdecimal() for name in folders):
        return {name: int(name) for name in folders}
    places = {name.casefold().strip(): index for index, name in enumerate(class_names)}
    if not places:
        indices = {name: index for index, name in enumerate(folders)}
        listed = ", ".join(f"{name} = {index}" for name, index in list(indices.items())[:20])
        _log.warning("class folders in alphabetical order are taken for the model's classes: %s", listed)
        return indices
    unknown = [name for name in folders if name.casefold() not in places]
    if unknown:
        raise SamplesError(
            f"class folders must be named by numbers or by the model's classes ({', '.join(class_names[:5])} ...), but "
            f"got {', '.join(unknown[:5])}; rename them"
        )
    return {name: places[name.casefold()] for name in folders}


def _is_table(path: Path) -> bool:
    return kind_of(path) not in ("", ".txt")


def _table_labels(path: Path, place: Path) -> dict[str, int] | None:
    """The labels of rows of text; None where the table is one of files and labels."""
    table = read_table(path)
    if "label" not in table.columns:
        raise SamplesError(f"{path.name} must have a column 'label', but has {', '.join(table.columns)}; rename one")
    if "file" in table.columns:
        return None
    n_rows = len(table.rows) if path == place else len(read_table(place).rows)
    if n_rows != len(table.rows):
        raise SamplesError(
            f"{path.name} must have as many rows as the data, but got {len(table.rows)} labels for {n_rows} rows"
        )
    labels = {}
    for number, row in enumerate(table.rows):
        text = "" if isinstance(row, str) else str(row.get("label", "")).strip()
        if text.isascii() and text.isdecimal():
            labels[str(number)] = int(text)
        elif text:
            raise SamplesError(
                f"{path.name} must hold a class index (0, 1, ...) in every row, but row {number + 1} has the label "
                f"{text!r:.100}; write class names as numbers in the order of the model's outputs"
            )
    return labels


def _npz_labels(path: Path, data: Any) -> dict[str, int]:
    values = np.asarray(npz_member(path, ("y", "labels"), ("x", "images", "data")))
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1 or values.dtype.kind not in "iu" or (values < 0).any():
        raise SamplesError(
            f"y of {path.name} must hold one class index (0, 1, ...) per row, but got {values.dtype} {values.shape}"
        )
    n_rows = _count_rows(data)
    if n_rows is not None and n_rows != len(values):
        raise SamplesError(
            f"y of {path.name} must have as many rows as the data, but got {len(values)} labels for {n_rows} rows"
        )
    return {str(i): int(value) for i, value in enumerate(values)}


def _count_rows(data: Any) -> int | None:
    if isinstance(data, Path):
        return len(read_array(data))
    if isinstance(data, Samples):
        return None  # possibly a choice from more rows
    if isinstance(data, tuple) and len(data) == 2 and is_labelled(*data):
        return len(data[0])
    data = data.dataset if isinstance(data, DataLoader) else data
    return len(data) if isinstance(data, Sized) else None


def _csv_labels(path: Path, place: Path | None) -> dict[str, int]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"file", "label"} <= set(columns):
                names = ", ".join(columns) or "none"
                raise SamplesError(
                    f"{path.name} must have the columns 'file' and 'label', but has {names}; rename them"
                )
            by_name = _csv_rows(path.name, reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SamplesError(f"{path.name} must be a .csv file in UTF-8, but got {error}; save it again") from error
    if place is None or not place.is_dir():
        return by_name
    files = image_files(place) or text_files(place)
    base = Counter(PurePosixPath(name).name for name in files)
    labelled_base = Counter(PurePosixPath(name).name for name in by_name)
    by_base = {PurePosixPath(name).name: label for name, label in by_name.items()}
    labels = {}
    for name in files:
        end = PurePosixPath(name).name
        if name in by_name:
            labels[name] = by_name[name]
        elif base[end] == 1 and labelled_base[end] == 1:
            labels[name] = by_base[end]
    if not labels:
        raise SamplesError(f"{path.name} must name files below {str(place)!r}, but names none; check the column 'file'")
    return labels


def _csv_rows(source: str, rows: Iterable[Mapping[str, str | None]]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        name, text = (row["file"] or "").strip().replace("\\", "/"), (row["label"] or "").strip()
        name = name.removeprefix("./")
        if not name or not (text.isascii() and text.isdecimal()):
            raise SamplesError(
                f"{source} must hold a file and a class index (0, 1, ...) in every row, but line {number} has file "
                f"{name!r} and label {text!r}; write class names as numbers in the order of the model's outputs"
            )
        if labels.setdefault(name, int(text)) != int(text):
            raise SamplesError(f"{source} must give one label to a file, but gives {name!r} two (line {number})")
    return labels
