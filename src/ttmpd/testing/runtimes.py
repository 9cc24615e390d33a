"""Checks of runtimes."""

import torch
from torch import Tensor, nn

from ttmpd.models.modules import clone
from ttmpd.models.run import evaluating, output_tensors
from ttmpd.runtimes.base import Runtime
from ttmpd.testing.common import answer
from ttmpd.testing.tiny_models import assert_untouched, require, tiny_model, tiny_samples


def _case() -> tuple[nn.Module, Tensor]:
    return tiny_model(), tiny_samples(4).batch(slice(None))


def check_same_outputs(runtime: Runtime) -> None:
    """A prepared call returns what the module returns, on the batch it was prepared with and on another one."""
    model, batch = _case()
    with evaluating(model):
        run = runtime.prepare(model, batch)
        for inputs in (batch, batch.flip(0)):
            pairs = zip(output_tensors(run(inputs)), output_tensors(model(inputs)), strict=True)
            alike = all(torch.allclose(output, expected, rtol=1e-3, atol=1e-4) for output, expected in pairs)
            require(alike, "a runtime must answer as the module does")


def check_module_untouched(runtime: Runtime) -> None:
    """Preparing and running leave the module, its mode and the batch as they were."""
    model, batch = _case()
    with assert_untouched(model), evaluating(model):
        inputs = batch.clone()
        runtime.prepare(model, inputs)(inputs)
        require(torch.equal(inputs, batch), "a runtime must leave its inputs as they were")


def check_models_apart(runtime: Runtime) -> None:
    """Two prepared models do not disturb each other: latencies are measured in turn."""
    model, batch = _case()
    other = clone(model)
    with evaluating(model), evaluating(other):
        for parameter in other.parameters():
            parameter.mul_(0.5)
        runs = [runtime.prepare(module, batch) for module in (model, other)]
        runs[1](batch)
        alike = torch.allclose(runs[0](batch), answer(model, batch), rtol=1e-3, atol=1e-4)
    require(alike, "a model must answer as itself after another model was prepared and run")


def check_version_stated(runtime: Runtime) -> None:
    """The version is a text that is not empty: without it milliseconds cannot be compared."""
    require(isinstance(runtime.version, str) and bool(runtime.version), "a runtime must state its version")


CHECKS = (
    check_same_outputs,
    check_module_untouched,
    check_models_apart,
    check_version_stated,
)
