"""TT-MPD's two variables: damage and closed-form repaired damage, without any training."""

import functools
from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import nn

from ttmpd.method import check_fields
from ttmpd.modules import evaluating, read
from ttmpd.progress import track
from ttmpd.records import KERNELS, Action, Samples, Score, Tap, Unit
from ttmpd.repair import LinearMap, NormalEquations, rows
from ttmpd.score.base import Job, Scorer
from ttmpd.sensitivity import SENSITIVITY_SAMPLES, positions, row_weights, sensitivities
from ttmpd.tails import Replacement, distances, teacher_tails
from ttmpd.units.block import Block


class TTMPD(Scorer):
    """Harm of a stand-in = repaired damage; harm of dropping = repaired damage and a share of the rest.

    *Damage* is how far the final features move when the unit is dropped; *repaired damage* is the
    same with the unit replaced by its best linear stand-in, a ridge regression on the unit's inputs and outputs. What
    no linear map repairs, a short distillation does not repair either. A stand-in sees one position, or the 3x3
    neighbourhood where the unit offers it.
    """

    source: ClassVar[str] = (
        "TT-MPD (arXiv 2412.07114): two variables that approximate the fine-tuned accuracy; "
        "their formulas are not public, these are this project's own, chosen by rank correlation"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    actions: ClassVar[tuple[Action, ...]] = ("drop", "linear", "conv")
    ridge: float = 1e-3
    """Relative to the mean diagonal of the normal equations."""
    max_samples: int = 256
    """Samples in the fit; of each, `sensitivity.MAX_POSITIONS` positions enter."""
    tail_samples: int = 64
    """Samples on which the distances are measured."""
    drop_share: float = 0.02
    """How much of the damage that a stand-in would repair still counts when the unit is dropped and trained."""
    sensitivity: float = 0.9
    """Weight of each position by its squared gradient: 0 counts all alike, 1 trusts the gradients alone."""

    def __post_init__(self) -> None:
        check_fields(self, ridge=0.0, max_samples=1, tail_samples=1, drop_share=(0.0, 1.0), sensitivity=(0.0, 1.0))

    def scores(self, job: Job) -> Iterable[Score]:
        """Scores for "drop" and for each stand-in of every unit.

        Cost: one batch with gradients, two teacher passes, and two runs of the layers behind each unit.
        """
        fits = fit_stand_ins(
            job.teacher,
            job.units,
            job.samples.first(self.max_samples),
            self.ridge,
            self.sensitivity,
            job.batch_size,
            job.seed,
            conv="conv" in job.actions,
        )

        def replacements(unit: Unit) -> dict[str, Replacement]:
            stand_ins = {action: functools.partial(fit, unit) for action, fit in fits[unit.id].items()}
            return {"drop": lambda x: x} | stand_ins

        few = job.samples.first(self.tail_samples)
        found = teacher_tails(job.teacher, job.units, few, replacements, batch_size=job.batch_size)
        for unit in job.units:
            damage, repaired = distances(found[unit.id, "drop"]), distances(found[unit.id, "linear"])
            parts = {
                "damage": damage,
                "repaired_damage": repaired,
                "prediction_damage": found[unit.id, "drop"]["prediction"],
                "repaired_prediction_damage": found[unit.id, "linear"]["prediction"],
            }
            yield Score(unit.id, "drop", repaired + self.drop_share * max(0.0, damage - repaired), parts)
            for action in fits[unit.id]:
                yield Score(unit.id, action, distances(found[unit.id, action]), parts)


def fit_stand_ins(
    teacher: nn.Module,
    units: Sequence[Unit],
    samples: Samples,
    ridge: float,
    sensitivity: float,
    batch_size: int,
    seed: int,
    conv: bool = False,
) -> dict[str, dict[Action, LinearMap]]:
    """The best stand-ins of every unit on the teacher's own inputs, in one pass over the samples.

    Rows are weighted by ``1 - sensitivity + sensitivity x g``, g the squared gradient of the final features at that
    position, mean one. 3x3 stand-ins, whose equations are 81 times as large, are fitted when ``conv`` says so.
    """
    device = next(teacher.parameters()).device
    pattern = sensitivities(teacher, units, samples.batch(slice(0, SENSITIVITY_SAMPLES), device), seed)
    actions = {unit.id: [a for a in Block().stand_ins(unit) if conv or a != "conv"] for unit in units}
    sides = {unit.id: max(KERNELS[action] for action in actions[unit.id]) for unit in units}
    equations = {unit.id: NormalEquations(unit.channels, device, sides[unit.id]) for unit in units}
    chosen = {unit.id: positions(unit, pattern[unit.id], seed=seed) for unit in units}
    taps = {f"x {u.id}": Tap(u.path, "input") for u in units} | {f"y {u.id}": Tap(u.path, "output") for u in units}
    with evaluating(teacher):
        for batch in track(samples.batches(batch_size, device), "fit", -(-len(samples) // batch_size)):
            seen = read(teacher, batch, taps)
            for unit in units:
                index = chosen[unit.id]
                x, y = rows(seen[f"x {unit.id}"], unit, index, sides[unit.id]), rows(seen[f"y {unit.id}"], unit, index)
                equations[unit.id].add(x, y, row_weights(pattern, unit, index, sensitivity, len(batch)))
    return {
        unit.id: {
            action: (equations[unit.id] if KERNELS[action] == sides[unit.id] else equations[unit.id].pointwise()).solve(
                ridge
            )
            for action in actions[unit.id]
        }
        for unit in units
    }
