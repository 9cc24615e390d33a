"""Textures and filters of the corruptions: fog and ice from random numbers, blur, streaks, zoom and distortion."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttmpd.errors import MissingPackageError

Floats = NDArray[np.floating[Any]]

ICE_SIDE = 640  # pixels; a sheet of ice repeats after this many
ICE_SHEETS = 5  # as many as there are photographs of frost in the benchmark's draw

_DARK = np.array([0.20, 0.29, 0.40])
_WHITE = np.array([0.92, 0.97, 1.00])


def plasma(noise: Floats, decay: float) -> Floats:
    """Clouds by the diamond-square algorithm on a torus: (N, S, S), each from 0 to 1.

    Args:
        noise: (N, S, S) uniform in -1..1, one draw per point; S is a power of two.
        decay: by its square the roughness falls from one level to the next.
    """
    field = np.zeros_like(noise)
    step, rough = noise.shape[1], 1.0
    while step >= 2:
        half = step // 2
        on, between = slice(None, None, step), slice(half, None, step)
        corners = field[:, on, on].copy()
        pairs = corners + np.roll(corners, -1, 1)
        centers = (pairs + np.roll(pairs, -1, 2)) / 4 + rough * noise[:, between, between]
        field[:, between, between] = centers
        across = centers + np.roll(centers, 1, 1) + corners + np.roll(corners, -1, 2)
        field[:, on, between] = across / 4 + rough * noise[:, on, between]
        down = centers + np.roll(centers, 1, 2) + corners + np.roll(corners, -1, 1)
        field[:, between, on] = down / 4 + rough * noise[:, between, on]
        step, rough = half, rough / decay**2
    field -= field.min((1, 2), keepdims=True)
    return np.asarray(field / field.max((1, 2), keepdims=True))


@cache
def ice(number: int) -> Floats:
    """One sheet of ice, the same for the same number: (ICE_SIDE, ICE_SIDE, 3) in 0..1, and its borders meet.

    Needles in three directions 60 degrees apart, on blotches of thicker and thinner ice, from dark blue to white.
    """
    rng = np.random.default_rng([6, number])
    turn = rng.uniform(0, np.pi / 3)
    needles = np.max([_grain(rng, 30, 2.2, turn + k * np.pi / 3) for k in range(3)], axis=0)
    blotches, crumbs = _grain(rng, 60, 60, 0.0), _grain(rng, 1, 1, 0.0)
    thickness = 0.7 * (needles - 0.85) + 0.9 * blotches + 0.15 * crumbs
    white = (1 / (1 + np.exp(-thickness)))[..., None]
    return np.asarray((_DARK + (_WHITE - _DARK) * white).astype(np.float32))


def _grain(rng: np.random.Generator, long: float, wide: float, angle: float) -> NDArray[np.float64]:
    """White noise through a Gaussian, ``long`` pixels along the angle and ``wide`` across, scaled to deviation 1."""
    v, u = np.meshgrid(np.fft.fftfreq(ICE_SIDE), np.fft.rfftfreq(ICE_SIDE), indexing="ij")
    along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    passed = np.exp(-2 * np.pi**2 * ((long * along) ** 2 + (wide * across) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((ICE_SIDE, ICE_SIDE))) * passed, (ICE_SIDE, ICE_SIDE))
    return np.asarray((field - field.mean()) / field.std())


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingPackageError(
            'blurs and elastic_transform need SciPy, which is not installed; run: pip install "ttmpd[bench]"'
        ) from None
    return ndimage


def blurred(x: Any, sigma: float, *, mode: str = "nearest", **cut: float) -> Any:
    """A Gaussian blur over height and width: the first two axes of a plane, the middle two of a batch."""
    return _ndimage().gaussian_filter(x, (0, sigma, sigma, 0) if x.ndim == 4 else sigma, mode=mode, **cut)


def filtered(x: Floats, kernel: Floats) -> Floats:
    """Each image of (N, H, W, C) under the kernel (K, K), mirrored at the border."""
    return np.asarray(_ndimage().convolve(x, kernel[None, :, :, None], mode="mirror"))


def sampled(image: Floats, at: Sequence[NDArray[np.float64]], mode: str) -> Floats:
    """The image's values at the given rows and columns, linear between the pixels."""
    map_coordinates = _ndimage().map_coordinates
    return np.stack([map_coordinates(image[..., k], at, order=1, mode=mode) for k in range(3)], axis=-1)


def streaked(x: Floats, radius: int, sigma: float, angles: Sequence[float]) -> Floats:
    """Each image of (N, H, W, C) blurred along its angle in degrees: half a Gaussian, cut at 2 radius + 1 pixels."""
    far = np.arange(2 * radius + 1)
    kernel = np.exp(-(far**2) / (2 * sigma**2))
    far, kernel = far[kernel > 1e-5], (kernel / kernel.sum())[kernel > 1e-5].astype(np.float32)
    padded = np.pad(x, ((0, 0), (pad := len(far), pad), (pad, pad), (0, 0)), mode="edge")
    out = np.zeros_like(x)
    for image, source, angle in zip(out, padded, np.deg2rad(angles), strict=True):
        rows, columns = (np.ceil(far * turn - 0.5).astype(int) + pad for turn in (np.sin(angle), np.cos(angle)))
        for weight, row, column in zip(kernel, rows, columns, strict=True):
            image += weight * source[row : row + x.shape[1], column : column + x.shape[2]]
    return out


def zoomed(x: Floats, factor: float) -> Floats:
    """The middle of each image of (N, H, W, C), enlarged to the whole; linear between the pixels."""
    for axis in (1, 2):
        side = x.shape[axis]
        part = int(np.ceil(side / factor))
        whole = round(part * factor)
        place = np.linspace(0, part - 1, whole)[(whole - side) // 2 :][:side] + (side - part) // 2
        low = np.minimum(place.astype(int), side - 2)
        above = np.expand_dims(place - low, tuple(range(1, 4 - axis))).astype(np.float32)
        x = x.take(low, axis) * (1 - above) + x.take(low + 1, axis) * above
    return x
