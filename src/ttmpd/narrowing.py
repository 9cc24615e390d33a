"""Closed forms for members of a layer: which of them the others can stand in for, and how the others then answer.

The layer behind them computes ``y = W h + b``. Without some of the inputs ``h`` it is fitted again to the same ``y``:
ridge least squares on what the kept inputs say. All sums are float64 and need one pass; what a choice of members costs
after this repair follows from them without any further pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.least_squares import Moments
from ttmpd.modules import module_at
from ttmpd.records import Place, Unit
from ttmpd.units._members import columns, kernel_area, matrix_of

RANGE = 10.0
"""Rescaling factors beyond this are not trusted (Kwon et al., 2022)."""


def rescaled(moments: Moments, old: Tensor, old_bias: Tensor, size: int, damp: float = 1.0) -> Tensor | None:
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


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
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


def choices(
    moments: Moments, matrix: Tensor, bias: Tensor, members: int, widths: Sequence[int], ridge: float
) -> list[Choice]:
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
        found.append(Choice(tuple(alive.tolist()), error, weight[:-1].T.to(matrix), weight[-1].to(matrix)))
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


def bias_of(layer: nn.Module) -> Tensor:
    """The layer's bias, zeros where it has none."""
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else matrix_of(layer).new_zeros(matrix_of(layer).shape[0])


def input_rows(value: Tensor, unit: Place, index: Tensor, layer: nn.Module) -> Tensor:
    """What the layer at ``unit.path`` reads for the chosen positions of its output: (B x positions, inputs).

    The inputs of a convolution are all values under its kernel, channel by channel.
    """
    index = index.to(value.device)
    if isinstance(layer, nn.Conv2d) and (kernel_area(layer) > 1 or max(layer.stride) > 1):
        return under_kernel(value, index, layer).transpose(1, 2).flatten(0, 1)
    if unit.layout == "channels_first":
        return value.flatten(2)[:, :, index].transpose(1, 2).flatten(0, 1)
    shape = (len(value), math.prod(value.shape[1:-1]), value.shape[-1])  # the width may be zero
    return value.reshape(shape)[:, index].flatten(0, 1)


def under_kernel(value: Tensor, index: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, channels x places under the kernel, positions) of the input at flat positions of the output.

    Only what was chosen is copied: whole maps would be as many times as large as there are places under the kernel.
    """
    assert not isinstance(layer.padding, str)
    (high, wide), (down, across) = layer.padding, layer.stride
    padded = nn.functional.pad(value, (wide, wide, high, high))
    width = padded.shape[3]
    columns = (width - layer.dilation[1] * (layer.kernel_size[1] - 1) - 1) // across + 1
    corner = index // columns * down * width + index % columns * across
    rows, places = (torch.arange(n, device=index.device) for n in layer.kernel_size)
    around = (rows[:, None] * (layer.dilation[0] * width) + places * layer.dilation[1]).flatten()
    return padded.flatten(2)[:, :, corner[None] + around[:, None]].flatten(1, 2)


def narrowed_answer(model: nn.Module, unit: Unit, choice: Choice) -> Callable[[Tensor], Tensor]:
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
