"""Closed forms for members of a layer: which of them the others can stand in for, and how the others then answer.

The layer behind them computes ``y = W h + b``. Without some of the inputs ``h`` it is fitted again to the same ``y``:
ridge least squares on what the kept inputs say. All sums are float64 and need one pass; what a choice of members costs
after this repair follows from them without any further pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.models.modules import module_at
from ttmpd.records import WidthUnit
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.surgery.layers import columns


@dataclass(frozen=True, slots=True, eq=False)
class MemberChoice:
    """The members to keep for one width, and what is lost after the repair.

    Args:
        kept: members, in rising order.
        error: share of the layer's output energy that the kept members cannot say.
        weight: (n_outputs, n_kept) the fitted layer, and its bias (n_outputs,).
    """

    kept: tuple[int, ...]
    error: float
    weight: Tensor
    bias: Tensor


def select_members(
    moments: NormalEquations, matrix: Tensor, bias: Tensor, members: int, widths: Sequence[int], ridge: float
) -> list[MemberChoice]:
    """The members to keep for every width, from a layer's own inputs alone.

    From width to width the members go that the others, fitted anew, can best stand in for: the saliency of member
    ``i`` is ``w_i' (P_ii)^-1 w_i`` with ``P`` the inverse of the inputs' second moments and ``w`` the weights fitted so
    far. Within one step they are taken as independent.

    Args:
        moments: of the layer's inputs with its own outputs.
        matrix: (n_outputs, n_inputs), the layer's weight.
        bias: (n_outputs,).
        members: heads, neurons or channels, each as many inputs wide.
        widths: numbers of members, falling.
        ridge: relative to the mean diagonal.

    Source: optimal brain surgeon (Hassibi and Stork, 1993) for the outputs of one layer, in steps.
    Cost: one inverse of the moments and one update a width; no pass.
    """
    size = moments.n_inputs // members
    old = torch.cat([matrix.double().T, bias.double()[None]]).to(moments.gram)  # (inputs + 1, outputs)
    inverse = moments.inverse(ridge)
    weight, alive = old.clone(), torch.arange(members)
    rows = moments.gram[-1, -1].clamp_min(1e-12)
    energy = float((old * (moments.gram @ old)).sum() - moments.cross[-1].square().sum() / rows)
    lost, found = 0.0, []
    for width in widths:
        n_gone = len(alive) - width
        saliency = _saliency(inverse, weight, size)
        order = saliency.argsort()
        going = _rows(order[:n_gone], size)
        constant = torch.tensor([len(weight) - 1], device=order.device)
        staying = torch.cat([_rows(order[n_gone:].sort().values, size), constant])
        # Eliminate the inputs that go: weights and inverse of those that stay follow by block elimination.
        corner = inverse[going][:, going]
        step = torch.linalg.solve(corner, weight[going])
        lost += float((weight[going] * step).sum())
        weight = weight[staying] - inverse[staying][:, going] @ step
        inverse = inverse[staying][:, staying] - inverse[staying][:, going] @ torch.linalg.solve(
            corner, inverse[going][:, staying]
        )
        alive = alive[order[n_gone:].sort().values.cpu()]
        error = max(0.0, lost / max(energy, 1e-12))
        found.append(MemberChoice(tuple(alive.tolist()), error, weight[:-1].T.to(matrix), weight[-1].to(matrix)))
    return found


def _rows(members: Tensor, size: int) -> Tensor:
    return (members[:, None] * size + torch.arange(size, device=members.device)).flatten()


def _saliency(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """(members,) what the error grows by when one member goes and all others are fitted anew."""
    n = len(weight) - 1
    if size == 1:
        alone: Tensor = weight[:n].square().sum(1) / inverse.diagonal()[:n].clamp_min(1e-30)
        return alone
    blocks = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, n, size)])
    parts = weight[:n].view(n // size, size, -1)
    together: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return together


def narrowed_output(model: nn.Module, unit: WidthUnit, choice: MemberChoice) -> Callable[[Tensor], Tensor]:
    """What the layer at ``unit.path`` answers to all its inputs once only the kept members speak."""
    index, layer = columns(model, unit, choice.kept), module_at(model, unit.path)
    weight, bias = choice.weight, choice.bias

    def answer(h: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            kernel = weight.reshape(len(weight), -1, *layer.kernel_size)
            given = h[:, index.to(h.device)]
            return nn.functional.conv2d(given, kernel, bias, layer.stride, layer.padding, layer.dilation)
        return nn.functional.linear(h[..., index.to(h.device)], weight, bias)

    return answer
