"""How the output of each layer is used: which batch norm reads it, to what it is added, where it is clipped.

Observed in one forward pass, by the identity of the tensors that go from function to function.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttmpd.models.modules import hooks
from ttmpd.models.run import evaluating, predict
from ttmpd.surgery.layers import answers_plainly, is_convolution, is_layer

ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}
"""Names of the functions that add."""
_CLIPPING = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "hardtanh": "relu6"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer, and how its output is used.

    Args:
        path: of the layer.
        shape: of its output for one sample.
        plain: the output is the product of its weight and its inputs plus its bias, so that new weights can be fitted.
        norm: path of the batch norm that alone reads the output, "" when there is none.
        foldable: ``norm``, or the path of a module that applies a batch norm and then more, as timm's norms with an
            activation.
        adds_to_residual: the output, after the norm if there is one, is added to something and read by nothing else.
        adder: path of the module that adds.
        activation: "relu" or "relu6" when that alone reads the output, or the sum, else "".
    """

    path: str
    shape: tuple[int, ...]
    plain: bool
    norm: str = ""
    foldable: str = ""
    adds_to_residual: bool = False
    adder: str = ""
    activation: str = ""


@dataclass(slots=True)
class _Value:
    """A tensor, and by what it was used: (name of the function, the value that came out, module that called it)."""

    uses: list[tuple[str, "_Value", str]] = field(default_factory=list)


class _Flow(TorchFunctionMode):
    """Follows tensors from function to function; a function that writes in place makes a new value."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, _Value] = {}
        self.alive: list[Tensor] = []  # an identity is one only as long as its tensor lives
        self.stack: list[str] = [""]

    def value(self, tensor: Tensor) -> _Value:
        """The value that the tensor holds now."""
        if id(tensor) not in self.values:
            self.alive.append(tensor)
            self.values[id(tensor)] = _Value()
        return self.values[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        values, versions = [self.value(t) for t in tensors], {id(t): t._version for t in tensors}
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or versions.get(id(out)) == out._version:
            return out  # a shape, or the same tensor as it was: dropout in eval mode
        if id(out) in versions:
            self.values[id(out)] = _Value()  # written in place
        result = self.value(out)
        for value in values:
            value.uses.append((getattr(func, "__name__", ""), result, self.stack[-1]))
        return out


def layers_of(model: nn.Module, batch: Tensor) -> dict[str, Layer]:
    """Path -> every convolution and matrix that ran once, and how its output is used.

    Args:
        model: left untouched.
        batch: a few samples.
    """
    flow = _Flow()
    outputs: dict[str, tuple[_Value, tuple[int, ...]]] = {}
    plain: dict[str, list[bool]] = {}  # a value per call

    def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
        flow.stack.pop()
        layer = is_layer(module) or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not isinstance(output, Tensor) or not (layer or is_norm(module)):
            return
        with torch._C.DisableTorchFunction():  # noting the output is no use of it
            outputs[path] = (flow.value(output), tuple(output.shape[1:]))
            if layer:
                fits = is_layer(module) or is_convolution(module)
                fits = fits and len(args) == 1 and answers_plainly(module, args[0], output)
                plain.setdefault(path, []).append(fits)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, p=path: flow.stack.append(p)))
        handles.append(module.register_forward_hook(lambda m, a, out, p=path: after(p, m, a, out)))
    with evaluating(model), hooks(handles), flow:
        predict(model, batch)
    return {path: _layer(path, fits[0], outputs) for path, fits in plain.items() if len(fits) == 1}


def is_norm(module: nn.Module) -> bool:
    """True for a batch norm with statistics and weights of its own."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.affine and module.running_mean is not None


def _layer(path: str, plain: bool, outputs: Mapping[str, tuple[_Value, tuple[int, ...]]]) -> Layer:
    value, shape = outputs[path]
    norm, foldable = "", ""
    if len(value.uses) == 1 and value.uses[0][0] == "batch_norm":
        _, normed, caller = value.uses[0]
        foldable = caller if caller in outputs else ""
        norm = foldable if foldable and outputs[foldable][0] is normed else ""
        value = normed if norm else value
    adder, adds_to_residual = "", len(value.uses) == 1 and value.uses[0][0] in ADDING
    if adds_to_residual:
        _, value, adder = value.uses[0]
    clips = {_CLIPPING.get(name, "") for name, _, _ in value.uses}
    activation = clips.pop() if len(clips) == 1 else ""
    return Layer(path, shape, plain, norm, foldable, adds_to_residual, adder, activation)
