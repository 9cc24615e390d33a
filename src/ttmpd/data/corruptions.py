"""The 15 common corruptions of ImageNet-C and CIFAR-10-C, computed from their definitions.

Source: Hendrycks and Dietterich, ICLR 2019 (arXiv 1903.12261); the parameters are those of the authors' two scripts,
the CIFAR-10-C ones for images whose shorter side is at most 64 pixels, the ImageNet-C ones for all others.

What differs from the published images:

* frost is frost-like: sheets of ice computed from noise stand where the authors blend in photographs;
* motion blur, also that of the snow, follows ImageMagick's definition (one-sided Gaussian, whole pixels) without it;
* values are rounded, where the authors cut off the fraction; ImageNet-C was also saved as JPEG of quality 85;
* images that are not square are treated on both axes alike, and other random numbers are drawn.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttmpd.data.corruption_textures import (
    ICE_SHEETS,
    ICE_SIDE,
    Floats,
    blurred,
    filtered,
    ice,
    plasma,
    sampled,
    streaked,
    zoomed,
)
from ttmpd.errors import InvalidValueError

SMALL = 64  # pixels of the shorter side, up to which the parameters of CIFAR-10-C are used
SMALLEST = 8

_CHUNK = 1 << 19  # values treated at once, so that they stay near the processor

Pixels = NDArray[np.uint8]
Rngs = Sequence[np.random.Generator]


def corrupted(images: Pixels, name: str, severity: int = 3, seed: int = 0, *, first: int = 0) -> Pixels:
    """A corrupted copy of the images, of the same shape and type.

    The random numbers of an image depend on the name, the severity, the seed and the number of the image alone.
    Parameters are in pixels and are not scaled: at 65 to 223 pixels blurs and distortions are stronger for the
    picture than at 224, and at 33 to 64 weaker than at 32.

    Args:
        images: (N, H, W, 3) or (H, W, 3) uint8, at least 8 pixels high and wide.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: draws what is random.
        first: number of the first image, for a long set that is corrupted in parts.

    Raises:
        InvalidValueError: an argument breaks its rule.
        MissingPackageError: SciPy is not installed; the blurs and elastic_transform need it.

    Cost: up to 12 s per 10,000 images of 32 pixels, up to 0.1 s per image of 224, on one core.

    Example:
        >>> corrupted(np.full((8, 8, 3), 100, dtype=np.uint8), "brightness", severity=4)[0, 0].tolist()
        [151, 151, 151]
    """
    _check(images, name, severity, seed, first)
    stack = images[None] if images.ndim == 3 else images
    kind, severity = _KINDS[name], int(severity)
    settings = (kind.small if min(stack.shape[1:3]) <= SMALL else kind.large)[severity - 1]
    out = np.empty_like(stack)
    step = max(1, _CHUNK // int(np.prod(stack.shape[1:])))
    for start in range(0, len(stack), step):
        part = stack[start : start + step]
        numbers = range(first + start, first + start + len(part))
        rngs = [np.random.default_rng([CORRUPTIONS.index(name), severity, seed, number]) for number in numbers]
        out[start : start + step] = _pixels(kind.apply(part.astype(np.float32) / 255, settings, rngs))
    return out.reshape(images.shape)


def _check(images: Any, name: str, severity: int, seed: int, first: int) -> None:
    if name not in CORRUPTIONS:
        raise InvalidValueError(f"name must be one of {', '.join(CORRUPTIONS)}, but got {name!r}")
    if severity not in range(1, 6):
        raise InvalidValueError(f"severity must be 1, 2, 3, 4 or 5, but got {severity!r}")
    if seed < 0 or first < 0:
        raise InvalidValueError(f"seed and first must be at least 0, but got {seed!r} and {first!r}")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise InvalidValueError(f"images must be an array of uint8, but got {got}; scale to 0..255 and convert")
    if images.ndim not in (3, 4) or images.shape[-1] != 3 or min(images.shape[-3:-1]) < SMALLEST:
        rule = f"(N, H, W, 3) or (H, W, 3) with H and W at least {SMALLEST}"
        raise InvalidValueError(f"images must have the shape {rule}, but got {images.shape}")


# ------------------------------------------------------------------------------------------------------------ formulas
# Each takes (N, H, W, 3) in 0..1, its settings and one generator per image; what leaves 0..1 is clipped afterwards.


def _gaussian_noise(x: Floats, deviation: float, rngs: Rngs) -> Floats:
    return x + deviation * np.stack([rng.standard_normal(x.shape[1:], dtype=np.float32) for rng in rngs])


def _shot_noise(x: Floats, photons: float, rngs: Rngs) -> Floats:
    counts = [rng.poisson(image * photons) for image, rng in zip(x, rngs, strict=True)]
    return np.stack(counts).astype(np.float32) / photons


def _impulse_noise(x: Floats, share: float, rngs: Rngs) -> Floats:
    """Salt and pepper, half and half, in each channel by itself."""
    drawn = np.stack([rng.random(x.shape[1:], dtype=np.float32) for rng in rngs])
    return np.where(drawn < share / 2, np.float32(0), np.where(drawn < share, np.float32(1), x))


def _defocus_blur(x: Floats, settings: tuple[float, float], rngs: Rngs) -> Floats:
    """A disk whose edge is softened by a Gaussian of 3 x 3 pixels, or of 5 x 5 where the disk is large.

    As published, a disk of 8 or 10 pixels touches its frame, and the mirrored edge brightens the picture by a percent.
    """
    radius, sigma = settings
    half = max(8, int(radius))
    away = np.arange(-half, half + 1) ** 2
    disk = (away[:, None] + away <= radius**2).astype(np.float64)
    kernel = blurred(disk / disk.sum(), sigma, mode="mirror", radius=1 if radius <= 8 else 2)
    used = np.flatnonzero(kernel.max(0) > 1e-8)
    kernel = kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1]
    return filtered(x, kernel)


def _glass_blur(x: Floats, settings: tuple[float, int, int], rngs: Rngs) -> Floats:
    """Every pixel takes the value of a near one, between two Gaussian blurs.

    The published loop is written as a swap, but with NumPy's views it copies: its images, and these, hold copies.
    """
    sigma, reach, rounds = settings
    x = np.round(blurred(x, sigma) * 255) / np.float32(255)
    for _ in range(rounds):
        source = np.stack([_near_pixels(rng, x.shape[1], x.shape[2], reach) for rng in rngs])
        x = np.take_along_axis(x.reshape(len(x), -1, 3), source[..., None], axis=1).reshape(x.shape)
    return np.asarray(blurred(x, sigma))


def _near_pixels(rng: np.random.Generator, height: int, width: int, reach: int) -> NDArray[np.int64]:
    """(H * W,) index of the pixel whose initial value each pixel has after all were copied in turn, last to first."""
    sources: NDArray[np.int64] = np.arange(height * width).reshape(height, width)
    inner = (slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    dy, dx = rng.integers(-reach, reach, (2, *sources[inner].shape))
    sources[inner] += dy * width + dx
    sources = sources.ravel()
    last = np.maximum(
        sources, np.arange(sources.size)
    )  # a later pixel has its new value by then: ask where that is from
    while not np.array_equal(last, last[last]):
        last = last[last]
    return sources[last]


def _motion_blur(x: Floats, settings: tuple[int, float], rngs: Rngs) -> Floats:
    return streaked(x, *settings, [rng.uniform(-45, 45) for rng in rngs])


def _zoom_blur(x: Floats, settings: tuple[float, float], rngs: Rngs) -> Floats:
    """The mean of the picture and of its enlargements by 1, 1 + step, ... to the stop."""
    factors = np.arange(1, *settings)
    total = x.copy()
    for factor in factors:
        total += zoomed(x, factor)
    return np.asarray(total / np.float32(len(factors) + 1))


def _snow(x: Floats, settings: tuple[float, ...], rngs: Rngs) -> Floats:
    """Streaked flakes, once more upside down, on a picture that is paler."""
    mean, deviation, zoom, threshold, radius, sigma, colour_share = settings
    layer = np.stack([rng.normal(mean, deviation, x.shape[1:3]) for rng in rngs]).astype(np.float32)
    layer = zoomed(layer[..., None], zoom)
    flakes = np.where(layer < threshold, np.float32(0), layer).clip(0, 1)
    flakes = streaked(flakes, int(radius), sigma, [rng.uniform(-135, -45) for rng in rngs])
    grey = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    pale = colour_share * x + (1 - colour_share) * np.maximum(x, 1.5 * grey + 0.5)
    return np.asarray(pale + flakes + np.rot90(flakes, 2, (1, 2)))


def _frost(x: Floats, settings: tuple[float, float, int], rngs: Rngs) -> Floats:
    """A cut-out of a sheet of ice over the picture; ``shrink`` makes the ice as fine as CIFAR-10-C's."""
    share, ice_share, shrink = settings
    cuts = []
    for rng in rngs:
        sheet = ice(int(rng.integers(ICE_SHEETS)))[::shrink, ::shrink]
        top, left = rng.integers(0, ICE_SIDE // shrink, 2)
        rows, columns = top + np.arange(x.shape[1]), left + np.arange(x.shape[2])
        cuts.append(sheet.take(rows, axis=0, mode="wrap").take(columns, axis=1, mode="wrap"))
    return share * x + ice_share * np.stack(cuts)


def _fog(x: Floats, settings: tuple[float, float], rngs: Rngs) -> Floats:
    amount, decay = settings
    height, width = x.shape[1:3]
    side = 1 << (max(height, width) - 1).bit_length()
    noise = np.stack([rng.uniform(-1, 1, (side, side)) for rng in rngs]).astype(np.float32)
    most = x.max((1, 2, 3), keepdims=True)
    return np.asarray((x + amount * plasma(noise, decay)[:, :height, :width, None]) * most / (most + amount))


def _brightness(x: Floats, amount: float, rngs: Rngs) -> Floats:
    """The value of HSV rises, hue and saturation stay: all channels grow by one factor, and black becomes grey."""
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.asarray(np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter))


