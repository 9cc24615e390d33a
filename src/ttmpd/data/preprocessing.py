"""Preprocessing of a model's inputs: images resized, cropped and normalized, in timm's words, or text tokenized."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, UnsupportedError

INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}


CROP_MODES = ("center", "squash")


IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Preprocessing of images: resize, crop, normalize. The names are timm's.

    Args:
        input_size: (channels, height, width) of the model's input.
        mean: per-channel mean of pixels scaled to 0..1.
        std: per-channel divisor.
        interpolation: one of ``INTERPOLATIONS``.
        crop_pct: share of the resized image that is kept; the image is resized to ``size / crop_pct``, then cropped.
        crop_mode: "center" resizes the short side and keeps the proportions, "squash" resizes each side on its own.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        sizes = self.input_size
        if len(sizes) != 3 or any(size != int(size) or size < 1 for size in sizes):
            raise InvalidValueError(f"input_size must be three positive integers (C, H, W), but got {sizes!r}")
        for name, values, low in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            if len(values) != sizes[0] or not all(math.isfinite(value) and value > low for value in values):
                rule = f"hold {sizes[0]} finite values" + (" above 0" if name == "std" else "")
                raise InvalidValueError(f"{name} must {rule}, one per channel, but got {values!r}")
        if not 0 < self.crop_pct <= 1:
            raise InvalidValueError(f"crop_pct must lie above 0 and not above 1, but got {self.crop_pct!r}")
        for name, value, choices in (
            ("interpolation", self.interpolation, tuple(INTERPOLATIONS)),
            ("crop_mode", self.crop_mode, CROP_MODES),
        ):
            if value not in choices:
                raise InvalidValueError(f"{name} must be one of {', '.join(choices)}, but got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data with timm's keys, that :meth:`from_dict` turns back into an equal record."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """The record that a dict with timm's keys describes; other keys are ignored.

        Raises:
            InvalidValueError: ``input_size``, ``mean`` or ``std`` is missing, or a value breaks its rule.
        """
        missing = [key for key in ("input_size", "mean", "std") if data.get(key) is None]
        if missing:
            raise InvalidValueError(f"preprocessing must hold input_size, mean and std, but got no {missing[0]}")
        try:
            channels, height, width = (int(size) for size in data["input_size"])
            values = {key: tuple(float(value) for value in data[key]) for key in ("mean", "std")}
            crop_pct = float(data.get("crop_pct") or 1.0)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"preprocessing must hold numbers under timm's keys, but got {dict(data)!r}"
            ) from error
        interpolation = str(data.get("interpolation") or "bilinear")
        return cls(
            (channels, height, width),
            values["mean"],
            values["std"],
            "bilinear" if interpolation == "random" else interpolation,
            crop_pct,
            str(data.get("crop_mode") or "center"),
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """The image as the model's input before normalization, (C, H, W) uint8.

        An image that already has the model's size is only converted; any other is resized, then cropped in the center.

        Raises:
            UnsupportedError: the model takes a number of channels that images do not have.
            ValueError: the image holds values that do not fit 8 or 16 bits.
        """
        channels, height, width = self.input_size
        if channels not in IMAGE_MODES:
            raise UnsupportedError(
                f"a model that is given images must take 1, 3 or 4 channels, but takes {channels}; pass floating arrays"
            )
        image = _to_mode(image, IMAGE_MODES[channels])
        if image.size != (width, height):
            image = image.resize(self._resized(image.size), INTERPOLATIONS[self.interpolation])
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        array = np.array(image, dtype=np.uint8).reshape(height, width, channels)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before the crop; rounds down as timm does, but 224 / (224 / 232) is 232."""
        goal = [math.floor(side / self.crop_pct + 1e-6) for side in (self.input_size[2], self.input_size[1])]
        if self.crop_mode == "squash":
            return goal[0], goal[1]
        if goal[0] * size[1] >= goal[1] * size[0]:  # the width is the tighter side
            return goal[0], max(goal[1], goal[0] * size[1] // size[0])
        return max(goal[0], goal[1] * size[0] // size[1]), goal[1]


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("holds values outside 0..65535")
        image = Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("holds floating values, whose range is unknown")
    elif image.mode == "P":
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


Preparation = Preprocessing | Tokenization
"""Preprocessing of a model's inputs, images or text."""


def preparation_from(data: Mapping[str, Any]) -> Preparation:
    """The record whose ``to_dict`` gave the data.

    Raises:
        InvalidValueError: a value is missing or breaks a rule.
    """
    return Tokenization.from_dict(data) if "tokenizer" in data else Preprocessing.from_dict(data)
