"""TT-MPD's two variables: damage and closed-form repaired damage, without any training."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.method import check_fields
from ttmpd.models.modules import has_batch_norm, module_at
from ttmpd.models.run import evaluating
from ttmpd.models.taps import Tap, read_taps
from ttmpd.progress import track
from ttmpd.quality.damage import Replacement, feature_damage, replacement_damage, student_damage
from ttmpd.records import Action, DepthUnit, Removal, Scope, Score, Unit, WidthUnit
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.repair.linear import ReplacementFit
from ttmpd.repair.obs import MemberChoice, narrowed_output, select_members
from ttmpd.repair.positions import sample_positions
from ttmpd.repair.sequential import repaired
from ttmpd.repair.unfold import input_rows, rows
from ttmpd.score.base import Scorer, ScoringInputs
from ttmpd.surgery.layers import bias_of, is_convolution, matrix_of
from ttmpd.surgery.replacements import LinearMap, dropped


class TTMPD(Scorer):
    """Harm of a stand-in = repaired damage; harm of dropping = repaired damage and a share of the rest.

    *Damage* is how far the final features move when the unit is dropped; *repaired damage* is the
    same with the unit replaced by its best linear stand-in, a ridge regression on the unit's inputs and outputs. What
    no linear map repairs, a short distillation does not repair either. A stand-in sees one position.

    Heads and neurons are judged in bulk: from the second moments of a layer's inputs follows which of them the others
    can stand in for, and how much is lost at every width; a few widths are run to tell how much that moves the final
    features.
    """

    source: ClassVar[str] = (
        "TT-MPD (arXiv 2412.07114): two variables that approximate the fine-tuned accuracy; "
        "their formulas are not public, these are this project's own, chosen by rank correlation"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    actions: ClassVar[tuple[Action, ...]] = ("drop", "linear")
    scores_plans: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("depth", "width")
    ridge: float = 1e-3
    """Relative to the mean diagonal of the normal equations."""
    max_samples: int = 256
    """Samples in the fit; of each, `sensitivity.MAX_POSITIONS` positions enter."""
    tail_samples: int = 64
    """Samples on which the distances are measured."""
    plan_samples: int = 64
    """Samples to which a student is fitted to judge a whole plan."""
    plan_rows: int = 4096
    """Rows of each of these fits."""
    drop_share: float = 0.02
    """How much of the damage that a stand-in would repair still counts when the unit is dropped and trained."""
    sensitivity: float = 0.9
    """Weight of each position by its squared gradient: 0 counts all alike, 1 trusts the gradients alone."""
    channels: float = 3.0
    """How many times the harm of fewer channels between convolutions counts in networks with batch normalisation: many
    narrowed layers lose more than their harms add up to, and training gives less of it back than of whole blocks.
    Without batch normalisation training gives little back of either, and every harm counts once.
    """

    def __post_init__(self) -> None:
        check_fields(self, ridge=0.0, max_samples=1, tail_samples=1, plan_samples=1, plan_rows=1, drop_share=(0.0, 1.0),
                     sensitivity=(0.0, 1.0),                     channels=0.0)  # fmt: skip

    def scores(self, job: ScoringInputs) -> Iterable[Score]:
        """Scores for "drop" and "linear" of every block, "drop" of every branch of one, and every width of members.

        Cost: one batch with gradients and three teacher passes; two runs of the layers behind each block, one behind
        the block that holds a branch, two behind the one that holds members, and for these a factorisation of their
        second moments.
        """
        blocks = [unit for unit in job.depth_units if not unit.branch]
        yield from self._of_blocks(dataclasses.replace(job, units=blocks)) if blocks else ()
        branches = [unit for unit in job.depth_units if unit.branch]
        yield from self._of_branches(dataclasses.replace(job, units=branches), blocks) if branches else ()
        for units in _in_memory(job.width_units, job.teacher):
            yield from self._of_members(dataclasses.replace(job, units=units), blocks)

    def score_plan(self, job: ScoringInputs, removals: Sequence[Removal]) -> float:
        """Repaired damage of a whole plan, every layer behind it fitted, on samples that no layer was fitted to.

        Cost: that of :func:`ttmpd.repair.sequential.repaired`, and a pass of teacher and student over ``tail_samples``.
        """
        n_fit = min(self.plan_samples, max(1, len(job.samples) * 2 // 3))
        fitted, others = job.samples.first(n_fit), range(n_fit, min(len(job.samples), n_fit + self.tail_samples))
        student = repaired(job.teacher, removals, fitted, batch_size=job.batch_size, rows=self.plan_rows)
        unseen = job.samples.subset(others) if others else fitted
        return feature_damage(student_damage(job.teacher, student, unseen, job.batch_size))

    def _of_blocks(self, job: ScoringInputs) -> Iterable[Score]:
        fits = fit_stand_ins(
            job.teacher,
            job.units,
            job.samples.first(self.max_samples),
            self.ridge,
            self.sensitivity,
            job.batch_size,
            job.seed,
        )

        def replacements(unit: DepthUnit) -> dict[str, Replacement]:
            return {"drop": lambda x: x, "linear": functools.partial(fits[unit.id], unit)}

        few = job.samples.first(self.tail_samples)
        found = replacement_damage(job.teacher, job.depth_units, few, replacements, batch_size=job.batch_size)
        for unit in job.units:
            damage, repaired = feature_damage(found[unit.id, "drop"]), feature_damage(found[unit.id, "linear"])
            parts = {
                "damage": damage,
                "repaired_damage": repaired,
                "prediction_damage": found[unit.id, "drop"]["prediction"],
                "repaired_prediction_damage": found[unit.id, "linear"]["prediction"],
            }
            yield Score(unit.id, "drop", repaired + self.drop_share * max(0.0, damage - repaired), parts)
            yield Score(unit.id, "linear", repaired, parts)

    def _of_branches(self, job: ScoringInputs, blocks: Sequence[Unit]) -> Iterable[Score]:
        """Damage of every branch that always adds its mean: as much as the biases of later layers can make up for."""
        means = branch_means(job, job.samples.first(self.max_samples))
        damages = replacement_damage(
            job.teacher,
            job.units,
            job.samples.first(self.tail_samples),
            lambda unit: {"mean": lambda x: dropped(unit, x) + means[unit.id].to(x)},
            batch_size=job.batch_size,
            wholes=blocks,
        )
        for unit in job.units:
            yield Score(unit.id, "drop", feature_damage(damages[unit.id, "mean"]))

    def _of_members(self, job: ScoringInputs, wholes: Sequence[Unit]) -> Iterable[Score]:
        """Repaired damage of every width: measured at the outer ones, on the line through these for the others."""
        moments = member_moments(job, job.samples.first(self.max_samples), self.sensitivity)
        found: dict[str, list[MemberChoice]] = {}
        for unit in job.width_units:
            layer = module_at(job.teacher, unit.path)
            matrix, bias = matrix_of(layer).detach(), bias_of(layer)
            found[unit.id] = select_members(moments.pop(unit.id), matrix, bias, unit.n_members, unit.widths, self.ridge)

        def replacements(unit: WidthUnit) -> dict[str, Replacement]:
            return {
                str(len(choice.kept)): narrowed_output(job.teacher, unit, choice)
                for choice in _measured(found[unit.id])
            }

        few = job.samples.first(self.tail_samples)
        moved = replacement_damage(
            job.teacher, job.width_units, few, replacements, batch_size=job.batch_size, wholes=wholes
        )
        trains_well = has_batch_norm(job.teacher)
        for unit in job.width_units:
            convolution = is_convolution(module_at(job.teacher, unit.path))
            times = self.channels if convolution and trains_well else 1.0
            points = [(c.error, feature_damage(moved[unit.id, str(len(c.kept))])) for c in _measured(found[unit.id])]
            errors, damages = zip(*points, strict=True)
            for choice in found[unit.id]:
                harm = float(np.interp(choice.error, errors, np.maximum.accumulate(damages)))
                yield Score(unit.id, "narrow", times * harm, {"lost": choice.error}, choice.kept)


def _measured(select_members: Sequence[MemberChoice]) -> list[MemberChoice]:
    """The outer widths."""
    return list({len(choice.kept): choice for choice in (select_members[0], select_members[-1])}.values())


def branch_means(job: ScoringInputs, samples: Samples) -> dict[str, Tensor]:
    """Unit id -> the mean of what a branch answers, one value a channel, over samples and positions."""
    taps = {unit.id: Tap(unit.path, "output") for unit in job.units}
    sums = {unit.id: torch.zeros(unit.channels, dtype=torch.float64) for unit in job.units}
    with evaluating(job.teacher):
        for batch in samples.batches(job.batch_size, job.device):
            outputs = read_taps(job.teacher, batch, taps)
            for unit in job.units:
                first = unit.layout == "channels_first"
                value = outputs[unit.id].movedim(1, -1) if first else outputs[unit.id]
                sums[unit.id] += value.flatten(0, -2).double().mean(0).cpu() * len(batch)
    shapes = {unit.id: (-1, *[1] * (len(unit.shape) - 1)) if unit.layout == "channels_first" else (-1,)
              for unit in job.units}  # fmt: skip
    return {name: (total / len(samples)).float().view(shapes[name]) for name, total in sums.items()}


MAX_MOMENTS = 64 * 2**20
"""Values of second moments that are held at once: 512 MiB in double precision."""


def _in_memory(units: Sequence[WidthUnit], teacher: nn.Module) -> Iterator[Sequence[WidthUnit]]:
    """The units in groups whose second moments fit into memory together."""
    group: list[WidthUnit] = []
    total = 0
    for unit in units:
        n_inputs = matrix_of(module_at(teacher, unit.path)).shape[1]
        if group and total + n_inputs**2 > MAX_MOMENTS:
            yield group
            group, total = [], 0
        group.append(unit)
        total += n_inputs**2
    if group:
        yield group


def member_moments(job: ScoringInputs, samples: Samples, sensitivity: float) -> dict[str, NormalEquations]:
    """Moments of what each unit's layer reads, with what it answers, on the teacher, in one pass over the samples."""
    entering = sample_positions(job.teacher, job.units, samples, sensitivity, seed=job.seed)
    found = {}
    for unit in job.units:
        n_outputs, n_inputs = matrix_of(module_at(job.teacher, unit.path)).shape
        found[unit.id] = NormalEquations(n_inputs, n_outputs, job.device)
    taps = {f"x {u.id}": Tap(u.path, "input") for u in job.units}
    taps |= {f"y {u.id}": Tap(u.path, "output") for u in job.units}
    with evaluating(job.teacher):
        for batch in track(samples.batches(job.batch_size, job.device), "fit", -(-len(samples) // job.batch_size)):
            seen = read_taps(job.teacher, batch, taps)
            for unit in job.units:
                index, layer = entering.index(unit, batch), module_at(job.teacher, unit.path)
                x = input_rows(seen[f"x {unit.id}"], unit, index, layer)
                y = rows(seen[f"y {unit.id}"], _answering(unit, found[unit.id].n_outputs), index)
                found[unit.id].add(x, y, entering.weights(unit, batch, len(y)))
    return found


def _answering(unit: Unit, n_outputs: int) -> Unit:
    """The unit with as many outputs as its layer has now: fewer on a student where what reads them was narrowed."""
    first = unit.layout == "channels_first"
    return dataclasses.replace(unit, shape=(n_outputs, *unit.shape[1:]) if first else (*unit.shape[:-1], n_outputs))


def fit_stand_ins(
    teacher: nn.Module,
    units: Sequence[Unit],
    samples: Samples,
    ridge: float,
    sensitivity: float,
    batch_size: int,
    seed: int,
) -> dict[str, LinearMap]:
    """The best stand-ins of every unit on the teacher's own inputs, in one pass over the samples.

    Rows are weighted by ``1 - sensitivity + sensitivity x g``, g the squared gradient of the final features at that
    position, mean one.
    """
    device = next(teacher.parameters()).device
    entering = sample_positions(teacher, units, samples, sensitivity, seed=seed)
    equations = {unit.id: ReplacementFit(unit.channels, device) for unit in units}
    taps = {f"x {u.id}": Tap(u.path, "input") for u in units} | {f"y {u.id}": Tap(u.path, "output") for u in units}
    with evaluating(teacher):
        for batch in track(samples.batches(batch_size, device), "fit", -(-len(samples) // batch_size)):
            seen = read_taps(teacher, batch, taps)
            for unit in units:
                index = entering.index(unit, batch)
                x, y = rows(seen[f"x {unit.id}"], unit, index), rows(seen[f"y {unit.id}"], unit, index)
                equations[unit.id].add(x, y, entering.weights(unit, batch, len(y)))
    return {unit.id: equations[unit.id].solve(ridge) for unit in units}
