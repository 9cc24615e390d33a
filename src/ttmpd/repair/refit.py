"""Fit one layer to given rows, in closed form: ridge least squares, drawn to the weights that it has.

Behind a clipping (ReLU) only what is not clipped is wanted to the value: of the rest any will do that is clipped, too.
A batch norm behind the layer is fitted with it, as one. How strongly weights are drawn to what they were is decided on
rows of samples that the fit has not seen; where nothing is better there than the old weights, they stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.repair.refit_points import RefitPoint
from ttmpd.surgery.layers import bias_of, matrix_of, set_matrix

RANGE = 10.0
"""Rescaling factors beyond this are not trusted (Kwon et al., 2022)."""


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The strengths that are tried, relative to the mean diagonal of the normal equations."""


UNSEEN = 0.25
"""Share of the rows on which they are judged: those of the last samples."""


CLIPPED_ROUNDS = 2
"""How often what is wanted behind a clipping is set anew."""


@dataclass(frozen=True, eq=False)
class FitRows:
    """The rows of one fit.

    Args:
        x: (rows, inputs), what the layer reads in the student.
        wanted: (rows, outputs), the teacher's answer, or its sum with the shortcut.
        shortcut: (rows, outputs), what the student adds to the layer's answer; (1, 1) zero where nothing is added.
        weight: (rows,).
    """

    x: Tensor
    wanted: Tensor
    shortcut: Tensor
    weight: Tensor

    def part(self, where: slice) -> "FitRows":
        """Some of the rows."""
        shortcut = self.shortcut[where] if len(self.shortcut) > 1 else self.shortcut
        return FitRows(self.x[where], self.wanted[where], shortcut, self.weight[where])


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What is fitted: the weight (outputs, inputs) and bias of a layer and the batch norm behind it, as one.

    ``free_bias`` says whether there is a bias that can change; ``activation`` is the clipping behind.
    """

    matrix: Tensor
    bias: Tensor
    free_bias: bool
    activation: str

    def fitted(self, moments: NormalEquations, ridge: float, given: FitRows) -> "_Layer":
        """The layer that a ridge leads to; what is wanted behind a clipping is set anew a few times."""
        solve = moments.solver(self.matrix, self.bias, self.free_bias)(ridge)
        new = self.changed(*solve())
        for _ in range(CLIPPED_ROUNDS if self.activation else 0):
            moments.want(*new.rows(given))
            new = self.changed(*solve())
        return new

    def changed(self, matrix: Tensor, bias: Tensor | None) -> "_Layer":
        """The same with other weights."""
        return _Layer(matrix, self.bias if bias is None else bias, self.free_bias, self.activation)

    def rows(self, given: FitRows) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, what is wanted of the layer alone and unclipped, weights)."""
        wanted = self._unclipped(given, self._sum(given)) if self.activation else given.wanted
        return given.x, wanted - given.shortcut, given.weight

    def error(self, given: FitRows) -> float:
        """Weighted squared error on the rows, of what is not clipped alike."""
        own = self._sum(given)
        return float(((own - self._unclipped(given, own)).square().sum(1) * given.weight).sum())

    def _sum(self, given: FitRows) -> Tensor:
        """What the layer answers, with its shortcut."""
        return given.x @ self.matrix.T + self.bias + given.shortcut

    def _unclipped(self, given: FitRows, own: Tensor) -> Tensor:
        """What is wanted of ``own``, the sum of the layer and its shortcut, before it is clipped."""
        wanted = given.wanted
        if self.activation == "relu6":
            wanted = torch.where(wanted >= 6, own.clamp_min(6), wanted)
        return torch.where(given.wanted <= 0, own.clamp_max(0), wanted) if self.activation else wanted


