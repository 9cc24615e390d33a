"""Open samples: a folder of images, arrays, datasets, iterables; what cannot be used is reported, never fatal."""

import csv
import hashlib
import io
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ttmpd.errors import InvalidValueError, SamplesError, UnsupportedError
from ttmpd.models import Preprocessing
from ttmpd.records import Samples

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
MIN_SIDE = 8
"""Images with a shorter side than this are skipped, unless the model's own input is smaller."""

_log = logging.getLogger("ttmpd")
_FORMS = "a folder of images, a .npz or .npy file, a tensor, an array, a Dataset, a DataLoader or an iterable of them"


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One sample on its way: its value, or the reason why there is none."""

    name: str
    value: Tensor | None = None
    id: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Indexed:
    """A source of known length: any rows can be loaded without the others."""

    size: int
    load: Callable[[Sequence[int]], list[_Row]]


def open_samples(
    data: Any, preprocessing: Preprocessing | None, *, n_samples: int | None = None, seed: int = 0
) -> Samples:
    """The samples at ``data``, prepared for a model.

    Args:
        data: a folder of images, a .npz or .npy file, a Samples record, a tensor, an array, a Dataset, a DataLoader, or
            an iterable of samples or of batches; labels beside the inputs are ignored. uint8 is taken for pixels
            (NHWC, NCHW or NHW) and goes through ``preprocessing``; floating values go to the model as they are.
        preprocessing: the model's own; None keeps pixel arrays in their size and scales them to 0..1.
        n_samples: how many to choose at random, without replacement, in random order; None takes all in their order.
        seed: makes the choice repeatable.

    Raises:
        SamplesError: nothing usable is there; the message lists what was skipped.
        InvalidValueError: ``n_samples`` is not positive.

    Cost: only the chosen images of a folder are decoded; a stream without a length is read to its end.
    """
    if n_samples is not None and n_samples < 1:
        raise InvalidValueError(f"n_samples must be at least 1, but got {n_samples!r}")
    if isinstance(data, Samples):
        order = random.Random(seed).sample(range(len(data)), min(n_samples or 0, len(data)))
        return data if n_samples is None else data.subset(order)
    source = _source(data, preprocessing, seed)
    if n_samples is None:
        rows = source.load(range(source.size)) if isinstance(source, _Indexed) else list(source)
    else:
        rows = _choose(source, n_samples, seed) if isinstance(source, _Indexed) else _reservoir(source, n_samples, seed)
    samples = _pack(rows, preprocessing, data)
    if n_samples is not None and len(samples) < n_samples:
        _log.warning("only %d of the %d samples that were asked for are there", len(samples), n_samples)
    return samples


def stream_samples(data: Any, preprocessing: Preprocessing | None, *, chunk: int = 512) -> Iterator[Samples]:
    """All samples at ``data`` in the order of their paths or rows, as records of at most ``chunk`` samples.

    For evaluation on much data: never more than one chunk is decoded at once. Args and Raises as :func:`open_samples`;
    what was skipped is in the record of its chunk.
    """
    if chunk < 1:
        raise InvalidValueError(f"chunk must be at least 1, but got {chunk!r}")
    if isinstance(data, Samples):
        yield from (data.subset(range(start, min(start + chunk, len(data)))) for start in range(0, len(data), chunk))
        return
    source = _source(data, preprocessing, 0)
    pending: list[_Row] = []
    first: Tensor | None = None
    for rows in _chunks(source, chunk):
        pending += rows
        if any(row.value is not None for row in pending):
            samples = _pack(pending, preprocessing, data, first)
            first, pending = samples.inputs[0], []
            yield samples
    if first is None:
        _pack(pending, preprocessing, data)
    elif pending:
        _log.warning("skipped %d samples at the end, the first is %s: %s", *_first_skipped(pending))


def _first_skipped(rows: Sequence[_Row]) -> tuple[int, str, str]:
    return len(rows), rows[0].name, rows[0].reason


def _chunks(source: _Indexed | Iterator[_Row], chunk: int) -> Iterator[list[_Row]]:
    if isinstance(source, _Indexed):
        for start in range(0, source.size, chunk):
            yield source.load(range(start, min(start + chunk, source.size)))
        return
    rows: list[_Row] = []
    for row in source:
        rows.append(row)
        if len(rows) == chunk:
            yield rows
            rows = []
    if rows:
        yield rows


def _choose(source: _Indexed, n_samples: int, seed: int) -> list[_Row]:
    """``n_samples`` usable rows in a random order; skipped ones are replaced by further ones."""
    order = random.Random(seed).sample(range(source.size), source.size)
    rows: list[_Row] = []
    start = missing = 0
    while start < len(order) and (missing := n_samples - sum(row.value is not None for row in rows)) > 0:
        rows += source.load(order[start : start + missing])
        start += missing
    return rows


def _reservoir(rows: Iterable[_Row], n_samples: int, seed: int) -> list[_Row]:
    """Algorithm R (Waterman): every usable row of the stream has the same chance; then shuffled."""
    rng = random.Random(seed)
    kept: list[_Row] = []
    skipped: list[_Row] = []
    n_seen = 0
    for row in rows:
        if row.value is None:
            skipped.append(row)
            continue
        n_seen += 1
        if len(kept) < n_samples:
            kept.append(row)
        elif (place := rng.randrange(n_seen)) < n_samples:
            kept[place] = row
    rng.shuffle(kept)
    return kept + skipped


def _pack(rows: Sequence[_Row], preprocessing: Preprocessing | None, data: Any, like: Tensor | None = None) -> Samples:
    """One record of all usable rows that are shaped like the first."""
    usable: list[tuple[_Row, Tensor]] = []
    skipped: list[tuple[str, str]] = []
    for row in rows:
        value = row.value
        like = value if like is None else like
        if value is None or like is None:
            skipped.append((row.name, row.reason))
        elif (value.shape, value.dtype) != (like.shape, like.dtype):
            skipped.append((row.name, f"is {_kind(value)}, but others are {_kind(like)}"))
        else:
            usable.append((row, value))
    if not usable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        found = f"skipped all {len(skipped)}: {listed}" if skipped else "it is empty"
        raise SamplesError(f"data must hold usable samples, but got none at {_place(data)} ({found}); pass {_FORMS}")
    inputs = torch.stack([value for _, value in usable])
    names, ids = tuple(row.name for row, _ in usable), tuple(row.id for row, _ in usable)
    samples = Samples(inputs, ids, skipped=tuple(skipped), names=names)
    if inputs.dtype != torch.uint8:
        return samples
    if preprocessing is None:
        return replace(samples, mean=(0.0,) * inputs.shape[1], std=(1.0,) * inputs.shape[1])
    return replace(samples, mean=preprocessing.mean, std=preprocessing.std)


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _place(data: Any) -> str:
    return repr(str(data)) if isinstance(data, str | Path) else f"the given {type(data).__name__}"


def _source(data: Any, preprocessing: Preprocessing | None, seed: int) -> _Indexed | Iterator[_Row]:
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if path.is_dir():
            return _folder(path, image_files(path), preprocessing)
        if path.suffix.lower() in SUFFIXES and path.is_file():
            return _folder(path.parent, (path.name,), preprocessing)
        return _array(_read_array(path), preprocessing)
    if isinstance(data, tuple) and len(data) == 2 and _is_labelled(*data):
        data = data[0]
    if isinstance(data, Tensor | np.ndarray):
        return _array(data, preprocessing)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and isinstance(data, Sized):
        return _dataset(data, preprocessing, seed)
    if isinstance(data, Iterable) and not isinstance(data, Mapping | bytes):
        return _stream(data, preprocessing, seed)
    raise SamplesError(f"data must be {_FORMS}, but got {type(data).__name__}")


def _is_labelled(first: Any, second: Any) -> bool:
    """Whether a pair is (inputs, labels) rather than two samples."""
    arrays = all(isinstance(value, Tensor | np.ndarray) for value in (first, second))
    return arrays and first.ndim > 1 and second.ndim <= 1 and len(first) == len(second)


def image_files(folder: Path) -> tuple[str, ...]:
    """Paths of all images below ``folder``, relative to it, sorted; what is hidden is left out, links are followed."""
    found: list[str] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in seen else [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
        found += [] if here in seen else [(Path(root) / name).relative_to(folder).as_posix() for name in names]
        seen.add(here)
    return tuple(sorted(found))


def _folder(folder: Path, names: Sequence[str], preprocessing: Preprocessing | None) -> _Indexed:
    if preprocessing is None:
        raise SamplesError(
            "a model that is given a folder of images must say how it wants them, but it has no preprocessing; "
            "set a dict `pretrained_cfg` on the module with input_size, mean, std, interpolation and crop_pct"
        )

    def decode(name: str) -> _Row:
        try:
            content = (folder / name).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                return _from_image(name, image, preprocessing, _hash(content))
        except UnsupportedError:
            raise
        except Exception as error:  # decoders raise almost anything on broken files
            return _Row(name, reason=f"cannot be read as an image ({type(error).__name__}: {error})"[:200])

    def load(index: Sequence[int]) -> list[_Row]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(decode, [names[i] for i in index]))

    return _Indexed(len(names), load)


def _from_image(name: str, image: Image.Image, preprocessing: Preprocessing | None, content_id: str = "") -> _Row:
    upright = ImageOps.exif_transpose(image)
    if reason := _too_small(upright.width, upright.height, preprocessing):
        return _Row(name, reason=reason)
    if preprocessing is None:
        upright = upright if upright.mode in ("L", "RGB") else upright.convert("RGB")
        return _from_tensor(name, torch.from_numpy(np.array(upright)), None)
    content_id = content_id or _hash(np.asarray(upright).tobytes(), upright.size)
    return _Row(name, preprocessing.pixels(upright), content_id)


def _too_small(width: int, height: int, preprocessing: Preprocessing | None) -> str:
    least = min(MIN_SIDE, *preprocessing.input_size[1:]) if preprocessing else 1
    return f"is {width}x{height} pixels, but must have sides of {least} or more" if min(width, height) < least else ""


def _hash(content: bytes, shape: Sequence[int] = ()) -> str:
    digest = hashlib.blake2b(content, digest_size=8)
    if shape:
        digest.update(repr(tuple(shape)).encode())
    return digest.hexdigest()


def _from_tensor(name: str, value: Tensor, preprocessing: Preprocessing | None) -> _Row:
    """One sample from a tensor: pixels (H, W, C), (C, H, W) or (H, W), or floating values of any shape."""
    value = value.detach().cpu()
    if value.dtype != torch.uint8:
        return _from_values(name, value, preprocessing)
    value = value[..., None] if value.dim() == 2 else value
    if value.dim() == 3 and value.shape[-1] not in (1, 3, 4):
        value = value.permute(1, 2, 0)
    if value.dim() != 3 or value.shape[-1] not in (1, 3, 4):
        return _Row(name, reason=f"uint8 must be an image of 1, 3 or 4 channels, but is {_kind(value)}")
    value = value.contiguous()  # (H, W, C): the id does not depend on the layout
    height, width, channels = value.shape
    if reason := _too_small(width, height, preprocessing):
        return _Row(name, reason=reason)
    content_id = _hash(value.numpy().tobytes(), value.shape)
    if preprocessing is None or tuple(preprocessing.input_size) == (channels, height, width):
        return _Row(name, value.permute(2, 0, 1), content_id)
    image = Image.fromarray(value.numpy()[..., 0] if channels == 1 else value.numpy())
    return _Row(name, preprocessing.pixels(image), content_id)


def _from_values(name: str, value: Tensor, preprocessing: Preprocessing | None) -> _Row:
    if not value.is_floating_point():
        return _Row(name, reason=f"is {_kind(value)}, but must be uint8 pixels or floating values")
    value = value.float() if value.dtype == torch.float64 else value
    if not bool(torch.isfinite(value).all()):
        return _Row(name, reason="holds NaN or infinite values")
    if preprocessing is not None and value.dim() == 3:
        channels, height, width = preprocessing.input_size
        if tuple(value.shape) == (height, width, channels) != (channels, height, width):
            value = value.permute(2, 0, 1)
    value = value.contiguous()
    return _Row(name, value, _hash(value.reshape(-1).view(torch.uint8).numpy().tobytes(), value.shape))


def _array(data: Any, preprocessing: Preprocessing | None) -> _Indexed:
    """The rows of a tensor or array; a memory-mapped one is read row by row."""
    if data.ndim < 1:
        raise SamplesError("an array of samples must have a first axis of samples, but got a single number")
    return _Indexed(len(data), lambda index: [_from_any(str(i), data[i], preprocessing) for i in index])


def _from_any(name: str, item: Any, preprocessing: Preprocessing | None) -> _Row:
    found = _first(item)
    if isinstance(found, Image.Image):
        try:
            return _from_image(name, found, preprocessing)
        except (OSError, ValueError) as error:
            return _Row(name, reason=f"cannot be read as an image ({type(error).__name__}: {error})"[:200])
    if found is None:
        return _Row(name, reason=f"holds no tensor, array or image, but {type(item).__name__}")
    return _from_tensor(name, _tensor(found), preprocessing)


def _first(item: Any) -> Any:
    """The first tensor, array or image in a nested item; labels come after it and are ignored."""
    if isinstance(item, Tensor | np.ndarray | np.generic | Image.Image):
        return item
    if isinstance(item, Mapping):
        named = [item[key] for key in ("pixel_values", "image", "images", "img", "x") if key in item]
        item = [*named, *item.values()]
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        return next((found for found in map(_first, item) if found is not None), None)
    return None


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = np.array(value)  # a copy: the source may be read-only or have negative strides
    if array.dtype.kind not in "fiub":
        raise SamplesError(f"an array of samples must hold numbers, but got {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _dataset(data: Any, preprocessing: Preprocessing | None, seed: int) -> _Indexed:
    def load_one(i: int) -> _Row:
        outer = torch.get_rng_state()
        torch.default_generator.manual_seed(seed + i)  # random transforms repeat; the caller's state is as found
        try:
            item = data[i]
        except (OSError, ValueError, SyntaxError) as error:
            return _Row(str(i), reason=f"cannot be read ({type(error).__name__}: {error})"[:200])
        finally:
            torch.set_rng_state(outer)
        return _from_any(str(i), item, preprocessing)

    return _Indexed(len(data), lambda index: [load_one(i) for i in index])


def _stream(data: Iterable[Any], preprocessing: Preprocessing | None, seed: int) -> Iterator[_Row]:
    batched = data.batch_sampler is not None or data.batch_size is not None if isinstance(data, DataLoader) else None
    values: Iterator[Any] = chain.from_iterable(_samples_of(item, batched) for item in _isolated(data, seed))
    for i, value in enumerate(values):
        yield _from_any(str(i), value, preprocessing)


def _isolated(data: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate with torch's random state set by ``seed``; the caller's state is as found between the items."""
    inner = torch.Generator().manual_seed(seed).get_state()
    iterator: Iterator[Any] | None = None
    while True:
        outer = torch.get_rng_state()
        torch.set_rng_state(inner)
        try:
            iterator = iter(data) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inner = torch.get_rng_state()
            torch.set_rng_state(outer)
        yield item


