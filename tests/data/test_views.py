"""Views: the same pixels whenever they are asked for."""

import pytest
import torch

from ttmpd.data.views import crop_boxes, cropped, fixed_view, random_view


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(10, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def view(images, index, number, seed=0):
    index = torch.tensor(index)
    return fixed_view(images[index], index, number, seed, len(images))


def test_view_0_is_the_sample_itself(images):
    assert torch.equal(view(images, range(10), 0), images)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_view_does_not_depend_on_the_batch_or_on_earlier_draws(images, number):
    whole = view(images, range(10), number)
    torch.rand(3)
    assert torch.equal(view(images, [7, 2, 7], number), whole[[7, 2, 7]])
    assert torch.equal(torch.cat([view(images, [i], number) for i in range(10)]), whole)


def test_views_differ_by_number_and_seed(images):
    first = view(images, range(10), 1)
    assert not torch.equal(first, images)
    assert not torch.equal(first, view(images, range(10), 2))
    assert not torch.equal(first, view(images, range(10), 1, seed=1))


def test_a_view_is_a_shift_by_whole_pixels_and_perhaps_a_mirror_image(images):
    padded = torch.nn.functional.pad(images, (3, 3, 2, 2), mode="reflect")
    flipped = []
    for i, found in enumerate(view(images, range(10), 1)):
        windows = [padded[i, :, y : y + 16, x : x + 24] for y in range(5) for x in range(7)]
        same = any(torch.equal(found, window) for window in windows)
        mirrored = any(torch.equal(found, window.flip(-1)) for window in windows)
        assert same != mirrored
        flipped.append(mirrored)
    assert set(flipped) == {True, False}


def test_odd_views_are_crops_where_crops_may_be_smaller(images):
    index = torch.arange(10)
    wide = crop_boxes(10, torch.Generator().manual_seed(3 * 1009 + 1), (0.25, 1.0))
    assert torch.equal(fixed_view(images, index, 1, 3, 10, 0.25), cropped(images, wide))
    assert torch.equal(fixed_view(images, index, 2, 3, 10, 0.25), fixed_view(images, index, 2, 3, 10))
    assert torch.equal(fixed_view(images, index, 0, 3, 10, 0.25), images)


@pytest.mark.parametrize("number", [1, 3])
def test_a_crop_does_not_depend_on_the_batch(images, number):
    whole = fixed_view(images, torch.arange(10), number, 0, 10, 0.25)
    some = torch.tensor([7, 2, 7])
    assert torch.allclose(fixed_view(images[some], some, number, 0, 10, 0.25), whole[some], atol=1e-6)


def test_the_samples_stay_as_they_were(images):
    before = images.clone()
    fixed_view(images, torch.arange(10), 1, 0, 10).add_(1)
    assert torch.equal(images, before)


def test_what_is_no_image_has_no_views():
    rows = torch.rand(4, 9)
    assert fixed_view(rows, torch.arange(4), 3, 0, 4) is rows
    assert random_view(rows, torch.Generator()) is rows


def test_tiny_images_are_only_mirrored():
    images = torch.rand(6, 1, 4, 4)
    found = view(images, range(6), 1)
    assert all(torch.equal(f, i) or torch.equal(f, i.flip(-1)) for f, i in zip(found, images, strict=True))


def test_the_whole_box_is_the_image_and_its_mirror_image(images):
    whole = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, -1.0]])
    found = cropped(images[:2], whole)
    assert torch.allclose(found[0], images[0], atol=1e-5)
    assert torch.allclose(found[1], images[1].flip(-1), atol=1e-5)


def test_a_box_cuts_the_corner_it_names(images):
    corner = cropped(images[:1], torch.tensor([[0.5, 0.5, -0.5, -0.5, 1.0]]))
    doubled = torch.nn.functional.interpolate(images[:1, :, :8, :12], scale_factor=2, mode="bilinear")
    assert torch.allclose(corner[..., 2:-2, 2:-2], doubled[..., 2:-2, 2:-2], atol=1e-5)


def test_boxes_stay_inside_and_keep_to_the_scale():
    height, width, y, x, flip = crop_boxes(500, torch.Generator().manual_seed(0), (0.2, 0.8)).unbind(1)
    assert bool(((y.abs() + height) <= 1 + 1e-6).all())
    assert bool(((x.abs() + width) <= 1 + 1e-6).all())
    area = height * width
    assert 0.15 < float(area.min()) < 0.25
    assert 0.75 < float(area.max()) <= 0.8 + 1e-6
    assert set(flip.tolist()) == {-1.0, 1.0}


def test_random_views_follow_their_generator(images):
    first, again = (random_view(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_view(images, torch.Generator().manual_seed(5)))
