import builtins
import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ttmpd.demo import digits as demo
from ttmpd.errors import MissingPackageError


def prepared(pixels: np.ndarray) -> Tensor:
    cfg = demo.DigitNet.pretrained_cfg
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - cfg["mean"][0]) / cfg["std"][0]


@torch.no_grad()
def accuracy(model: nn.Module, pixels: np.ndarray, y: np.ndarray) -> float:
    return (model(prepared(pixels)).argmax(1).numpy() == y).mean().item()


@torch.no_grad()
def renormalized(model: nn.Module, pixels: np.ndarray) -> nn.Module:
    """The model with the normalization statistics of ``pixels`` alone."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    model(prepared(pixels))
    return model.eval()


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return demo.demo_model()


@pytest.fixture(scope="module")
def data() -> demo.DemoData:
    return demo.demo_data()


def test_shapes_and_types(data):
    assert data.unlabelled.shape == (500, 8, 8, 1)
    assert data.x.shape == data.x_clean.shape == (500, 8, 8, 1)
    assert data.unlabelled.dtype == data.x.dtype == data.x_clean.dtype == np.uint8
    assert data.y.shape == (500,)
    assert set(data.y.tolist()) == set(range(10))
    assert "contrast" in data.corruption


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_and_leave_nothing_out(seed):
    parts = demo.demo_split(seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))


def test_every_seed_keeps_the_training_part_of_the_teacher_apart():
    first, second = demo.demo_split(0), demo.demo_split(1)
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


def test_teacher_is_ready_to_use(teacher):
    assert not teacher.training
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in teacher.parameters())
    assert teacher(torch.zeros(3, *teacher.pretrained_cfg["input_size"])).shape == (3, 10)


def test_teacher_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    demo.demo_model()
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_small():
    assert demo.WEIGHTS.stat().st_size < 2_000_000


def test_stated_normalization_is_that_of_the_training_part():
    pixels, _ = demo.digits()
    train = pixels[demo.demo_split()[0]] / 255
    assert train.mean() == pytest.approx(demo.DigitNet.pretrained_cfg["mean"][0], abs=0.01)
    assert train.std() == pytest.approx(demo.DigitNet.pretrained_cfg["std"][0], abs=0.01)


def test_teacher_knows_clean_digits_and_fails_on_shifted_ones(teacher, data):
    clean, shifted = accuracy(teacher, data.x_clean, data.y), accuracy(teacher, data.x, data.y)
    assert clean > 0.97
    assert shifted < clean - 0.05
    assert shifted > 0.5


def test_new_statistics_recover_a_part(teacher, data):
    adapted = renormalized(teacher, data.unlabelled)
    assert accuracy(adapted, data.x, data.y) > accuracy(teacher, data.x, data.y) + 0.05


def test_same_seed_gives_the_same_data(data):
    again, other = demo.demo_data(), demo.demo_data(seed=1)
    assert np.array_equal(again.unlabelled, data.unlabelled)
    assert np.array_equal(again.x, data.x)
    assert np.array_equal(again.y, data.y)
    assert not np.array_equal(other.unlabelled, data.unlabelled)


def test_shift_leaves_its_input_alone():
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    shifted = demo.shift(pixels)
    assert not pixels.any()
    assert 0.15 < shifted.mean() / 255 < 0.25


def test_missing_package_is_named_with_its_extra(monkeypatch):
    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(MissingPackageError, match=r'pip install "ttmpd\[demo\]"'):
        demo.demo_data()
