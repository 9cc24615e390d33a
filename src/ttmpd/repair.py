"""Closed-form repair: linear stand-ins from normal equations, fitted in order along the student, folded where exact.

A stand-in answers ``phi(x + B [x 1])``, or ``phi(x + B [neighbourhood of x, 1])``: ridge least squares on the residual
branch, so that an infinite ridge is the identity (the dropped block), with the block's own final activation ``phi``
applied afterwards. All sums are float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.modules import call, evaluating, module_at, read, stubbed
from ttmpd.progress import track
from ttmpd.records import KERNELS, Removal, Samples, Tap, Unit
from ttmpd.sensitivity import SENSITIVITY_SAMPLES, positions, row_weights, sensitivities
from ttmpd.units.block import Block, answering, put, standing


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A fitted stand-in: ``y = weight * x + bias``, a map of the channels at every position or a small convolution.

    Args:
        weight: (channels, channels), or (channels, channels, side, side).
        bias: (channels,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, unit: Unit, x: Tensor) -> Tensor:
        """The stand-in's answer for the unit's input, its activation included."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if unit.layout == "channels_last":
            y = F.linear(x, weight, bias)
        elif x.dim() == 4:
            kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
            y = F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)
        else:
            y = F.conv1d(x, weight[:, :, None], bias)
        return {"": y, "relu": y.relu(), "relu6": F.relu6(y)}[unit.activation] if unit.activation else y


