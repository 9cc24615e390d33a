"""Decode the body of a request to a batch: images, a .npy array or JSON; nothing is unpickled and no path is read."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ttmpd.data.open import open_samples
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.errors import InvalidValueError, SamplesError, UnsupportedError
from ttmpd.method import check_fields

IMAGE_FORMATS = ("PNG", "JPEG")
NPY_TYPES = ("application/x-npy", "application/octet-stream")
_DTYPES = ("uint8", "float16", "float32", "float64")
_MOST_AXES = 32  # that every version of NumPy can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a request.

    Args:
        max_bytes: of the body; no more than this is read.
        max_batch: samples of one request.
        max_pixels: of all images of a request together, known before any is decoded.
        running: requests that are worked on at once, each in a thread.
        waiting: further requests whose bodies have arrived and that may wait; what comes beyond is turned away.
        body_seconds: time that a body may take to arrive.
        arriving_bytes: of all bodies that are on their way in.
    """

    max_bytes: int = 16 << 20
    max_batch: int = 64
    max_pixels: int = 50_000_000
    running: int = 8
    waiting: int = 32
    body_seconds: float = 30.0
    arriving_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        check_fields(
            self, max_bytes=1, max_batch=1, max_pixels=1, running=1, waiting=0, body_seconds=1e-3, arriving_bytes=1
        )


def from_images(bodies: Sequence[bytes], preprocessing: Preprocessing | None, limits: Limits) -> Tensor:
    """The batch that PNG or JPEG files make, (B, C, H, W), by the model's own preprocessing.

    Raises:
        InvalidValueError: a body is no such image, too large, or there are too many.
        UnsupportedError: the model does not say how it wants images.
    """
    if preprocessing is None:
        raise UnsupportedError(
            "a model that is given images must say how it wants them, but it has no preprocessing; "
            "send prepared values as JSON or .npy, or set `pretrained_cfg` on the module"
        )
    _check_batch(len(bodies), limits)
    images = [_opened(body) for body in bodies]
    n_pixels = sum(image.width * image.height for image in images)
    if n_pixels > limits.max_pixels:
        largest = max(images, key=lambda image: image.width * image.height)
        raise InvalidValueError(
            f"the images of a request must have at most {limits.max_pixels} pixels together, but have {n_pixels}, the "
            f"largest {largest.width}x{largest.height}; shrink them, or send several requests"
        )
    # One after the other: only what the preprocessing leaves of an image is kept.
    return _prepared(torch.stack([_pixels(image, preprocessing) for image in images]), preprocessing)


def _opened(body: bytes) -> Image.Image:
    """The image with its header read, and nothing decoded."""
    try:
        return Image.open(io.BytesIO(body), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise InvalidValueError(f"an image must be {' or '.join(IMAGE_FORMATS)}, but the body is neither") from None
    except Exception as error:  # decoders raise almost anything on broken files
        raise InvalidValueError("an image must be whole, but its header is broken; send it again") from error


def _pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """(C, H, W) uint8."""
    try:
        return preprocessing.pixels(ImageOps.exif_transpose(image))
    except (InvalidValueError, UnsupportedError):
        raise
    except Exception as error:  # decoders raise almost anything on broken files
        raise InvalidValueError("an image must be whole, but cannot be decoded; send it again") from error


def from_npy(body: bytes, preprocessing: Preprocessing | None, limits: Limits) -> Tensor:
    """The batch in a .npy file: uint8 pixels, or floating values as the module takes them.

    The header is checked against the length of the body before anything is allocated.

    Raises:
        InvalidValueError: it is no such file, or breaks a limit.
    """
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # the reader of headers raises almost anything on broken ones
        raise InvalidValueError(
            "the body must be a .npy file of format 1 or 2, but its header is none; write it with numpy.save"
        ) from error
    if dtype.name not in _DTYPES:
        raise InvalidValueError(f"a .npy file must hold uint8 pixels or floating values, but holds {dtype}; convert it")
    if len(shape) > _MOST_AXES or any(type(side) is not int or side < 1 for side in shape):
        raise InvalidValueError(f"the sides of a .npy array must be positive numbers, but are {str(shape)[:100]}")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes != len(body) - file.tell():
        raise InvalidValueError(f"a .npy file of shape {shape} must hold {n_bytes} bytes, but holds another number")
    array = np.frombuffer(body, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    return _from_array(array, preprocessing, limits)


def from_json(body: bytes, preprocessing: Preprocessing | None, limits: Limits) -> Tensor:
    """The batch under ``inputs``: a nested list of numbers as the module takes them, or one sample of it.

    Raises:
        InvalidValueError: it is no such JSON, or breaks a limit.
    """
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
        inputs = data["inputs"]
        is_single = preprocessing is not None and _n_axes(inputs) == len(preprocessing.input_size)
        _check_batch(
            1 if is_single or not isinstance(inputs, list) else len(inputs), limits
        )  # before they become an array
        array = np.asarray(inputs, dtype=np.float32)
    except InvalidValueError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise InvalidValueError(
            'the body must be JSON like {"inputs": [[0.1, ...], ...]}, a list of samples of equal shape, but '
            f"{_fault_of(error)}; correct it"
        ) from error
    return _from_array(array, preprocessing, limits)


def _fault_of(error: Exception) -> str:
    """What is wrong with a body of JSON, in words of our own."""
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON at character {error.pos}"
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if isinstance(error, KeyError):
        return 'it has no "inputs"'
    if isinstance(error, RecursionError):
        return "its lists are nested too deep"
    return "it holds other things than finite numbers in lists of equal length"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _n_axes(value: Any) -> int:
    n = 0
    while isinstance(value, list):
        n, value = n + 1, value[0] if value else None
    return n


def _from_array(array: Any, preprocessing: Preprocessing | None, limits: Limits) -> Tensor:
    if preprocessing is not None and array.ndim == len(preprocessing.input_size):
        array = array[None]  # one sample
    if array.ndim < 2 or array.size == 0:
        raise InvalidValueError(f"a batch must have an axis of samples and values, but has the shape {array.shape}")
    _check_batch(len(array), limits)
    expected = None if preprocessing is None else tuple(preprocessing.input_size)
    batch = _prepared(array, preprocessing)
    if expected is not None and tuple(batch.shape[1:]) != expected:
        raise InvalidValueError(
            f"a sample must have the shape {expected}, but has {tuple(batch.shape[1:])}; prepare it"
        )
    return batch


def _check_batch(n: int, limits: Limits) -> None:
    if not 1 <= n <= limits.max_batch:
        raise InvalidValueError(f"a request must hold 1 to {limits.max_batch} samples, but holds {n}; send several")


def _prepared(data: Any, preprocessing: Preprocessing | None) -> Tensor:
    """As samples of a folder or an array are prepared; but one that cannot be used refuses the whole request."""
    try:
        samples = open_samples(data, preprocessing)
    except SamplesError as error:
        reason = f"sample {' '.join(error.skipped[0])}" if error.skipped else "there is none"
        raise InvalidValueError(f"every sample must be usable, but {reason}; correct it") from error
    if samples.skipped:
        name, reason = samples.skipped[0]
        raise InvalidValueError(f"every sample must be usable, but sample {name} {reason}; leave it out")
    return samples.batch(slice(None))