def refit(student: nn.Module, site: RefitPoint, given: FitRows, ridge: float | None = None) -> None:
    """Fit the layer of a site, and the batch norm behind it, to the rows, in place.

    Args:
        student: holds the layer.
        site: where.
        given: the rows, sample by sample.
        ridge: relative to the mean diagonal of the normal equations; None tries ``RIDGES`` on three quarters of the
            rows, takes the best on the others, and leaves the layer as it is where none does any good.
    """
    layer = module_at(student, site.layer)
    norm = module_at(student, site.norm) if site.norm else None
    old = _Layer(matrix_of(layer).detach(), bias_of(layer), layer.bias is not None, site.activation)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        old = _through(norm, old)
    moments = NormalEquations(old.matrix.shape[1], len(old.matrix), old.matrix.device)
    if ridge is None:
        n_seen = len(given.x) - max(1, round(UNSEEN * len(given.x)))
        unseen = given.part(slice(n_seen, None))
        moments.add(*old.rows(given.part(slice(n_seen))))
        ridge = _best_ridge(old, moments, unseen)
        if ridge is None:
            return
        moments.add(*old.rows(unseen))
    else:
        moments.add(*old.rows(given))
    new = old.fitted(moments, ridge, given)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        _set_normed(layer, norm, new, given.x)
    else:
        set_matrix(layer, new.matrix, new.bias if old.free_bias else None)


def _best_ridge(old: _Layer, seen: NormalEquations, unseen: FitRows) -> float | None:
    """The ridge whose fit to the seen rows is best on the others; None when the old layer is better still."""
    solver = seen.solver(old.matrix, old.bias, old.free_bias)
    errors = {ridge: old.changed(*solver(ridge)()).error(unseen) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: errors[ridge])
    return best if errors[best] < old.error(unseen) else None


def _through(norm: nn.modules.batchnorm._BatchNorm, layer: _Layer) -> _Layer:
    """A layer and the batch norm behind it as one."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    bias = (layer.bias - norm.running_mean) * scale + norm.bias.detach()
    return _Layer(layer.matrix * scale[:, None], bias, True, layer.activation)


def _set_normed(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm, new: _Layer, x: Tensor) -> None:
    """Give a layer and the batch norm behind it the weight and bias that they have as one.

    The statistics become those of what the layer now answers, so that training, which uses the batch's, starts from the
    same function; the weights keep the length they had, on which the steps of training depend.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    times = matrix_of(layer).detach().norm(dim=1) / new.matrix.norm(dim=1).clamp_min(1e-12)
    matrix = new.matrix * times[:, None]
    answers = x @ matrix.T
    mean, variance = answers.mean(0), answers.var(0, unbiased=False)
    set_matrix(layer, matrix, None if layer.bias is None else torch.zeros_like(mean))
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() / times)
        norm.bias.copy_(new.bias + mean / times)


def rescale_members(student: nn.Module, site: RefitPoint, given: FitRows) -> bool:
    """Give each member that the layer reads one factor, in place; whether the factors are to be trusted."""
    if not site.members:
        return True
    layer = module_at(student, site.layer)
    matrix, bias = matrix_of(layer).detach(), bias_of(layer)
    moments = NormalEquations(matrix.shape[1], len(matrix), matrix.device)
    moments.add(given.x, given.wanted - given.shortcut, given.weight)
    size = matrix.shape[1] // site.members
    factors = rescaled(moments, matrix, bias, size)
    if factors is not None:
        set_matrix(layer, matrix * factors.repeat_interleave(size), None)
    return factors is not None


def rescaled(moments: NormalEquations, old: Tensor, old_bias: Tensor, size: int, damp: float = 1.0) -> Tensor | None:
    """(members,) factors for groups of ``size`` inputs of a layer, its bias kept; None when they cannot be trusted.

    Args:
        moments: of what the layer reads, with the outputs that are wanted of it.
        old: (n_outputs, n_inputs), the layer's weight.
        old_bias: (n_outputs,).
        size: inputs of one member.
        damp: draws the factors to 1.

    Source: KCM (ICML 2023) and Kwon et al. (NeurIPS 2022), equation 12: ``A^T A = (W W^T) * (H H^T)``, damped least
    squares for the change from 1; here solved directly instead of by LSMR.
    """
    weight, bias = old.double().T.to(moments.at), old_bias.double().to(moments.at)  # (inputs, outputs)
    n = moments.n_inputs
    members = n // size
    # A'A and A'(B - A 1) of the contributions A of each group, from the moments alone.
    system = (moments.gram[:n, :n] * (weight @ weight.T)).view(members, size, members, size).sum((1, 3))
    wanted = moments.cross[:n] - moments.gram[:n, n:] * bias
    right = (wanted * weight).sum(1).view(members, size).sum(1) - system.sum(1)
    system.diagonal().add_(damp**2)
    factors = 1 + torch.linalg.solve(system, right)
    trusted = bool(torch.isfinite(factors).all()) and float(factors.abs().max()) <= RANGE
    return factors.to(old) if trusted else None
