"""Closed-form repair: linear stand-ins from normal equations, fitted in order along the student, folded where exact.

A stand-in answers ``phi(x + B [x 1])``, or ``phi(x + B [neighbourhood of x, 1])``: ridge least squares on the residual
branch, so that an infinite ridge is the identity (the dropped block), with the block's own final activation ``phi``
applied afterwards. All sums are float64.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.least_squares import Moments
from ttmpd.modules import evaluating, module_at, read
from ttmpd.narrowing import bias_of, input_rows, rescaled, sum_taps
from ttmpd.progress import track
from ttmpd.records import KERNELS, Removal, Samples, Tap, Unit
from ttmpd.sensitivity import MAX_POSITIONS, SENSITIVITY_SAMPLES, positions, row_weights, sensitivities
from ttmpd.surgery import WHOLE, cut
from ttmpd.units._members import matrix_of, set_matrix, spread_out
from ttmpd.units.block import Block, put

MAX_STORED = 64 * 2**20
"""Values of the teacher's answers that are held at once; beyond, fewer positions of each sample are fitted to."""

Rows = Iterator[tuple[Tensor, Tensor, Tensor]]
"""What a fit is given batch by batch: (inputs, wanted outputs, weight of each row)."""


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
    """A stand-in as a weighted least-squares fit of ``y`` by ``[x 1]``, or by ``[neighbourhood of x, 1]``.

    Args:
        channels: of inputs and outputs.
        device: of the rows.
        side: of the kernel; a row holds ``side^2`` values per channel, the channel's own place in the middle.

    """

    channels: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    side: int = 1

    def __post_init__(self) -> None:
        self.moments = Moments(self.channels * self.side**2, self.channels, self.device)

    @property
    def middle(self) -> slice:
        """The columns of a row that hold the position itself."""
        return slice(self.side**2 // 2, self.channels * self.side**2, self.side**2)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` is (rows, channels x side^2), ``y`` is (rows, channels), ``weight`` is (rows,)."""
        self.moments.add(x.to(self.moments.at).double(), y, weight)

    def pointwise(self) -> "NormalEquations":
        """The equations of the fit by ``[x 1]`` alone: a part of these."""
        part = NormalEquations(self.channels, self.device)
        part.moments = self.moments.part(torch.arange(self.moments.n_inputs)[self.middle])
        return part

    def solve(self, ridge: float) -> LinearMap:
        """The map that minimises the weighted squared error; the ridge draws it to handing on the input."""
        identity = torch.zeros(self.channels, self.moments.n_inputs)
        identity[:, self.middle] = torch.eye(self.channels)
        weight, bias = self.moments.solve(identity, torch.zeros(self.channels), ridge)
        assert bias is not None
        if self.side > 1:
            weight = weight.reshape(self.channels, self.channels, self.side, self.side)
        return LinearMap(weight, bias)


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
    rescale: bool = False,
) -> nn.Module:
    """The student of a plan: dropped units are gone, the others are fitted.

    Stand-ins, and the layers that read the kept members of narrowed units, are fitted in the order of the network, each
    to the teacher's output given the *student's* input, so a later one makes up for the errors before it.

    Args:
        teacher: the model as found; not changed.
        removals: in the order of the network.
        samples: unlabelled samples; a few hundred are enough.
        ridge: relative to the mean diagonal of the normal equations.
        batch_size: samples per forward pass.
        sensitivity: how far positions are weighted by what they mean to the final features; 0 counts all alike.
        rescale: give kept members one factor each instead of fitting the layer that reads them (KCM); where a factor is
            not to be trusted, this layer and all later ones stay as they are.

    Returns:
        A new model in eval mode.

    Cost: one teacher pass, one batch with gradients, plus one pass of the student's first part per fit.
    """
    fits = [removal for removal in removals if removal.action != "drop"]
    student = cut(teacher, removals).eval()
    if not fits:
        return student
    seen = _observed(teacher, fits, samples, batch_size)
    trusted = True
    with evaluating(student):
        for removal in track(fits, "repair", len(fits)):
            given = _given(student, removal, seen, samples, batch_size, sensitivity)
            if removal.action != "narrow":
                equations = NormalEquations(removal.unit.channels, seen.device, KERNELS[removal.action])
                for x, y, weight in given:
                    equations.add(x, y, weight)
                install(student, WHOLE, removal, equations.solve(ridge))
            elif trusted:
                trusted = refit(student, removal, given, ridge=ridge, rescale=rescale)
    return student


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the teacher answers where something is fitted.

    Args:
        pattern: unit id -> (positions,) weights.
        chosen: unit id -> positions that are fitted to.
        sums: unit id -> where a narrowed unit's layer has been added to its shortcut.
        outputs: unit id -> what is left of the outputs of a layer that makes the members of another narrowed unit.
        wanted: unit id -> the teacher's rows of every batch.
        device: of the teacher.
    """

    pattern: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    sums: Mapping[str, Tap]
    outputs: Mapping[str, Tensor]
    wanted: dict[str, list[Tensor]]
    device: torch.device


def _observed(teacher: nn.Module, fits: Sequence[Removal], samples: Samples, batch_size: int) -> _Seen:
    device = next(teacher.parameters()).device
    units = [removal.unit for removal in fits]
    few = samples.batch(slice(0, SENSITIVITY_SAMPLES), device)
    pattern = sensitivities(teacher, units, few, kept=samples.kept(few))
    limit = MAX_STORED // max(1, len(samples) * sum(unit.channels for unit in units))
    limit, kept = max(8, min(MAX_POSITIONS, limit)), samples.kept(samples.inputs)
    chosen = {unit.id: positions(unit, pattern[unit.id], limit=limit, kept=kept) for unit in units}
    sums = sum_taps(teacher, [unit for unit in units if unit.members], few[:2])
    wanted: dict[str, list[Tensor]] = {unit.id: [] for unit in units}
    taps = {unit.id: sums.get(unit.id, Tap(unit.path, "output")) for unit in units}
    with evaluating(teacher):
        for batch in samples.batches(batch_size, device):
            found = read(teacher, batch, taps)
            for unit in units:
                wanted[unit.id].append(rows(found[unit.id], unit, chosen[unit.id]))
    return _Seen(pattern, chosen, sums, _narrowed_outputs(fits), wanted, device)


def _narrowed_outputs(fits: Sequence[Removal]) -> dict[str, Tensor]:
    by_path = {removal.unit.path: removal.unit.id for removal in fits if removal.unit.members}
    return {
        by_path[feeder]: spread_out(removal.kept, 1)
        for removal in fits
        if removal.unit.kind != "head"
        for feeder in removal.unit.feeders
        if feeder in by_path
    }


def _given(
    student: nn.Module, removal: Removal, seen: _Seen, samples: Samples, batch_size: int, sensitivity: float
) -> Rows:
    """Rows of one fit, along the student. A narrowed unit also makes up for what its shortcut has lost before it."""
    unit, index = removal.unit, seen.chosen[removal.unit.id]
    layer = module_at(student, unit.path)
    taps = {"x": Tap(unit.path, "input")}
    if unit.id in seen.sums:
        taps |= {"own": Tap(unit.path, "output"), "sum": seen.sums[unit.id]}
    for batch, y in zip(samples.batches(batch_size, seen.device), seen.wanted.pop(unit.id), strict=True):
        found = read(student, batch, taps)
        if unit.id in seen.sums:
            y = y - rows(found["sum"], unit, index) + rows(found["own"], unit, index)
        if unit.id in seen.outputs:
            y = y[:, seen.outputs[unit.id].to(y.device)]
        weight = row_weights(seen.pattern, unit, index, sensitivity, len(y) // len(index), samples.kept(batch))
        if removal.action == "narrow":
            yield input_rows(found["x"], unit, index, layer), y, weight
        else:
            yield rows(found["x"], unit, index, KERNELS[removal.action]), y, weight


def refit(
    student: nn.Module, removal: Removal, given: Iterable[tuple[Tensor, Tensor, Tensor]], *, ridge: float, rescale: bool
) -> bool:
    """Fit the layer that reads the kept members to the wanted outputs, in place; whether that could be done.

    Args:
        student: its layer reads the kept members alone.
        removal: of the unit.
        given: (inputs, wanted outputs, weights) batch by batch.
        ridge: relative to the mean diagonal; draws the weights to what they were.
        rescale: one factor per member instead of new weights; False is answered when these are not to be trusted.
    """
    layer = module_at(student, removal.unit.path)
    matrix, bias = matrix_of(layer).detach(), bias_of(layer)
    if not removal.kept:
        matrix = matrix.new_zeros(len(matrix), 0)
    moments = Moments(matrix.shape[1], matrix.shape[0], matrix.device)
    for x, y, weight in given:
        moments.add(x, y, weight)
    if rescale and removal.kept:
        size = matrix.shape[1] // len(removal.kept)
        factors = rescaled(moments, matrix, bias, size)
        if factors is not None:
            set_matrix(layer, matrix * factors.repeat_interleave(size), None)
        return factors is not None
    if not rescale:
        set_matrix(layer, *moments.solve(matrix, bias, ridge, free_bias=layer.bias is not None))
    return True


def replay(model: nn.Module, removals: Sequence[Removal], state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the stock model with the removals made and the weights in ``state`` loaded: how artifacts come back.

    Which stand-ins were folded away, and which readers got a bias by that, is seen in the names of the weights.

    Raises:
        RuntimeError: the weights do not fit (torch's own message names the keys).
    """
    student = cut(model, removals)
    for removal in removals:
        path = removal.unit.path
        if removal.action in KERNELS and any(key.startswith(f"{path}.") for key in state):
            put(student, removal.unit, WHOLE.stand_in(removal.unit, removal.action))
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
