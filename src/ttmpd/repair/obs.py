"""Optimal Brain Surgeon for the members of a layer: which of them to keep, and the weights that then fit best.

The layer that reads the members computes ``y = W h + b``. Without some of its inputs ``h`` it is fitted to the same
``y`` again, by ridge least squares on the members that stay. All sums are in float64 and need one pass; the error of
every choice of members after this repair follows from them without another pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.records import WidthUnit
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.surgery.layers import columns, n_axes


@dataclass(frozen=True, slots=True, eq=False)
class MemberChoice:
    """The members that stay at one width, and the layer that reads them after its repair.

    Args:
        members: those that stay, in rising order.
        error: squared error of the repaired layer, as a share of the energy of its output.
        weight: (n_outputs, n_inputs of the members) of the repaired layer.
        bias: (n_outputs,) of the repaired layer.
    """

    members: tuple[int, ...]
    error: float
    weight: Tensor
    bias: Tensor


def select_members(
    equations: NormalEquations, matrix: Tensor, bias: Tensor, n_members: int, widths: Sequence[int], ridge: float
) -> list[MemberChoice]:
    """The members to keep at every width, from the layer's inputs and outputs alone.

    Going from one width to the next, the members of least saliency are removed: that of member ``i`` is
    ``w_i' (P_ii)^-1 w_i``, where ``P`` is the inverse of the inputs' second moments and ``w`` the weights fitted so
    far. Within one step the members are treated as independent.

    Args:
        equations: of the layer's outputs on its inputs.
        matrix: (n_outputs, n_inputs), the layer's weight.
        bias: (n_outputs,).
        n_members: heads, neurons or channels; all have the same number of inputs.
        widths: numbers of members, falling.
        ridge: relative to the mean diagonal of the second moments.

    Source: optimal brain surgeon (Hassibi and Stork, 1993) for the outputs of one layer, in steps.
    Cost: one inverse of the second moments, and one update of it per width; no forward pass.
    """
    size = equations.n_inputs // n_members
    original = torch.cat([matrix.double().T, bias.double()[None]]).to(equations.gram)  # (inputs + 1, outputs)
    n_rows = equations.gram[-1, -1].clamp_min(1e-12)
    energy = float((original * (equations.gram @ original)).sum() - equations.cross[-1].square().sum() / n_rows)
    inverse = equations.inverse(ridge)
    weight, members = original.clone(), torch.arange(n_members)
    lost, selected = 0.0, []
    for width in widths:
        order = _saliency(inverse, weight, size).argsort()
        n_removed = len(members) - width
        staying = order[n_removed:].sort().values
        weight, inverse, error = _eliminated(weight, inverse, _inputs(order[:n_removed], size), _inputs(staying, size))
        lost += error
        members = members[staying.cpu()]
        share = max(0.0, lost / max(energy, 1e-12))
        selected.append(MemberChoice(tuple(members.tolist()), share, weight[:-1].T.to(matrix), weight[-1].to(matrix)))
    return selected


def largest_members(
    energies: Tensor, matrix: Tensor, bias: Tensor, n_members: int, widths: Sequence[int]
) -> list[MemberChoice]:
    """The members to keep at every width where the layer cannot be fitted: those that add most to its output.

    Args:
        energies: (n_inputs,) summed squares of the layer's inputs.
        matrix: (n_outputs, n_inputs), the layer's weight, which stays.
        bias: (n_outputs,), which stays.
        n_members: heads, neurons or channels; all have the same number of inputs.
        widths: numbers of members, falling.

    Cost: one product; the error takes the members as independent.
    """
    size = len(energies) // n_members
    shares = (matrix.double().square().sum(0).to(energies) * energies).view(n_members, size).sum(1)
    order, total = shares.argsort(descending=True, stable=True), float(shares.sum())
    choices = []
    for width in widths:
        members = order[:width].sort().values
        lost = float(shares[order[width:]].sum()) / max(total, 1e-12)
        kept_inputs = _inputs(members, size).to(matrix.device)
        choices.append(MemberChoice(tuple(members.tolist()), lost, matrix[:, kept_inputs], bias))
    return choices


def _inputs(members: Tensor, size: int) -> Tensor:
    """Numbers of the inputs that belong to the members."""
    return (members[:, None] * size + torch.arange(size, device=members.device)).flatten()


def _saliency(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """(members,) growth of the squared error when one member is removed and all others are fitted again."""
    n = len(weight) - 1
    if size == 1:
        single: Tensor = weight[:n].square().sum(1) / inverse.diagonal()[:n].clamp_min(1e-30)
        return single
    blocks = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, n, size)])
    weights = weight[:n].view(n // size, size, -1)
    grouped: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
    return grouped


def _eliminated(weight: Tensor, inverse: Tensor, removed: Tensor, staying: Tensor) -> tuple[Tensor, Tensor, float]:
    """(weight, inverse, added squared error) for the inputs that stay, by block elimination of the others.

    The last row of ``weight`` and of ``inverse`` is that of the bias, which stays.
    """
    staying = torch.cat([staying, torch.tensor([len(weight) - 1], device=staying.device)])
    corner = inverse[removed][:, removed]
    step = torch.linalg.solve(corner, weight[removed])
    update = inverse[staying][:, removed] @ torch.linalg.solve(corner, inverse[removed][:, staying])
    error = float((weight[removed] * step).sum())
    return weight[staying] - inverse[staying][:, removed] @ step, inverse[staying][:, staying] - update, error


def narrowed_output(model: nn.Module, unit: WidthUnit, choice: MemberChoice) -> Callable[[Tensor], Tensor]:
    """A function of all inputs of the layer at ``unit.path`` that returns the repaired layer's output."""
    index, layer = columns(model, unit, choice.members), module_at(model, unit.path)
    weight, bias = choice.weight, choice.bias

    def output(h: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            kernel = weight.reshape(len(weight), -1, *layer.kernel_size)
            inputs = h[:, index.to(h.device)]
            return nn.functional.conv2d(inputs, kernel, bias, layer.stride, layer.padding, layer.dilation)
        axis = 1 if n_axes(layer) else -1
        inputs = h.movedim(axis, -1)[..., index.to(h.device)]
        return nn.functional.linear(inputs, weight, bias).movedim(-1, axis)

    return output
