"""Image folders and array files as they lie on disk; nothing is unpickled."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ttmpd.errors import SamplesError

SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".tga",
        ".avif",
        ".heic",
    }
)
FORMS = "a folder of images, a .npz or .npy file, a tensor, an array, a Dataset, a DataLoader or an iterable of them"


def place_of(data: Any) -> str:
    """The location of data, for messages."""
    return repr(str(data)) if isinstance(data, str | Path) else f"the given {type(data).__name__}"


def is_labelled(first: Any, second: Any) -> bool:
    """True where a pair is (inputs, labels) rather than two samples."""
    arrays = all(isinstance(value, Tensor | np.ndarray) for value in (first, second))
    return arrays and first.ndim > 1 and second.ndim <= 1 and len(first) == len(second)


def image_files(folder: Path) -> tuple[str, ...]:
    """Paths of all images below ``folder``: see :func:`files_below`."""
    return files_below(folder, lambda name: Path(name).suffix.lower() in SUFFIXES)


def files_below(folder: Path, accepts: Callable[[str], bool]) -> tuple[str, ...]:
    """Paths of the files of an accepted name, relative to the folder, sorted; hidden ones are left out."""
    paths: list[str] = []
    visited: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in visited else [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".") and accepts(name)]
        paths += [] if here in visited else [(Path(root) / name).relative_to(folder).as_posix() for name in names]
        visited.add(here)
    return tuple(sorted(paths))


def read_array(path: Path) -> Any:
    """The array of a .npy file (memory-mapped), or the inputs of a .npz file; nothing is unpickled."""
    if path.suffix.lower() not in (".npz", ".npy") or not path.is_file():
        problem = f"got {str(path)!r}" if path.is_file() else f"{str(path)!r} does not exist"
        raise SamplesError(f"data must be {FORMS}, but {problem}; check the path")
    if path.suffix.lower() == ".npz":
        return npz_member(path, ("x", "images", "data"), ("y", "labels"))
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        raise SamplesError(f"{path.name} must be a .npy file of numbers, but got {error}; save it again") from error


def npz_member(path: Path, keys: Sequence[str], ignored: Sequence[str]) -> Any:
    """The first of ``keys`` that the file has, or its only array that is not one of ``ignored``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            left = [key for key in file.files if key not in ignored]
            key = next((key for key in keys if key in file.files), left[0] if len(left) == 1 else None)
            if key is None:
                raise SamplesError(f"{path.name} must hold an array {keys[0]!r}, but holds {file.files}; rename one")
            return file[key]
    except SamplesError:
        raise
    except Exception as error:  # zipfile, zlib and lzma each have their own errors
        raise SamplesError(f"{path.name} must be a .npz file of numbers, but got {error}; save it again") from error