def _contrast(x: Floats, share: float, rngs: Rngs) -> Floats:
    """The distance to the image's mean shrinks, channel by channel."""
    levels = np.rint(x * 255).sum((1, 2), keepdims=True, dtype=np.float64)  # whole numbers: exact in every order
    mean = (levels / (255 * x.shape[1] * x.shape[2])).astype(np.float32)
    return np.asarray((x - mean) * share + mean)


def _elastic_transform(x: Floats, settings: tuple[float, float, float], rngs: Rngs) -> Floats:
    """A random affine map, then displacements: smoothed noise of deviation ``sigma`` times ``alpha``, in pixels."""
    alpha, sigma, jitter = settings
    height, width = x.shape[1:3]
    y, x_ = grid = np.mgrid[:height, :width].astype(np.float64)
    side = min(height, width) // 3
    corners = np.array([height // 2, width // 2]) + side * np.array([[1, 1], [1, -1], [-1, -1]])
    out = []
    for image, rng in zip(x, rngs, strict=True):
        moved = np.c_[corners + rng.uniform(-jitter, jitter, (3, 2)), np.ones(3)]
        back = np.linalg.solve(moved, corners)  # (3, 2): from where each point comes
        image = sampled(image, [back[0, k] * y + back[1, k] * x_ + back[2, k] for k in range(2)], "mirror")
        if alpha:
            noise = rng.uniform(-1, 1, (2, height, width))
            push = [alpha * blurred(field, sigma, mode="reflect", truncate=3) for field in noise]
            image = sampled(image, [grid[0] + push[0], grid[1] + push[1]], "reflect")
        out.append(image)
    return np.stack(out)


def _pixelate(x: Floats, share: float, rngs: Rngs) -> Floats:
    height, width = x.shape[1:3]
    coarse = (int(width * share), int(height * share))
    box = Image.Resampling.BOX
    pictures = [Image.fromarray(image).resize(coarse, box).resize((width, height), box) for image in _pixels(x)]
    return np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255


def _jpeg_compression(x: Floats, quality: int, rngs: Rngs) -> Floats:
    out = []
    for image in _pixels(x):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        with Image.open(file) as picture:
            out.append(np.asarray(picture))
    return np.stack(out).astype(np.float32) / 255


def _pixels(x: Floats) -> Pixels:
    return np.asarray(np.rint(x.clip(0, 1) * 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------- parameters


class _Kind(NamedTuple):
    """A corruption with its settings at severities 1 to 5, for small and for large images."""

    apply: Callable[[Floats, Any, Rngs], Floats]
    small: tuple[Any, ...]
    large: tuple[Any, ...]


_KINDS: dict[str, _Kind] = {
    "gaussian_noise": _Kind(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": _Kind(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": _Kind(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": _Kind(  # radius, sigma of the softened edge
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": _Kind(  # sigma, reach, rounds
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": _Kind(  # radius, sigma
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": _Kind(  # stop, step
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": _Kind(  # mean, deviation, zoom and threshold of the flakes, radius and sigma of the streaks, share kept
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": _Kind(  # share of the picture, of the ice, and by what the ice is shrunk
        _frost,
        ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    ),
    "fog": _Kind(  # amount, decay of the clouds
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": _Kind(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": _Kind(  # alpha, sigma, reach of the affine map's corners: shares of 32 and of 244 pixels
        _elastic_transform,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    "pixelate": _Kind(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": _Kind(_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}

CORRUPTIONS: tuple[str, ...] = tuple(_KINDS)
