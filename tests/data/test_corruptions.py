"""Shifts: the same pixels for the same numbers, the published formulas, and errors that say what to do."""

import colorsys
import io
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ttmpd.data.corruption_textures import ICE_SHEETS, ICE_SIDE, ice, plasma, streaked, zoomed
from ttmpd.data.corruptions import CORRUPTIONS, _near_pixels, corrupted
from ttmpd.errors import InvalidValueError, MissingPackageError

SIDES = {32: 24, 224: 2}  # how many images of each size

# Where the mean change does not grow with every severity, since the published settings trade one thing for another.
NOT_MONOTONE = {
    ("glass_blur", 32): "severities 1 to 3 copy once and 4 and 5 twice; more blur between the copies changes less",
    ("glass_blur", 224): "severity 3 copies three times within 2 pixels, 4 twice within 3",
    ("motion_blur", 32): "severities 3 and 4 have one sigma, and only what is cut off differs",
    ("frost", 32): "the ice stays and the picture under it gets darker, which undoes a part of the brightening",
    ("frost", 224): "the ice stays and the picture under it gets darker, which undoes a part of the brightening",
    ("snow", 224): "severities 2 and 3 pale the picture alike, and 3 has fewer, larger flakes",
    ("fog", 224): "severities 3 and 4 add one amount, and only the clouds get rougher",
    ("elastic_transform", 32): "large even distortions give way to small uneven ones",
    ("elastic_transform", 224): "large even distortions give way to small uneven ones",
}
ALL = [(name, side) for side in SIDES for name in CORRUPTIONS]


def photos(side: int) -> np.ndarray:
    """Smooth grounds, fine grain and a bright box with edges: something of what photographs have."""
    rng = np.random.default_rng(side)
    n = SIDES[side]
    ground, grain = (
        ndimage.gaussian_filter(rng.standard_normal((n, side, side, 3)), (0, s, s, 0)) for s in (side / 8, 0.7)
    )
    x = 0.4 + 0.15 * ground / ground.std() + 0.06 * grain / grain.std()
    x[:, side // 4 : side // 2, side // 3 : side - 5] += 0.3
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


PHOTOS = {side: photos(side) for side in SIDES}


def moved(name: str, side: int, severity: int) -> float:
    """Mean absolute change in gray levels."""
    return float(np.abs(corrupted(PHOTOS[side], name, severity).astype(int) - PHOTOS[side]).mean())


def gray(level: int, side: int = 32, n: int = 1) -> np.ndarray:
    return np.full((n, side, side, 3), level, dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------ every one


def test_the_names_are_the_published_fifteen_in_their_order():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 15
    assert CORRUPTIONS[0] == "gaussian_noise" and CORRUPTIONS[7] == "snow" and CORRUPTIONS[-1] == "jpeg_compression"


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize(("name", "side"), ALL)
def test_shape_type_and_repetition(name, side, severity):
    images = PHOTOS[side]
    before = images.copy()
    found = corrupted(images, name, severity)
    assert found.shape == images.shape and found.dtype == np.uint8
    assert all(not np.array_equal(new, old) for new, old in zip(found, images, strict=True))
    assert np.array_equal(images, before)
    assert np.array_equal(corrupted(images[:1], name, severity), found[:1])


@pytest.mark.parametrize(("name", "side"), ALL)
def test_an_image_does_not_depend_on_its_batch(name, side, monkeypatch):
    images = PHOTOS[side]
    whole = corrupted(images, name, 4, seed=7)
    assert np.array_equal(corrupted(images[0], name, 4, 7), whole[0])
    assert np.array_equal(corrupted(images[1:], name, 4, 7, first=1), whole[1:])
    monkeypatch.setattr("ttmpd.data.corruptions._CHUNK", images[0].size)
    assert np.array_equal(corrupted(images, name, 4, 7), whole)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"defocus_blur", "zoom_blur", "brightness", "contrast"}))
def test_what_is_random_differs_by_seed_and_image(name):
    if name in ("pixelate", "jpeg_compression"):
        assert np.array_equal(corrupted(PHOTOS[32], name), corrupted(PHOTOS[32], name, seed=1))
        return
    twins = PHOTOS[32][[0, 0]]
    found = corrupted(twins, name)
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found, corrupted(twins, name, seed=1))


@pytest.mark.parametrize(("name", "side"), ALL)
def test_more_severe_moves_more(name, side):
    changes = [moved(name, side, severity) for severity in range(1, 6)]
    if name == "elastic_transform":
        assert min(changes) > 3
    else:
        assert changes[4] > changes[0]
    if (name, side) in NOT_MONOTONE:
        assert min(np.diff(changes)) < 0.1, "take it off the list"
    else:
        assert min(np.diff(changes)) > 0


