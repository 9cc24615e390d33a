"""Fit one layer to given rows in closed form: ridge least squares, pulled towards the weights that it has.

Where the output is clipped afterwards (ReLU), only targets that are not clipped must be met; for the others any value
that is clipped as well will do. A batch norm behind the layer is fitted together with it. The strength of the ridge is
chosen on rows of samples that the fit has not seen; if no strength is better there than the old weights, they stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.repair.refit_points import RefitPoint
from ttmpd.surgery.layers import bias_of, matrix_of, set_matrix

MAX_FACTOR = 10.0
"""Rescaling factors beyond this are not trusted (Kwon et al., 2022)."""


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried, relative to the mean diagonal of the normal equations."""


HELD_OUT_SHARE = 0.25
"""Share of the rows on which the strengths are compared: those of the last samples."""


CLIPPED_ROUNDS = 2
"""How often the targets that are clipped are updated, with a fit after each."""


@dataclass(frozen=True, eq=False)
class FitRows:
    """The rows of one fit.

    Args:
        x: (rows, inputs), the layer's inputs in the student.
        targets: (rows, outputs), the teacher's output, or the sum of that and its shortcut.
        residual: (rows, outputs), what the student adds to the layer's output; (1, 1) zero where nothing is added.
        weight: (rows,).
    """

    x: Tensor
    targets: Tensor
    residual: Tensor
    weight: Tensor

    def part(self, where: slice) -> "FitRows":
        """Some of the rows."""
        residual = self.residual[where] if len(self.residual) > 1 else self.residual
        return FitRows(self.x[where], self.targets[where], residual, self.weight[where])


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer and the batch norm behind it as one affine map, whose weights are fitted.

    Args:
        matrix: (outputs, inputs).
        bias: (outputs,).
        free_bias: the bias can change.
        activation: the clipping behind it, see :class:`RefitPoint`.
    """

    matrix: Tensor
    bias: Tensor
    free_bias: bool
    activation: str

    def fitted(self, equations: NormalEquations, ridge: float, rows: FitRows) -> "_Layer":
        """The layer fitted with a ridge; targets behind a clipping are updated ``CLIPPED_ROUNDS`` times."""
        solve = equations.solver(self.matrix, self.bias, self.free_bias)(ridge)
        new = self.with_weights(*solve())
        for _ in range(CLIPPED_ROUNDS if self.activation else 0):
            equations.set_targets(*new.equation_rows(rows))
            new = self.with_weights(*solve())
        return new

    def with_weights(self, matrix: Tensor, bias: Tensor | None) -> "_Layer":
        """A layer with these weights; without a bias it keeps the one it has."""
        return _Layer(matrix, self.bias if bias is None else bias, self.free_bias, self.activation)

    def equation_rows(self, rows: FitRows) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, targets of the layer alone before clipping, weights)."""
        targets = self._unclipped(rows, self._sum(rows)) if self.activation else rows.targets
        return rows.x, targets - rows.residual, rows.weight

    def error(self, rows: FitRows) -> float:
        """Weighted squared error on the rows, where output and target are not clipped alike."""
        output = self._sum(rows)
        return float(((output - self._unclipped(rows, output)).square().sum(1) * rows.weight).sum())

    def _sum(self, rows: FitRows) -> Tensor:
        """Output of the layer, with its shortcut."""
        return rows.x @ self.matrix.T + self.bias + rows.residual

    def _unclipped(self, rows: FitRows, output: Tensor) -> Tensor:
        """Targets of the sum before clipping: where a target is clipped, ``output`` if that is clipped, too."""
        targets = rows.targets
        if self.activation == "relu6":
            targets = torch.where(targets >= 6, output.clamp_min(6), targets)
        return torch.where(rows.targets <= 0, output.clamp_max(0), targets) if self.activation else targets


