"""TT-MPD's two variables: damage and closed-form repaired damage, without any training."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.method import check_range
from ttmpd.modules import call, evaluating, find_feature_tap, tapped
from ttmpd.progress import track
from ttmpd.records import Action, Samples, Score, Tap, Unit
from ttmpd.repair import LinearMap, NormalEquations, positions, rows
from ttmpd.score.base import Scorer
from ttmpd.tails import distances, teacher_tails


class TTMPD(Scorer):
    """Harm of a stand-in = repaired damage; harm of dropping = repaired damage and a share of the rest.

    *Damage* is how far the final features and the predictions move when the unit is dropped; *repaired damage* is the
    same with the unit replaced by its best linear stand-in, a ridge regression on the unit's inputs and outputs. What
    no linear map repairs, a short distillation does not repair either.
    """

    source: ClassVar[str] = (
        "TT-MPD (arXiv 2412.07114): two variables that approximate the fine-tuned accuracy; "
        "their formulas are not public, these are this project's own, chosen by rank correlation"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    actions: ClassVar[tuple[Action, ...]] = ("drop", "linear")
    ridge: float = 1e-3
    """Relative to the mean diagonal of the normal equations."""
    max_samples: int = 256
    """Samples in the fit; as many positions of each enter as `repair.MAX_POSITIONS`."""
    tail_samples: int = 128
    """Samples on which the distances are measured."""
    drop_share: float = 0.1
    """How much of the damage that a stand-in would repair still counts when the unit is dropped and trained."""
    sensitivity: float = 0.9
    """Weight of each position by its squared gradient: 0 counts all alike, 1 trusts the gradients alone."""

    def __post_init__(self) -> None:
        check_range("ttmpd.ridge", self.ridge, 0.0)
        check_range("ttmpd.max_samples", self.max_samples, 1)
        check_range("ttmpd.tail_samples", self.tail_samples, 1)
        check_range("ttmpd.drop_share", self.drop_share, 0.0, 1.0)
        check_range("ttmpd.sensitivity", self.sensitivity, 0.0, 1.0)

    def score(
        self, teacher: nn.Module, units: Sequence[Unit], samples: Samples, *, batch_size: int = 64, seed: int = 0
    ) -> tuple[Score, ...]:
        """Two scores per unit, "drop" and "linear".

        Cost: one teacher pass with gradients for the fits, one without, and two runs of the layers behind each unit.
        """
        if not units:
            return ()
        fits = fit_stand_ins(
            teacher, units, _first(samples, self.max_samples), self.ridge, self.sensitivity, batch_size, seed
        )
        found = teacher_tails(
            teacher,
            units,
            _first(samples, self.tail_samples),
            {"drop": lambda _unit, x: x, "linear": lambda unit, x: fits[unit.id](unit, x)},
            batch_size=batch_size,
        )
        scores: list[Score] = []
        for unit in units:
            damage, repaired = distances(found[unit.id, "drop"]), distances(found[unit.id, "linear"])
            parts = {"damage": damage, "repaired_damage": repaired}
            parts |= {f"damage_{name}": value for name, value in found[unit.id, "drop"].items()}
            parts |= {f"repaired_{name}": value for name, value in found[unit.id, "linear"].items()}
            scores.append(Score(unit.id, "drop", repaired + self.drop_share * max(0.0, damage - repaired), parts))
            scores.append(Score(unit.id, "linear", repaired, parts))
        return tuple(scores)


def _first(samples: Samples, n: int) -> Samples:
    return samples.subset(range(min(n, len(samples))))


def fit_stand_ins(
    teacher: nn.Module,
    units: Sequence[Unit],
    samples: Samples,
    ridge: float,
    sensitivity: float,
    batch_size: int,
    seed: int,
) -> dict[str, LinearMap]:
    """The best linear stand-in of every unit on the teacher's own inputs, in one pass over the samples.

    Rows are weighted by ``1 - sensitivity + sensitivity x g / mean(g)``, g the squared gradient of random projections
    of the final features at that position: only [CLS] of a last layer matters, say.
    """
    device = next(teacher.parameters()).device
    equations = {unit.id: NormalEquations(unit.channels, device) for unit in units}
    chosen = {unit.id: positions(unit, seed) for unit in units}
    tap = find_feature_tap(teacher, samples.batch(slice(0, 2), device), pooled=True)
    n_batches = -(-len(samples) // batch_size)
    for batch in track(samples.batches(batch_size, device), "fit", n_batches):
        inputs, outputs, weights = _observe(teacher, units, batch, tap, sensitivity, seed)
        for unit in units:
            index = chosen[unit.id]
            x, y = rows(inputs[unit.id], unit, index), rows(outputs[unit.id], unit, index)
            weight = weights.get(unit.id)
            equations[unit.id].add(x, y, None if weight is None else rows_of_weights(weight, index))
    return {unit.id: equations[unit.id].solve(ridge) for unit in units}


def rows_of_weights(weight: Tensor, index: Tensor) -> Tensor:
    """(B, positions) weights at the chosen positions, flat like :func:`ttmpd.repair.rows`."""
    return weight[:, index.to(weight.device)].flatten()


def _observe(
    teacher: nn.Module, units: Sequence[Unit], batch: Tensor, tap: Tap | None, sensitivity: float, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, outputs and position weights (B, positions) of every unit for one batch."""
    taps = {f"x {u.id}": Tap(u.path, "input") for u in units} | {f"y {u.id}": Tap(u.path, "output") for u in units}
    if tap is not None:
        taps["features"] = tap
    with evaluating(teacher, gradients=sensitivity > 0), tapped(teacher, taps) as seen:
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        source = batch.clone().requires_grad_(sensitivity > 0)
        logits = call(teacher, source)
        if sensitivity > 0 and not logits.requires_grad:  # tokens have no gradients
            for parameter in teacher.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            logits = call(teacher, source)
        final = seen.get("features", logits)
        weights: dict[str, Tensor] = {}
        if sensitivity > 0:
            answers = [seen[f"y {u.id}"] for u in units]
            generator = torch.Generator().manual_seed(seed)
            # Signs drawn per sample: one backward pass projects every sample's features onto its own direction.
            signs = torch.randint(0, 2, final.shape, generator=generator).to(final) * 2 - 1
            gradients = torch.autograd.grad((final * signs).sum(), answers, allow_unused=True)
            for unit, gradient in zip(units, gradients, strict=True):
                if gradient is not None:
                    weights[unit.id] = _position_weights(gradient, unit, sensitivity)
    inputs = {u.id: seen[f"x {u.id}"].detach() for u in units}
    return inputs, {u.id: seen[f"y {u.id}"].detach() for u in units}, weights


def _position_weights(gradient: Tensor, unit: Unit, sensitivity: float) -> Tensor:
    if unit.layout == "channels_first":
        energy = gradient.flatten(2).square().mean(1)
    else:
        energy = gradient.reshape(len(gradient), -1, unit.channels).square().mean(2)
    # Sample by sample the projection is random: only the pattern over positions, averaged over samples, is kept.
    pattern = energy.mean(0, keepdim=True)
    return (1 - sensitivity + sensitivity * pattern / pattern.mean().clamp_min(1e-30)).expand_as(energy)