def test_oblong_images_and_none_at_all():
    image = PHOTOS[224][0, :40, :90]
    for name in CORRUPTIONS:
        assert corrupted(image, name, 5).shape == (40, 90, 3)
    assert corrupted(PHOTOS[32][:0], "fog").shape == (0, 32, 32, 3)


def test_settings_change_above_64_pixels():
    assert corrupted(gray(100, 64), "brightness", 1)[0, 0, 0, 0] == 113  # 100 + 0.05 x 255
    assert corrupted(gray(100, 65), "brightness", 1)[0, 0, 0, 0] == 126  # 100 + 0.1 x 255 = 125.5
    assert corrupted(PHOTOS[224][0, :64, :90], "brightness", 1).shape == (64, 90, 3)


# -------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.04), (3, 0.08), (5, 0.10)])
def test_gaussian_noise_has_the_stated_deviation(severity, deviation):
    found = corrupted(gray(128, n=8), "gaussian_noise", severity) / 255
    assert found.std() == pytest.approx(deviation, rel=0.03)
    assert found.mean() == pytest.approx(128 / 255, abs=0.003)


def test_shot_noise_is_poisson():
    found = corrupted(gray(128, 224, 2), "shot_noise", 1) / 255  # 60 photons at white
    assert found.mean() == pytest.approx(128 / 255, abs=0.003)
    assert found.var() == pytest.approx(128 / 255 / 60, rel=0.03)


def test_impulse_noise_is_half_salt_half_pepper_in_each_channel():
    found = corrupted(gray(100, 224, 2), "impulse_noise", 5)
    assert set(np.unique(found)) == {0, 100, 255}
    assert np.mean(found == 0) == pytest.approx(0.135, abs=0.003)
    assert np.mean(found == 255) == pytest.approx(0.135, abs=0.003)
    assert np.any((found[..., 0] == 0) & (found[..., 1] == 100))


def test_defocus_of_a_point_is_the_disk():
    image = gray(0)[0]
    image[16, 16] = 255
    found = corrupted(image, "defocus_blur", 5)[..., 0]  # radius 1.5: nine equal pixels
    assert np.all(found[15:18, 15:18] == round(255 / 9)) and found.astype(int).sum() == 9 * round(255 / 9)


@pytest.mark.parametrize(("reach", "side"), [(1, 12), (2, 13), (4, 20)])
def test_glass_blur_copies_in_the_published_order(reach, side):
    dy, dx = np.random.default_rng(3).integers(-reach, reach, (2, side - 2 * reach, side - 2 * reach))
    pixels = np.arange(side * side).reshape(side, side)
    for h in range(side - reach, reach, -1):
        for w in range(side - reach, reach, -1):
            pixels[h, w] = pixels[h + dy[h - reach - 1, w - reach - 1], w + dx[h - reach - 1, w - reach - 1]]
    found = _near_pixels(np.random.default_rng(3), side, side, reach)
    assert np.array_equal(found.reshape(side, side), pixels)


def test_streaks_follow_half_a_gaussian_along_the_angle():
    x = np.zeros((2, 21, 21, 1), np.float32)
    x[:, 10, 10] = 1
    weights = np.exp(-(np.arange(5) ** 2) / 2)
    weights /= weights.sum()
    level, steep = streaked(x, 2, 1.0, [0, -90])[..., 0]
    assert level[10, 10:5:-1] == pytest.approx(weights, abs=1e-6)  # a pixel takes from its right
    assert steep[10:15, 10] == pytest.approx(weights, abs=1e-6)
    assert level.sum() == pytest.approx(1) and steep.sum() == pytest.approx(1)


@pytest.mark.parametrize(("side", "factor"), [(32, 1.0), (32, 1.07), (32, 1.25), (224, 1.28), (224, 4.5)])
def test_zoom_agrees_with_scipy(side, factor):
    x = PHOTOS[side][:1].astype(np.float32) / 255
    part = int(np.ceil(side / factor))
    top = (side - part) // 2
    large = ndimage.zoom(x[0, top : top + part, top : top + part], (factor, factor, 1), order=1)
    cut = (len(large) - side) // 2
    assert np.abs(zoomed(x, factor)[0] - large[cut : cut + side, cut : cut + side]).max() < 1e-5


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"]
)
def test_a_constant_image_stays_under_blur_zoom_distortion_and_pixels(name):
    assert np.array_equal(corrupted(gray(77), name, 5), gray(77))
    assert np.array_equal(corrupted(gray(77, 100), name, 3), gray(77, 100))