@dataclass
class NormalEquations:
    """Running sums of a weighted least-squares fit of ``y - x`` by ``[x 1]``, or by ``[neighbourhood of x, 1]``.

    Memory is O((side^2 channels)^2) however many rows are added.

    Args:
        channels: of inputs and outputs.
        device: of the rows.
        side: of the kernel; a row holds ``side^2`` values per channel, the channel's own place in the middle.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> eq = NormalEquations(1)
        >>> eq.add(x, 3 * x + 1)
        >>> fit = eq.solve(ridge=0.0)
        >>> round(float(fit.weight), 6), round(float(fit.bias), 6)
        (3.0, 1.0)
    """

    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    side: int = 1

    def __post_init__(self) -> None:
        size = self.channels * self.side**2
        # MPS has no float64: there the small sums live on the CPU.
        self.at = torch.device("cpu") if self.device.type == "mps" else self.device
        self.gram = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=self.at)
        self.cross = torch.zeros(size + 1, self.channels, dtype=torch.float64, device=self.at)

    @property
    def middle(self) -> slice:
        """The columns of a row that hold the position itself."""
        return slice(self.side**2 // 2, self.channels * self.side**2, self.side**2)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` is (rows, channels x side^2), ``y`` is (rows, channels), ``weight`` is (rows,)."""
        x64 = F.pad(x.to(self.at).double(), (0, 1), value=1.0)
        left = x64 if weight is None else x64 * weight.to(self.at).double()[:, None]
        self.gram += left.T @ x64
        self.cross += left.T @ (y.to(self.at).double() - x64[:, self.middle])

    def pointwise(self) -> "NormalEquations":
        """The equations of the fit by ``[x 1]`` alone: a part of these."""
        part = NormalEquations(self.channels, self.device)
        index = torch.arange(len(self.gram), device=self.at)
        index = torch.cat([index[self.middle], index[-1:]])
        part.gram, part.cross = self.gram[index][:, index], self.cross[index]
        return part

    def solve(self, ridge: float) -> LinearMap:
        """The map that minimises the weighted squared error plus ``ridge x mean diagonal x |B|^2``."""
        penalty = ridge * self.gram.diagonal()[:-1].mean() + 1e-12
        system = self.gram.clone()
        system.diagonal()[:-1] += penalty
        system.diagonal()[-1] += 1e-12
        factor, failed = torch.linalg.cholesky_ex(system)
        if ridge > 0 and not int(failed):
            solution = torch.cholesky_solve(self.cross, factor)
        else:  # singular: the shortest of all solutions
            solution = torch.linalg.lstsq(system, self.cross, driver="gelsd" if self.at.type == "cpu" else None)[0]
        weight = solution[:-1].T.clone()
        weight[:, self.middle] += torch.eye(self.channels, dtype=torch.float64, device=self.at)
        if self.side > 1:
            weight = weight.reshape(self.channels, self.channels, self.side, self.side)
        return LinearMap(weight.to(self.device, torch.float32), solution[-1].to(self.device, torch.float32))


def rows(value: Tensor, unit: Unit, index: Tensor, side: int = 1) -> Tensor:
    """The chosen positions of a batch as (B x positions, channels x side^2), zeros around the border."""
    index = index.to(value.device)
    if unit.layout == "channels_last":
        return value.reshape(len(value), -1, unit.channels)[:, index].reshape(-1, unit.channels)
    if side > 1:
        value, index = _neighbourhoods(value, index, side)
    return value.flatten(2)[:, :, index].transpose(1, 2).reshape(-1, unit.channels * side**2)


def _neighbourhoods(value: Tensor, index: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(B, channels x side^2, positions) around the positions at ``index``, and the index of all of them.

    Only what was chosen is copied: whole maps would be ``side^2`` times as large as the input.
    """
    width, reach = value.shape[3], side // 2
    padded = F.pad(value, (reach, reach, reach, reach))
    corner = index // width * padded.shape[3] + index % width
    steps = torch.arange(side, device=index.device)
    around = (steps[:, None] * padded.shape[3] + steps).flatten()
    found = padded.flatten(2)[:, :, corner[None] + around[:, None]]  # (B, channels, side^2, positions)
    return found.flatten(1, 2), torch.arange(len(index), device=index.device)


def install(student: nn.Module, kind: Block, removal: Removal, fit: LinearMap) -> None:
    """Put a fitted stand-in in the place of the unit, in place."""
    module = kind.stand_in(removal.unit, removal.action).to(fit.weight.device)
    linear = module[0] if isinstance(module, nn.Sequential) else module
    assert isinstance(linear, nn.Linear | nn.Conv1d | nn.Conv2d)
    with torch.no_grad():
        linear.weight.copy_(fit.weight.view_as(linear.weight))
        assert linear.bias is not None
        linear.bias.copy_(fit.bias)
    put(student, removal.unit, module)


def repaired(
    teacher: nn.Module,
    removals: Sequence[Removal],
    samples: Samples,
    *,
    ridge: float = 1e-3,
    batch_size: int = 64,
    sensitivity: float = 0.9,
) -> nn.Module:
    """The student of a plan: dropped units are gone, the others are fitted stand-ins.

    Stand-ins are fitted in the order of the network, each to the teacher's output given the *student's* input, so a
    later one makes up for the errors before it.

    Args:
        teacher: the model as found; not changed.
        removals: in the order of the network.
        samples: unlabelled samples; a few hundred are enough.
        ridge: relative to the mean diagonal of the normal equations.
        batch_size: samples per forward pass.
        sensitivity: how far positions are weighted by what they mean to the final features; 0 counts all alike.

    Returns:
        A new model in eval mode.

    Cost: one teacher pass, one batch with gradients, plus one pass of the student's first part per stand-in.
    """
    kind = Block()
    replaced = [removal for removal in removals if removal.action in KERNELS]
    student = kind.cut(teacher, [removal.unit for removal in removals]).eval()
    device = next(teacher.parameters()).device
    if not replaced:
        return student
    units = [removal.unit for removal in replaced]
    pattern = sensitivities(teacher, units, samples.batch(slice(0, SENSITIVITY_SAMPLES), device))
    chosen = {unit.id: positions(unit, pattern[unit.id]) for unit in units}
    wanted: dict[str, list[Tensor]] = {unit.id: [] for unit in units}
    taps = {unit.id: Tap(unit.path, "output") for unit in units}
    with evaluating(teacher):
        for batch in samples.batches(batch_size, device):
            seen = read(teacher, batch, taps)
            for unit in units:
                wanted[unit.id].append(rows(seen[unit.id], unit, chosen[unit.id]))
    with evaluating(student):
        for removal in track(replaced, "repair", len(replaced)):
            unit, side = removal.unit, KERNELS[removal.action]
            equations = NormalEquations(unit.channels, device, side)
            tap = {"x": Tap(unit.path, "input")}
            for batch, y in zip(samples.batches(batch_size, device), wanted.pop(unit.id), strict=True):
                x = rows(read(student, batch, tap)["x"], unit, chosen[unit.id], side)
                equations.add(x, y, row_weights(pattern, unit, chosen[unit.id], sensitivity, len(batch)))
            install(student, kind, removal, equations.solve(ridge))
    return student


def replay(model: nn.Module, removals: Sequence[Removal], state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the stock model with the removals made and the weights in ``state`` loaded: how artifacts come back.

    Which stand-ins were folded away, and which readers got a bias by that, is seen in the names of the weights.

    Raises:
        RuntimeError: the weights do not fit (torch's own message names the keys).
    """
    kind = Block()
    student = kind.cut(model, [removal.unit for removal in removals])
    for removal in removals:
        path = removal.unit.path
        if removal.action in KERNELS and any(key.startswith(f"{path}.") for key in state):
            put(student, removal.unit, kind.stand_in(removal.unit, removal.action))
    for key, value in state.items():
        layer, _, name = key.rpartition(".")
        module = _submodule(student, layer)
        if name == "bias" and isinstance(module, nn.Linear | nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(value))
    student.load_state_dict(dict(state))
    return student.to(next(iter(model.parameters())).device).eval()


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def fold(student: nn.Module, removals: Sequence[Removal], batch: Tensor, tolerance: float = 1e-4) -> int:
    """Fold stand-ins without activation into the linear layer that reads them, where that is exact. In place.

    The reader is the next layer in calling order; whether it is the *only* reader is settled by numbers: the fold is
    kept when the model's output stays within ``tolerance`` of its scale, else it is undone.

    Returns:
        How many stand-ins became identities.
    """
    folded = 0
    with evaluating(student):
        for removal in removals:
            if removal.action == "linear" and not removal.unit.activation:
                folded += _fold_one(student, removal.unit, batch, tolerance)
    return folded


def _fold_one(student: nn.Module, unit: Unit, batch: Tensor, tolerance: float) -> int:
    own = standing(student, unit)
    reader = _next_layer(student, unit, batch)
    if reader is None or not isinstance(own, nn.Linear | nn.Conv2d) or own.bias is None:
        return 0
    before = call(student, batch)
    old_weight, old_bias = reader.weight, reader.bias
    flat = old_weight.flatten(1).double() @ own.weight.flatten(1).double()
    shift = old_weight.flatten(1).double() @ own.bias.double()
    bias = shift if old_bias is None else shift + old_bias.double()
    reader.weight = nn.Parameter(flat.view_as(old_weight).to(old_weight.dtype))
    reader.bias = nn.Parameter(bias.to(old_weight.dtype))
    put(student, unit, nn.Identity())
    if torch.allclose(call(student, batch), before, rtol=0, atol=tolerance * float(before.abs().max())):
        return 1
    reader.weight, reader.bias = old_weight, old_bias
    put(student, unit, own)
    return 0


def _next_layer(student: nn.Module, unit: Unit, batch: Tensor) -> nn.Linear | nn.Conv2d | None:
    """The first layer with weights that runs after the unit, if it is a matrix or a 1x1 convolution as wide as it."""
    calls: list[str] = []
    layers = [
        (name, m) for name, m in student.named_modules() if not list(m.children()) and list(m.parameters(recurse=False))
    ]
    handles = [m.register_forward_hook(lambda _m, _a, _o, n=name: calls.append(n)) for name, m in layers]
    handles.append(module_at(student, unit.path).register_forward_hook(lambda *_: calls.append("")))
    try:
        student(batch)
    finally:
        for handle in handles:
            handle.remove()
    after = calls[calls.index("") + 1 :]
    layer = module_at(student, after[0]) if after else None
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer if layer.in_channels == unit.channels and layer.padding == (0, 0) else None
    return layer if isinstance(layer, nn.Linear) and layer.in_features == unit.channels else None


def skippable(teacher: nn.Module, units: Sequence[Unit], batch: Tensor) -> frozenset[str]:
    """Units behind which the network depends on their output alone.

    For them the units before can be skipped when only what comes after is of interest. Settled by numbers: with all
    earlier units skipped and the unit's true output handed in, the logits must be the model's own.
    """
    proven = set()
    with evaluating(teacher):
        seen = read(teacher, batch, {unit.id: Tap(unit.path, "output") for unit in units})
        logits = call(teacher, batch)
        for number, unit in enumerate(units):
            given = seen[unit.id]
            with stubbed(teacher, tail_stubs(units[:number], unit, given)):
                if torch.allclose(call(teacher, batch), logits, rtol=1e-4, atol=1e-4):
                    proven.add(unit.id)
    return frozenset(proven)


def tail_stubs(earlier: Sequence[Unit], unit: Unit, output: Tensor) -> dict[str, Callable[..., Any]]:
    """Stubs that skip ``earlier`` units and put ``output`` where ``unit`` would answer."""
    stubs = {u.path: answering(u, lambda x: x) for u in earlier}
    stubs[unit.path] = answering(unit, lambda _x: output)
    return stubs
