"""A photo of random pixels, and the preprocessing of a small model."""

import numpy as np
from PIL import Image

HALF = (0.5, 0.5, 0.5)


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