def _samples_of(item: Any, batched: bool | None) -> Iterable[Any]:
    """The samples in one item of a stream; without a DataLoader's word for it, the shape tells a batch from a sample.

    A sample is an image (H, W), (H, W, C) or (C, H, W), or a vector; everything else is a batch.
    """
    found = _first(item)
    if isinstance(found, Image.Image):
        holders = [item, *item] if isinstance(item, list | tuple) else [item]
        return next((h for h in holders if isinstance(h, list) and isinstance(h[0], Image.Image)), [found])
    if not isinstance(found, Tensor | np.ndarray):
        return [item]
    if batched is None:
        image = found.ndim == 3 and (found.shape[0] in (1, 3, 4) or found.shape[-1] in (1, 3, 4))
        vector = found.ndim < 2 or (found.ndim == 2 and _tensor(found[:1]).dtype == torch.uint8)
        batched = not (image or vector)
    return found if batched and found.ndim else [found]


def _read_array(path: Path) -> Any:
    """The array of a .npy file (memory-mapped), or the inputs of a .npz file; nothing is unpickled."""
    if path.suffix.lower() not in (".npz", ".npy") or not path.is_file():
        found = f"got {str(path)!r}" if path.is_file() else f"{str(path)!r} does not exist"
        raise SamplesError(f"data must be {_FORMS}, but {found}; check the path")
    if path.suffix.lower() == ".npz":
        return _npz_member(path, ("x", "images", "data"), ("y", "labels"))
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        raise SamplesError(f"{path.name} must be a .npy file of numbers, but got {error}; save it again") from error