def test_brightness_is_the_value_of_hsv():
    image = PHOTOS[32][0].copy()
    image[0, :2] = [[0, 0, 0], [255, 3, 0]]
    found = corrupted(image, "brightness", 3)
    for pixel, new in zip(image.reshape(-1, 3)[:200] / 255, found.reshape(-1, 3), strict=False):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1))) * 255
        assert np.abs(expected - new).max() <= 0.501
    assert np.all(corrupted(gray(100), "brightness", 4) == 151)  # 100 + 0.2 x 255


def test_contrast_shrinks_to_the_mean_of_each_channel():
    image = gray(0, 8)[0]
    image[:4, :, 0], image[4:, :, 0] = 40, 200  # mean 120
    image[:2, :, 1] = 80  # mean 20
    found = corrupted(image, "contrast", 2)  # half of the distance
    assert set(np.unique(found[:4, :, 0])) == {80} and set(np.unique(found[4:, :, 0])) == {160}
    assert set(np.unique(found[:2, :, 1])) == {50} and set(np.unique(found[2:, :, 1])) == {10}
    assert np.all(found[..., 2] == 0)


def test_fog_keeps_black_pictures_black_and_lifts_others():
    assert np.array_equal(corrupted(gray(0), "fog", 5), gray(0))
    found = corrupted(gray(100), "fog", 2).astype(float) / 255  # (v + 0.5 p) v / (v + 0.5), p from 0 to 1
    v = 100 / 255
    assert found.min() == pytest.approx(v * v / (v + 0.5), abs=0.003)
    assert found.max() == pytest.approx(v, abs=0.003)


def test_plasma_is_the_diamond_square_mean_where_nothing_is_drawn():
    noise = np.zeros((1, 4, 4), np.float32)
    noise[0, 2, 2] = 1  # the first center; all four corners are one point of the torus, and 0
    between = [0.375, 0.5, 0.625, 0.5]
    expected = [[0, 0.375, 0.5, 0.375], between, [0.5, 0.625, 1, 0.625], between]
    assert np.array_equal(plasma(noise, 2)[0], expected)


def test_ice_is_the_same_each_time_and_its_borders_meet():
    sheets = [ice(number) for number in range(ICE_SHEETS)]
    assert all(sheet.shape == (ICE_SIDE, ICE_SIDE, 3) and 0 < sheet.min() < sheet.max() <= 1 for sheet in sheets)
    assert np.array_equal(ice.__wrapped__(1), sheets[1]) and not np.array_equal(sheets[0], sheets[1])
    inside = np.abs(np.diff(sheets[0], axis=0)).mean()
    assert np.abs(sheets[0][0] - sheets[0][-1]).mean() < 1.5 * inside


def test_pixelate_means_blocks():
    image = PHOTOS[224][0, :128, :128]
    found = corrupted(image, "pixelate", 2)  # half the side
    means = image.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.array_equal(found[::2, ::2], found[1::2, 1::2])
    assert np.abs(found[::2, ::2] - means).max() <= 1


@pytest.mark.parametrize(("side", "severity", "quality"), [(32, 1, 80), (32, 5, 40), (224, 1, 25), (224, 5, 7)])
def test_jpeg_is_pillows_at_the_stated_quality(side, severity, quality):
    file = io.BytesIO()
    Image.fromarray(PHOTOS[side][0]).save(file, "JPEG", quality=quality)
    assert np.array_equal(corrupted(PHOTOS[side][0], "jpeg_compression", severity), np.asarray(Image.open(file)))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("images", "settings", "words"),
    [
        (gray(0), {"name": "rain"}, "gaussian_noise, shot_noise.*jpeg_compression, but got 'rain'"),
        (gray(0), {"severity": 0}, "severity must be 1, 2, 3, 4 or 5, but got 0"),
        (gray(0), {"severity": 6}, "but got 6"),
        (gray(0), {"severity": 2.5}, "but got 2.5"),
        (gray(0), {"seed": -1}, "at least 0, but got -1 and 0"),
        (gray(0), {"first": -2}, "at least 0, but got 0 and -2"),
        (gray(0).astype(np.float32), {}, "array of uint8, but got float32; scale"),
        ([[0]], {}, "array of uint8, but got list"),
        (gray(0)[..., :1], {}, r"shape \(N, H, W, 3\).*but got \(1, 32, 32, 1\)"),
        (gray(0)[0, 0], {}, r"but got \(32, 3\)"),
        (gray(0)[:, :7], {}, r"at least 8, but got \(1, 7, 32, 3\)"),
    ],
)
def test_bad_input_is_named(images, settings, words):
    with pytest.raises(InvalidValueError, match=words):
        corrupted(images, **({"name": "fog"} | settings))


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingPackageError, match=r"pip install"):
        corrupted(gray(0), "defocus_blur")
    assert corrupted(gray(100), "fog").shape == (1, 32, 32, 3)
