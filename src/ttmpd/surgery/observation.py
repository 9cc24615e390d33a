"""One look at a model that all kinds of units share: a forward pass with its autograd graph, and its operations."""

import functools
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ttmpd.errors import ModelError, first_line
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import has_nan
from ttmpd.models.run import first_tensor
from ttmpd.models.taps import find_output_layer
from ttmpd.models.trace import ModuleCall, Trace, trace
from ttmpd.records import Form
from ttmpd.surgery.layers import answers_plainly, is_convolution


@dataclass(frozen=True, slots=True)
class CallNote:
    """What is noted of a call while its tensors are as they were.

    Args:
        form: how the module answered: "plain", "tuple" or "pair"; None for a longer tuple.
        plain_convolution: whether a convolution over all channels answered what its weights make of the input.
    """

    form: Form | None
    plain_convolution: bool


@dataclass(frozen=True, eq=False)
class Observation:
    """What kinds of units see of a model; each part is made when it is first asked for, once for all kinds.

    Args:
        model: left untouched.
        batch: a few samples, on the model's device.
    """

    model: nn.Module
    batch: Tensor

    @functools.cached_property
    def trace(self) -> Trace:
        """All calls with their tensors, where these stand in the autograd graph, and a :class:`CallNote` each.

        Raises:
            ModelError: the model cannot be run on the batch or answers with NaN.

        Cost: one forward pass; every convolution runs twice.
        """
        name = type(self.model).__name__
        try:
            run = trace(self.model, self.batch, values=True, gradients=True, note=_note)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{name} must run on a batch of shape {tuple(self.batch.shape)}, but failed: "
                f"{first_line(error)[:200]}; check the input size and the preprocessing"
            ) from error
        output = first_tensor(run.output)
        if output is None or has_nan(output):
            problem = "none" if output is None else "NaN or infinity"
            raise ModelError(f"{name} must answer with a tensor of finite values, but got {problem}")
        return run

    @functools.cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates per sample of every module by path. Cost: one forward pass."""
        return count_macs(self.model, self.batch)

    @functools.cached_property
    def output_layer(self) -> str | None:
        """Path of the layer that gives the logits, None when no single layer does. Cost: one forward pass."""
        return find_output_layer(self.model, self.batch)


def note_of(call: ModuleCall) -> CallNote:
    """What an :class:`Observation` noted of the call."""
    return cast(CallNote, call.note)


def _note(module: nn.Module, args: Any, output: Any) -> CallNote:
    plain = bool(args) and is_convolution(module) and answers_plainly(module, args[0], output)
    return CallNote(_form(output), plain)


def _form(output: Any) -> Form | None:
    if not isinstance(output, tuple):
        return "plain"
    return {1: "tuple", 2: "pair"}.get(len(output))  # type: ignore[return-value]
