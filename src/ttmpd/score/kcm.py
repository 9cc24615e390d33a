"""KCM: representative neurons from the weights alone, times how active they are; no gradients, no labels."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError
from ttmpd.method import check_fields
from ttmpd.models.modules import module_at
from ttmpd.models.run import evaluating
from ttmpd.models.taps import Tap, read_taps
from ttmpd.progress import track
from ttmpd.records import Action, RefitScope, Scope, Score, Unit, WidthUnit
from ttmpd.score.base import Scorer, ScoringInputs, scores_by_importance
from ttmpd.surgery.layers import is_layer, matrix_of

_TINY = 1e-30


class KCM(Scorer):
    """R2D2: how much a neuron is needed to represent the others, times the norm of its activations.

    R2 runs the multiplicative update of a kernel convex matrix factorisation on the columns of the layer that reads the
    neurons and reads its diagonal; D2 is the root mean of the squared activations over the tokens of a batch, averaged
    over batches. Both are scaled to 0..1 within a layer, so neurons of all layers can be compared.
    """

    source: ClassVar[str] = (
        "KCM / R2D2 (Nova, Dai, Schuurmans, ICML 2023); iterations are bounded, members go in steps (`neuron.parts`) "
        "instead of one by one, and heads are scored too, all columns of one as a point"
    )
    actions: ClassVar[tuple[Action, ...]] = ()
    scopes: ClassVar[tuple[Scope, ...]] = ("width",)
    refit_scope: ClassVar[RefitScope] = "rescale"
    sigma: float = 1.0
    """Width of the Gaussian kernel; 0 takes the median distance of the rows over the root of two, for rows whose norms
    are far from 1."""
    alpha: float = 0.01
    """Relative change at which the update stops. It regularises: at the optimum every neuron represents itself."""
    max_iterations: int = 200
    parts: str = "r2d2"
    """"r2d2", or one of its factors alone: "r2", "d2"."""

    def __post_init__(self) -> None:
        check_fields(self, sigma=0.0, alpha=1e-9, max_iterations=1)
        if self.parts not in ("r2d2", "r2", "d2"):
            raise InvalidValueError(f"kcm.parts must be r2d2, r2 or d2, but got {self.parts!r}")

    def can_judge(self, model: nn.Module, unit: Unit) -> bool:
        """True for members that a matrix reads at every position: its columns are the points to be represented."""
        return super().can_judge(model, unit) and is_layer(module_at(model, unit.path))

    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """One score per width: the most important members stay, the harm is the summed importance of the others.

        Cost: one teacher pass; a few products of (members x members) matrices per layer.
        """
        norms = activity(inputs) if "d2" in self.parts else {}
        for unit in track(inputs.width_units, "kcm", len(inputs.units)):
            importance = torch.ones(unit.n_members)
            if "r2" in self.parts:
                points = matrix_of(module_at(inputs.teacher, unit.path)).detach().T.reshape(unit.n_members, -1)
                importance = importance * scaled(representative(points, self.sigma, self.alpha, self.max_iterations))
            if "d2" in self.parts:
                importance = importance * scaled(norms[unit.id])
            yield from scores_by_importance(unit, importance)


def representative(points: Tensor, sigma: float, alpha: float, max_iterations: int) -> Tensor:
    """(N,) diagonal of the factor C that represents the points by one another in a Gaussian feature space.

    ``C <- C * sqrt(K / (K C))`` from ``C = 1/N``, until the sum of C changes by less than ``alpha`` of it. Points with
    near duplicates end at about one over their number, isolated ones at about one.

    Args:
        points: (N, width).
        sigma: of the kernel ``exp(-|a - b|^2 / sigma^2)``; 0 takes the median distance over the root of two.
        alpha: see above.
        max_iterations: bound of the update, which would not end by itself once a value is NaN.
    """
    points = points.double()
    squares = torch.cdist(points, points).square()
    width = sigma**2 if sigma > 0 else _median(squares) / 2
    kernel = torch.exp(-squares / max(width, _TINY))
    factor = torch.full_like(kernel, 1 / len(points))
    for _ in range(max_iterations):
        new = factor * (kernel / (kernel @ factor).clamp_min(_TINY)).sqrt()
        change = float((new - factor).sum().abs()) / max(float(factor.abs().sum()), _TINY)
        factor = new
        if change < alpha:
            break
    return factor.diagonal().float().cpu()


def _median(squares: Tensor) -> float:
    """Median of the squared distances between different points."""
    n = len(squares)
    away = squares[~torch.eye(n, dtype=torch.bool, device=squares.device)]
    return float(away.median()) if n > 1 else 1.0


def activity(inputs: ScoringInputs) -> dict[str, Tensor]:
    """Unit id -> (members,) norm of each member's activations over the tokens of a batch, averaged over batches."""
    taps = {unit.id: Tap(unit.path, "input") for unit in inputs.width_units}
    sums = {unit.id: torch.zeros(unit.n_members, dtype=torch.float64) for unit in inputs.width_units}
    n_batches = -(-len(inputs.samples) // inputs.batch_size)
    with evaluating(inputs.teacher):
        for batch in track(inputs.samples.batches(inputs.batch_size, inputs.device), "activity", n_batches):
            activations = read_taps(inputs.teacher, batch, taps)
            for unit in inputs.width_units:
                sums[unit.id] += _norms(activations[unit.id], unit, inputs.samples.token_mask(batch)).cpu()
    return {name: (total / max(1, n_batches)).float() for name, total in sums.items()}


def _norms(activations: Tensor, unit: WidthUnit, token_mask: Tensor | None) -> Tensor:
    """(members,) norm of each member's activations over all rows but those of padding."""
    if unit.layout == "channels_first":
        activations = activations.flatten(2).transpose(1, 2)
    rows = activations.flatten(0, -2).double()
    if token_mask is not None and token_mask.numel() == len(rows):
        rows = rows[token_mask.flatten()]
    return rows.square().sum(0).view(unit.n_members, -1).sum(1).sqrt()


def scaled(values: Tensor) -> Tensor:
    """The values mapped to 0..1 by their minimum and maximum; all ones where they are equal."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else torch.ones_like(values)
