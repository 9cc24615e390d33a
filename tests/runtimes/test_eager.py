"""Eager PyTorch: the module itself."""

import torch

from ttmpd.runtimes.eager import Eager
from ttmpd.testing.tiny_models import tiny_model


def test_the_module_itself_is_run():
    model = tiny_model()
    assert Eager().prepare(model, torch.zeros(1, 3, 8, 8)) is model


def test_the_version_is_that_of_torch():
    assert Eager().version == str(torch.__version__)
