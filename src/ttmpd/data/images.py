"""Images and arrays, one sample at a time: each is a row with a value, or the reason why there is none."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ttmpd.data.files import FORMS, SUFFIXES, image_files, read_array
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.data.rows import Indexed, Named, Row, content_id, described, rows_of_array
from ttmpd.data.tables import kind_of, text_files
from ttmpd.errors import SamplesError, UnsupportedError, cause

MIN_SIDE = 8
"""Images with a shorter side than this are skipped, unless the model's own input is smaller."""


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads images, and arrays of any shape, for a model with this preprocessing."""

    preprocessing: Preprocessing | None
    forms: str = FORMS
    rows_at_once: int = 1

    def open_path(self, path: Path) -> Indexed:
        """The rows of a folder of images, of one image, or of an array file.

        Raises:
            SamplesError: it is none of them.
        """
        if path.is_dir():
            return _folder(path, _images_in(path), self.preprocessing)
        if path.is_file() and kind_of(path):
            raise SamplesError(_no_text(path.name))
        if path.suffix.lower() in SUFFIXES and path.is_file():
            return _folder(path.parent, (path.name,), self.preprocessing)
        return rows_of_array(read_array(path), self)

    def rows(self, samples: Sequence[Named]) -> list[Row]:
        """A row for each sample."""
        return [item if isinstance(item, Row) else _from_any(name, item, self.preprocessing) for name, item in samples]

    def samples_of(self, item: Any, batched: bool | None) -> Iterable[Any]:
        """The samples in one item of a stream."""
        return _samples_of(item, batched)


def _images_in(folder: Path) -> tuple[str, ...]:
    names = image_files(folder)
    if not names and text_files(folder):
        raise SamplesError(_no_text(str(folder)))
    return names


def _no_text(place: str) -> str:
    return (
        f"a model that says nothing of a tokenizer must be given images or arrays, but {place!r} holds text; open a "
        "text model as hf:ORG/NAME or hf:/directory"
    )


def _folder(folder: Path, names: Sequence[str], preprocessing: Preprocessing | None) -> Indexed:
    if preprocessing is None:
        raise SamplesError(
            "a model that is given a folder of images must say how it wants them, but it has no preprocessing; "
            "set a dict `pretrained_cfg` on the module with input_size, mean, std, interpolation and crop_pct"
        )

    def decode(name: str) -> Row:
        try:
            content = (folder / name).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                return _from_image(name, image, preprocessing, content_id(content))
        except UnsupportedError:
            raise
        except Exception as error:  # decoders raise almost anything on broken files
            return Row(name, reason=_unreadable(error))

    def load(index: Sequence[int]) -> list[Row]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(decode, [names[i] for i in index]))

    return Indexed(len(names), load)


def _from_image(name: str, image: Image.Image, preprocessing: Preprocessing | None, sample_id: str = "") -> Row:
    upright = ImageOps.exif_transpose(image)
    if reason := _too_small(upright.width, upright.height, preprocessing):
        return Row(name, reason=reason)
    if preprocessing is None:
        upright = upright if upright.mode in ("L", "RGB") else upright.convert("RGB")
        return _from_tensor(name, torch.from_numpy(np.array(upright)), None)
    sample_id = sample_id or content_id(np.asarray(upright).tobytes(), upright.size)
    return Row(name, preprocessing.pixels(upright), sample_id)


def _too_small(width: int, height: int, preprocessing: Preprocessing | None) -> str:
    least = min(MIN_SIDE, *preprocessing.input_size[1:]) if preprocessing else 1
    return f"is {width}x{height} pixels, but must have sides of {least} or more" if min(width, height) < least else ""


def _from_tensor(name: str, value: Tensor, preprocessing: Preprocessing | None) -> Row:
    """One sample from a tensor: pixels (H, W, C), (C, H, W) or (H, W), or floating values of any shape."""
    value = value.detach().cpu()
    if value.dtype != torch.uint8:
        return _from_values(name, value, preprocessing)
    value = value[..., None] if value.dim() == 2 else value
    if value.dim() == 3 and value.shape[-1] not in (1, 3, 4):
        value = value.permute(1, 2, 0)
    if value.dim() != 3 or value.shape[-1] not in (1, 3, 4):
        return Row(name, reason=f"uint8 must be an image of 1, 3 or 4 channels, but is {described(value)}")
    value = value.contiguous()  # (H, W, C): the id does not depend on the layout
    height, width, channels = value.shape
    if reason := _too_small(width, height, preprocessing):
        return Row(name, reason=reason)
    sample_id = content_id(value.numpy().tobytes(), value.shape)
    if preprocessing is None or tuple(preprocessing.input_size) == (channels, height, width):
        return Row(name, value.permute(2, 0, 1), sample_id)
    image = Image.fromarray(value.numpy()[..., 0] if channels == 1 else value.numpy())
    return Row(name, preprocessing.pixels(image), sample_id)


def _from_values(name: str, value: Tensor, preprocessing: Preprocessing | None) -> Row:
    if not value.is_floating_point():
        return Row(name, reason=f"is {described(value)}, but must be uint8 pixels or floating values")
    value = value.float() if value.dtype == torch.float64 else value
    if not bool(torch.isfinite(value).all()):
        return Row(name, reason="holds NaN or infinite values")
    if preprocessing is not None and value.dim() == 3:
        channels, height, width = preprocessing.input_size
        if tuple(value.shape) == (height, width, channels) != (channels, height, width):
            value = value.permute(2, 0, 1)
    value = value.contiguous()
    return Row(name, value, content_id(value.reshape(-1).view(torch.uint8).numpy().tobytes(), value.shape))


def _unreadable(error: Exception) -> str:
    """Why a sample is no image."""
    if isinstance(error, UnidentifiedImageError):  # its message is the address of a buffer
        return "cannot be read as an image: broken, or of no known format"
    return f"cannot be read as an image ({cause(error)})"


def _from_any(name: str, item: Any, preprocessing: Preprocessing | None) -> Row:
    value = _first(item)
    if isinstance(value, Image.Image):
        try:
            return _from_image(name, value, preprocessing)
        except (OSError, ValueError) as error:
            return Row(name, reason=_unreadable(error))
    if value is None:
        return Row(name, reason=f"holds no tensor, array or image, but {type(item).__name__}")
    return _from_tensor(name, _tensor(value), preprocessing)


def _first(item: Any) -> Any:
    """The first tensor, array or image in a nested item; labels come after it and are ignored."""
    if isinstance(item, Tensor | np.ndarray | np.generic | Image.Image):
        return item
    if isinstance(item, Mapping):
        named = [item[key] for key in ("pixel_values", "image", "images", "img", "x") if key in item]
        item = [*named, *item.values()]
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        return next((value for value in map(_first, item) if value is not None), None)
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


def _samples_of(item: Any, batched: bool | None) -> Iterable[Any]:
    """The samples in one item of a stream; unless a DataLoader says so, the shape tells a batch from a sample.

    A sample is an image (H, W), (H, W, C) or (C, H, W), or a vector; everything else is a batch.
    """
    value = _first(item)
    if isinstance(value, Image.Image):
        holders = [item, *item] if isinstance(item, list | tuple) else [item]
        return next((h for h in holders if isinstance(h, list) and isinstance(h[0], Image.Image)), [value])
    if not isinstance(value, Tensor | np.ndarray):
        return [item]
    if batched is None:
        image = value.ndim == 3 and (value.shape[0] in (1, 3, 4) or value.shape[-1] in (1, 3, 4))
        vector = value.ndim < 2 or (value.ndim == 2 and _tensor(value[:1]).dtype == torch.uint8)
        batched = not (image or vector)
    return value if batched and value.ndim else [value]