def refit(student: nn.Module, point: RefitPoint, rows: FitRows, ridge: float | None = None) -> None:
    """Fit the layer of a point, and the batch norm behind it, to the rows, in place.

    Args:
        student: holds the layer.
        point: names the layer.
        rows: ordered by sample.
        ridge: relative to the mean diagonal of the normal equations; None tries ``RIDGES`` on three quarters of the
            rows, takes the best on the others, and leaves the layer as it is if none lowers the error there.
    """
    layer = module_at(student, point.layer)
    norm = module_at(student, point.norm) if point.norm else None
    old = _Layer(matrix_of(layer).detach(), bias_of(layer), layer.bias is not None, point.activation)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        old = _with_norm(norm, old)
    equations = NormalEquations(old.matrix.shape[1], len(old.matrix), old.matrix.device)
    if ridge is None:
        n_fit = len(rows.x) - max(1, round(HELD_OUT_SHARE * len(rows.x)))
        held_out = rows.part(slice(n_fit, None))
        equations.add(*old.equation_rows(rows.part(slice(n_fit))))
        ridge = _best_ridge(old, equations, held_out)
        if ridge is None:
            return
        equations.add(*old.equation_rows(held_out))
    else:
        equations.add(*old.equation_rows(rows))
    new = old.fitted(equations, ridge, rows)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        _set_layer_and_norm(layer, norm, new, rows.x)
    else:
        set_matrix(layer, new.matrix, new.bias if old.free_bias else None)


def _best_ridge(old: _Layer, equations: NormalEquations, held_out: FitRows) -> float | None:
    """The ridge with the least error on the held-out rows; None when the old layer is better still."""
    solver = equations.solver(old.matrix, old.bias, old.free_bias)
    errors = {ridge: old.with_weights(*solver(ridge)()).error(held_out) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: errors[ridge])
    return best if errors[best] < old.error(held_out) else None


def _with_norm(norm: nn.modules.batchnorm._BatchNorm, layer: _Layer) -> _Layer:
    """A layer and the batch norm behind it as one affine map."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    bias = (layer.bias - norm.running_mean) * scale + norm.bias.detach()
    return _Layer(layer.matrix * scale[:, None], bias, True, layer.activation)


def _set_layer_and_norm(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm, new: _Layer, x: Tensor) -> None:
    """Split one affine map into a layer and the batch norm behind it, in place.

    The running statistics become those of the layer's new output, so that training, which uses the batch's, starts from
    the same function; the rows of the weight keep their length, on which the size of training steps depends.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    factors = matrix_of(layer).detach().norm(dim=1) / new.matrix.norm(dim=1).clamp_min(1e-12)
    matrix = new.matrix * factors[:, None]
    outputs = x @ matrix.T
    mean, variance = outputs.mean(0), outputs.var(0, unbiased=False)
    set_matrix(layer, matrix, None if layer.bias is None else torch.zeros_like(mean))
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() / factors)
        norm.bias.copy_(new.bias + mean / factors)


def rescale_members(student: nn.Module, point: RefitPoint, rows: FitRows) -> bool:
    """Multiply each member that the layer reads by a factor, in place; False if the factors cannot be trusted."""
    if not point.n_members:
        return True
    layer = module_at(student, point.layer)
    matrix, bias = matrix_of(layer).detach(), bias_of(layer)
    equations = NormalEquations(matrix.shape[1], len(matrix), matrix.device)
    equations.add(rows.x, rows.targets - rows.residual, rows.weight)
    size = matrix.shape[1] // point.n_members
    factors = member_factors(equations, matrix, bias, size)
    if factors is not None:
        set_matrix(layer, matrix * factors.repeat_interleave(size), None)
    return factors is not None


def member_factors(
    equations: NormalEquations, matrix: Tensor, bias: Tensor, size: int, damp: float = 1.0
) -> Tensor | None:
    """(members,) factors for groups of ``size`` inputs of a layer; None when they cannot be trusted.

    Args:
        equations: of the targets on the layer's inputs.
        matrix: (n_outputs, n_inputs), the layer's weight.
        bias: (n_outputs,), which stays.
        size: inputs of one member.
        damp: pulls the factors towards 1.

    Source: KCM (ICML 2023) and Kwon et al. (NeurIPS 2022), equation 12: ``A^T A = (W W^T) * (H H^T)``, damped least
    squares for the change from 1; here solved directly instead of by LSMR.
    """
    device, n = equations.sum_device, equations.n_inputs
    weight = matrix.double().T.to(device)  # (inputs, outputs)
    members = n // size
    # A'A and A'(B - A 1) of the contributions A of each group, from the sums alone.
    system = (equations.gram[:n, :n] * (weight @ weight.T)).view(members, size, members, size).sum((1, 3))
    targets = equations.cross[:n] - equations.gram[:n, n:] * bias.double().to(device)
    right = (targets * weight).sum(1).view(members, size).sum(1) - system.sum(1)
    system.diagonal().add_(damp**2)
    factors = 1 + torch.linalg.solve(system, right)
    is_trusted = bool(torch.isfinite(factors).all()) and float(factors.abs().max()) <= MAX_FACTOR
    return factors.to(matrix) if is_trusted else None
