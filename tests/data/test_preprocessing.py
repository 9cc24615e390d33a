"""Images become pixels of the model's size, as timm makes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from photos import HALF, photo
from ttmpd.data.preprocessing import INTERPOLATIONS, Preprocessing
from ttmpd.errors import InvalidValueError, UnsupportedError

# --- preprocessing


def test_preprocessing_survives_a_round_trip() -> None:
    given = Preprocessing((3, 24, 32), HALF, (0.2, 0.3, 0.4), "bicubic", 0.9, "squash")
    assert Preprocessing.from_dict(given.to_dict()) == given
    assert given.to_dict()["input_size"] == [3, 24, 32]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": (3, 32)}, "numbers"),
        ({"input_size": (3, 0, 32)}, "input_size"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"std": (0.5, float("nan"), 0.5)}, "std"),
        ({"std": None}, "no std"),
        ({"mean": ("a", "b", "c")}, "numbers"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"crop_mode": "fancy"}, "squash"),
    ],
)
def test_preprocessing_checks_itself(change: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidValueError, match=word):
        Preprocessing.from_dict({"input_size": (3, 32, 32), "mean": HALF, "std": HALF} | change)


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (300, 40), (33, 33), (9, 12)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.95])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_timm(size: tuple[int, int], crop_pct: float, interpolation: str) -> None:
    timm_data = pytest.importorskip("timm.data")
    for mode in ("center", "squash"):
        ours = Preprocessing((3, 28, 28), HALF, HALF, interpolation, crop_pct, mode)
        theirs = timm_data.create_transform(
            (3, 28, 28), interpolation=interpolation, mean=HALF, std=HALF, crop_pct=crop_pct, crop_mode=mode
        )
        image = photo(*size)
        torch.testing.assert_close((ours.pixels(image).float() / 255 - 0.5) / 0.5, theirs(image), atol=1e-6, rtol=0)


def test_pixels_of_an_oblong_input_cover_it() -> None:
    ours = Preprocessing((3, 16, 48), HALF, HALF)
    for size in ((20, 60), (60, 20), (48, 17), (49, 16)):
        assert ours.pixels(photo(*size)).shape == (3, 16, 48)


def test_an_image_of_the_right_size_is_not_resized() -> None:
    image = photo(32, 32)
    pixels = Preprocessing((3, 32, 32), HALF, HALF, "bicubic", 0.875).pixels(image)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_other_image_modes_become_what_the_model_takes() -> None:
    rgb, gray = Preprocessing((3, 8, 8), HALF, HALF), Preprocessing((1, 8, 8), (0.5,), (0.5,))
    for mode in ("L", "LA", "RGBA", "P", "CMYK", "1"):
        assert (
            rgb.pixels(photo(8, 8).convert("RGB").convert("L" if mode == "LA" else "RGB").convert(mode)).shape[0] == 3
        )
    assert gray.pixels(photo(8, 8)).shape == (1, 8, 8)
    deep = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert set(gray.pixels(deep).flatten().tolist()) == {128}
    with pytest.raises(ValueError, match="floating"):
        gray.pixels(Image.fromarray(np.zeros((8, 8), dtype=np.float32)))
    with pytest.raises(UnsupportedError, match="takes 5"):
        Preprocessing((5, 8, 8), (0.5,) * 5, (0.5,) * 5).pixels(photo(8, 8))


def test_every_interpolation_of_timm_is_known() -> None:
    assert {"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"} <= set(INTERPOLATIONS)
