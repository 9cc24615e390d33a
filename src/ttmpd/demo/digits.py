"""A small teacher and shifted handwritten digits: a complete case that needs no download and no GPU.

The teacher was trained on clean scans. The samples of the place of use come from another scanner: less contrast, blur,
grey paper, noise. Nothing here is needed by the library itself; it feeds the demo, the examples and the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from ttmpd.errors import MissingPackageError

WEIGHTS = Path(__file__).with_name("demo_teacher.safetensors")

N_TRAIN = 797
N_UNLABELLED = 500

_CONTRAST = 0.55
_PAPER = 0.20
_BLUR = 0.20
_NOISE = 0.07


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and c_in == c_out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, after the ReLU."""
        inner = self.relu(self.bn1(self.conv1(x)))
        return cast(Tensor, self.relu(self.bn2(self.conv2(inner)) + self.shortcut(x)))


class DigitNet(nn.Module):
    """A residual network for digits: (B, 1, 8, 8) to (B, 10) logits.

    Twelve of its thirteen blocks keep their shape, so that each can be removed.
    """

    pretrained_cfg: ClassVar[dict[str, Any]] = {
        "architecture": "digit_net",
        "num_classes": 10,
        "input_size": (1, 8, 8),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": (0.305,),
        "std": (0.376,),
        "first_conv": "conv1",
        "classifier": "fc",
    }

    def __init__(self, widths: Sequence[int] = (32, 64), depth: int = 6) -> None:
        super().__init__()
        narrow, wide = widths
        self.conv1 = nn.Conv2d(1, narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(*(ResidualBlock(narrow, narrow) for _ in range(depth)))
        self.down = ResidualBlock(narrow, wide, stride=2)
        self.stage2 = nn.Sequential(*(ResidualBlock(wide, wide) for _ in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stage2(self.down(self.stage1(x)))
        return cast(Tensor, self.fc(self.pool(x).flatten(1)))


@dataclass(frozen=True, eq=False)
class DemoData:
    """Digits as the place of use delivers them, and what is needed to judge a model there.

    Args:
        unlabelled: (N, 8, 8, 1) uint8, shifted: all that compression may see.
        x: (M, 8, 8, 1) uint8, shifted: held out, for evaluation alone.
        y: (M,) int64, the digits in ``x``.
        x_clean: (M, 8, 8, 1) uint8, ``x`` before the shift.
        corruption: what the shift is, in words.
    """

    unlabelled: NDArray[np.uint8]
    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    x_clean: NDArray[np.uint8]
    corruption: str


def demo_model() -> nn.Module:
    """The trained teacher in eval mode; its id is ``ttmpd.demo:demo_model``.

    The weights lie beside this file in half precision and are used in single precision. The random state is left alone.
    """
    with torch.device("meta"):
        model = DigitNet()
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(WEIGHTS).items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def demo_data(seed: int = 0) -> DemoData:
    """Unlabelled shifted samples and a disjoint labelled evaluation set, neither seen by the teacher in training.

    Args:
        seed: divides the digits outside the teacher's training part, and draws the noise.

    Raises:
        MissingPackageError: scikit-learn, which brings the digits, is not installed.
    """
    pixels, labels = digits()
    _, unlabelled, held_out = demo_split(seed)
    shifted = shift(pixels, seed)
    words = f"contrast x {_CONTRAST:g}, paper {_PAPER:g} grey, blur {_BLUR:g}, Gaussian noise {_NOISE:g}"
    return DemoData(shifted[unlabelled], shifted[held_out], labels[held_out], pixels[held_out], words)


def demo_split(seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of the teacher's training part, the unlabelled pool and the held-out part: disjoint, all 1,797 rows.

    The training part is the same for every seed, since the teacher's weights are fixed.
    """
    order = np.random.default_rng(0).permutation(1797)
    train, rest = order[:N_TRAIN], order[N_TRAIN:]
    rest = np.random.default_rng([1, seed]).permutation(rest)
    return train, rest[:N_UNLABELLED], rest[N_UNLABELLED:]


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Clean scans, (1797, 8, 8, 1) uint8, and the digit in each, (1797,).

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError(
            'the digits of the demo need scikit-learn, which is not installed; run: pip install "ttmpd[demo]"'
        ) from None
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return pixels[..., None], bunch.target.astype(np.int64)


def shift(pixels: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """The same digits from another scanner: blurred, on grey paper, with less contrast and with noise.

    Args:
        pixels: (N, 8, 8, 1) clean digits.
        seed: draws the noise.
    """
    ink = pixels.astype(np.float64) / 255
    for axis in (1, 2):
        ink = (1 - _BLUR) * ink + _BLUR / 2 * (_moved(ink, 1, axis) + _moved(ink, -1, axis))
    noise = np.random.default_rng([2, seed]).normal(0, _NOISE, ink.shape)
    return np.rint(np.clip(_PAPER + _CONTRAST * ink + noise, 0, 1) * 255).astype(np.uint8)


def _moved(ink: NDArray[np.float64], by: int, axis: int) -> NDArray[np.float64]:
    """``ink`` moved by one pixel, with empty paper coming in at the border."""
    moved = np.roll(ink, by, axis)
    moved[(slice(None),) * axis + (0 if by > 0 else -1,)] = 0
    return moved