def _npz_member(path: Path, keys: Sequence[str], others: Sequence[str]) -> Any:
    """The first of ``keys`` that the file has, or its only array that is not one of ``others``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            left = [key for key in file.files if key not in others]
            key = next((key for key in keys if key in file.files), left[0] if len(left) == 1 else None)
            if key is None:
                raise SamplesError(f"{path.name} must hold an array {keys[0]!r}, but holds {file.files}; rename one")
            return file[key]
    except SamplesError:
        raise
    except Exception as error:  # zipfile, zlib and lzma each have their own errors
        raise SamplesError(f"{path.name} must be a .npz file of numbers, but got {error}; save it again") from error


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


def open_labels(labels: str | Path | None, data: Any) -> Labels:
    """The labels of ``data``, to be asked by sample.

    Args:
        labels: a .npz with ``y``, one label per row of ``data``; or a .csv with the columns ``file`` and ``label``,
            where a file is a path relative to the folder, a base name that is unique, or a row; None takes ``y`` from
            ``data``.
        data: what the samples are opened from.

    Raises:
        SamplesError: the file has another form, a label is no class index, or the counts differ.
    """
    place = Path(data).expanduser() if isinstance(data, str | Path) else None
    if labels is None:
        if place is None or place.suffix.lower() != ".npz":
            raise SamplesError(f"labels must be given, but got none for {_place(data)}; pass a .csv or .npz file")
        labels = place
    path = Path(labels).expanduser()
    if not path.is_file() or path.suffix.lower() not in (".npz", ".csv"):
        found = "another kind of file" if path.exists() else "no such file"
        raise SamplesError(f"labels must be a .csv or .npz file, but got {found}: {str(path)!r}; check the path")
    if path.suffix.lower() == ".csv":
        return Labels(_csv_labels(path, place), path.name)
    if place is not None and place.is_dir():
        raise SamplesError(f"labels of a folder must be a .csv file, but got {path.name}; rows say nothing about files")
    return Labels(_npz_labels(path, data if place is None else place), path.name)


def _npz_labels(path: Path, data: Any) -> dict[str, int]:
    values = np.asarray(_npz_member(path, ("y", "labels"), ("x", "images", "data")))
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
        return len(_read_array(data))
    if isinstance(data, Samples):
        return None  # possibly a choice from more rows
    if isinstance(data, tuple) and len(data) == 2 and _is_labelled(*data):
        return len(data[0])
    data = data.dataset if isinstance(data, DataLoader) else data
    return len(data) if isinstance(data, Sized) else None


def _csv_labels(path: Path, place: Path | None) -> dict[str, int]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"file", "label"} <= set(columns):
                raise SamplesError(f"{path.name} must have the columns 'file' and 'label', but has {list(columns)}")
            given = _csv_rows(path.name, reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SamplesError(f"{path.name} must be a .csv file in UTF-8, but got {error}; save it again") from error
    if place is None or not place.is_dir():
        return given
    files = image_files(place)
    base = Counter(PurePosixPath(name).name for name in files)
    given_base = Counter(PurePosixPath(name).name for name in given)
    by_base = {PurePosixPath(name).name: label for name, label in given.items()}
    found = {}
    for name in files:
        end = PurePosixPath(name).name
        if name in given:
            found[name] = given[name]
        elif base[end] == 1 and given_base[end] == 1:
            found[name] = by_base[end]
    if not found:
        raise SamplesError(f"{path.name} must name files below {str(place)!r}, but names none; check the column 'file'")
    return found


def _csv_rows(source: str, rows: Iterable[Mapping[str, str | None]]) -> dict[str, int]:
    given: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        name, text = (row["file"] or "").strip().replace("\\", "/"), (row["label"] or "").strip()
        name = name.removeprefix("./")
        if not name or not (text.isascii() and text.isdecimal()):
            raise SamplesError(
                f"{source} must hold a file and a class index (0, 1, ...) in every row, but line {number} has file "
                f"{name!r} and label {text!r}; write class names as numbers in the order of the model's outputs"
            )
        if given.setdefault(name, int(text)) != int(text):
            raise SamplesError(f"{source} must give one label to a file, but gives {name!r} two (line {number})")
    return given
