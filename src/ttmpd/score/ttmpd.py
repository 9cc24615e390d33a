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
from ttmpd.quality.damage import Replacement, replacement_damage, student_damage
from ttmpd.records import Action, DepthUnit, Removal, Scope, Score, Unit, WidthUnit
from ttmpd.repair.least_squares import NormalEquations
from ttmpd.repair.limits import too_large_to_fit
from ttmpd.repair.linear import ReplacementFit
from ttmpd.repair.obs import MemberChoice, largest_members, narrowed_output, select_members
from ttmpd.repair.positions import MAX_POSITIONS, n_positions, sample_positions
from ttmpd.repair.sequential import repaired
from ttmpd.repair.unfold import input_rows, rows
from ttmpd.score.base import Scorer, ScoringInputs
from ttmpd.surgery.layers import bias_of, is_convolution, matrix_of
from ttmpd.surgery.replacements import LinearMap, dropped


class TTMPD(Scorer):
    """Harm of a linear replacement = repaired damage; harm of dropping = repaired damage and a share of the rest.

    *Damage* is how far the final features move when the unit is dropped; *repaired damage* is the same with the unit
    replaced by the best linear map, a ridge regression of its outputs on its inputs at single positions. What no linear
    map repairs, a short distillation does not repair either.

    Heads, neurons and channels are scored from the second moments of a layer's inputs: which of them the others can
    represent, and the error at every width. The damage is measured at two widths only and interpolated for the others.
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
    """Samples in the fit; of each, `MAX_POSITIONS` positions enter."""
    tail_samples: int = 64
    """Samples on which damage is measured."""
    plan_samples: int = 64
    """Samples to which a student is fitted to score a whole plan."""
    plan_rows: int = 4096
    """Rows of each of these fits."""
    drop_share: float = 0.02
    """Share of the damage that a linear replacement would repair, but that counts when the unit is dropped."""
    sensitivity: float = 0.9
    """Weight of each position in a fit: 0 weighs all alike, 1 by the squared gradients of the final features alone."""
    channels: float = 3.0
    """Factor on the harm of removing channels between convolutions in networks with batch normalisation: many narrowed
    layers together lose more than the sum of their harms, and training recovers less of it than of whole blocks.
    Without batch normalisation training recovers little of either, and the factor is one.
    """

    def __post_init__(self) -> None:
        check_fields(
            self,
            ridge=0.0,
            max_samples=1,
            tail_samples=1,
            plan_samples=1,
            plan_rows=1,
            drop_share=(0.0, 1.0),
            sensitivity=(0.0, 1.0),
            channels=0.0,
        )

    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """Scores for "drop" and "linear" of every block, "drop" of every branch of one, and every width of members.

        Cost: one batch with gradients and three teacher passes; two runs of the later layers for each block, one for
        each branch, two for each layer that reads members, and for these a factorisation of their second moments.
        """
        blocks = [unit for unit in inputs.depth_units if not unit.branch]
        yield from self._block_scores(dataclasses.replace(inputs, units=blocks)) if blocks else ()
        branches = [unit for unit in inputs.depth_units if unit.branch]
        yield from self._branch_scores(dataclasses.replace(inputs, units=branches), blocks) if branches else ()
        for units in _in_memory(inputs.width_units, inputs.teacher):
            yield from self._width_scores(dataclasses.replace(inputs, units=units), blocks)

    def score_plan(self, inputs: ScoringInputs, removals: Sequence[Removal]) -> float:
        """Repaired damage of a whole plan, all later layers fitted, on samples that no layer was fitted to.

        Cost: that of :func:`ttmpd.repair.sequential.repaired`, and a pass of teacher and student over ``tail_samples``.
        """
        n = len(inputs.samples)
        n_fit = min(self.plan_samples, max(1, n * 2 // 3))
        fit_samples, held_out = inputs.samples.first(n_fit), range(n_fit, min(n, n_fit + self.tail_samples))
        student = repaired(inputs.teacher, removals, fit_samples, batch_size=inputs.batch_size, rows=self.plan_rows)
        samples = inputs.samples.subset(held_out) if held_out else fit_samples
        return student_damage(inputs.teacher, student, samples, inputs.batch_size)

    def _block_scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        fits = fit_replacements(inputs, inputs.samples.first(self.max_samples), self.ridge, self.sensitivity)

        def replacements(unit: DepthUnit) -> dict[str, Replacement]:
            return {"drop": lambda x: x, "linear": functools.partial(fits[unit.id], unit)}

        samples = inputs.samples.first(self.tail_samples)
        damages = replacement_damage(
            inputs.teacher, inputs.depth_units, samples, replacements, batch_size=inputs.batch_size
        )
        for unit in inputs.units:
            damage, repaired = damages[unit.id, "drop"], damages[unit.id, "linear"]
            parts = {"damage": damage, "repaired_damage": repaired}
            yield Score(unit.id, "drop", repaired + self.drop_share * max(0.0, damage - repaired), parts)
            yield Score(unit.id, "linear", repaired, parts)

    def _branch_scores(self, inputs: ScoringInputs, blocks: Sequence[Unit]) -> Iterable[Score]:
        """Damage when every branch is replaced by its mean: the biases of later layers can make up for that much."""
        means = branch_means(inputs, inputs.samples.first(self.max_samples))
        damages = replacement_damage(
            inputs.teacher,
            inputs.units,
            inputs.samples.first(self.tail_samples),
            lambda unit: {"mean": lambda x: dropped(unit, x) + means[unit.id].to(x)},
            batch_size=inputs.batch_size,
            containers=blocks,
        )
        for unit in inputs.units:
            yield Score(unit.id, "drop", damages[unit.id, "mean"])

    def _width_scores(self, inputs: ScoringInputs, blocks: Sequence[Unit]) -> Iterable[Score]:
        """Repaired damage of every width: measured at the outer ones, interpolated by the layer's error in between."""
        apart = self._has_few_rows(inputs)
        fit_samples, samples = self._parts(inputs.samples, apart)
        choices = self._member_choices(inputs, fit_samples)
        measured_choices = {name: _measured(own, apart) for name, own in choices.items()}

        def replacements(unit: WidthUnit) -> dict[str, Replacement]:
            return {
                str(len(choice.members)): narrowed_output(inputs.teacher, unit, choice)
                for choice in measured_choices[unit.id]
            }

        damages = replacement_damage(
            inputs.teacher,
            inputs.width_units,
            samples,
            replacements,
            batch_size=inputs.batch_size,
            containers=blocks,
        )
        has_norms = has_batch_norm(inputs.teacher)
        for unit in inputs.width_units:
            factor = self.channels if has_norms and is_convolution(module_at(inputs.teacher, unit.path)) else 1.0
            errors = [choice.error for choice in measured_choices[unit.id]]
            measured = [damages[unit.id, str(len(choice.members))] for choice in measured_choices[unit.id]]
            for choice in choices[unit.id]:
                harm = float(np.interp(choice.error, errors, np.maximum.accumulate(measured)))
                yield Score(unit.id, "narrow", factor * harm, {"lost": choice.error}, choice.members)

    def _member_choices(self, inputs: ScoringInputs, samples: Samples) -> dict[str, list[MemberChoice]]:
        """Members at every width; where the layer cannot be fitted on this device, it keeps its weights."""
        layers = {unit.id: module_at(inputs.teacher, unit.path) for unit in inputs.width_units}
        fitted = [unit for unit in inputs.width_units if not too_large_to_fit(layers[unit.id])]
        equations = fit_layers(dataclasses.replace(inputs, units=fitted), samples, self.sensitivity)
        others = [unit for unit in inputs.width_units if unit.id not in equations]
        energies = input_energies(dataclasses.replace(inputs, units=others), samples, self.sensitivity)
        choices = {}
        for unit in inputs.width_units:
            matrix, bias = matrix_of(layers[unit.id]).detach(), bias_of(layers[unit.id])
            sizes = (matrix, bias, unit.n_members, unit.widths)
            if unit.id in equations:
                choices[unit.id] = select_members(equations.pop(unit.id), *sizes, self.ridge)
            else:
                choices[unit.id] = largest_members(energies[unit.id], *sizes)
        return choices

    def _has_few_rows(self, inputs: ScoringInputs) -> bool:
        """Whether a fit has so few rows for its inputs that its errors on them say little of other samples."""
        widest = max(matrix_of(module_at(inputs.teacher, unit.path)).shape[1] for unit in inputs.width_units)
        fewest = min(n_positions(unit) for unit in inputs.width_units)
        n_rows = len(inputs.samples.first(self.max_samples)) * min(fewest, MAX_POSITIONS)
        return n_rows < ROWS_PER_INPUT * widest and len(inputs.samples) > 1

    def _parts(self, samples: Samples, apart: bool) -> tuple[Samples, Samples]:
        """The samples of the fit, and those on which damage is measured, which may be some of the same or ``apart``."""
        if not apart:
            return samples.first(self.max_samples), samples.first(self.tail_samples)
        n_fit = max(1, min(self.max_samples, len(samples) - min(self.tail_samples, len(samples) // 3)))
        return samples.first(n_fit), samples.subset(range(n_fit, min(len(samples), n_fit + self.tail_samples)))


def _measured(choices: Sequence[MemberChoice], apart: bool) -> list[MemberChoice]:
    """The largest and the smallest width; where errors of a fit on few rows tell little of those between, more of them.

    Then the first, second, fourth, eighth width and so on: little goes at a time where most stays.
    """
    numbers = {0, len(choices) - 1}
    if apart:
        numbers |= {2**k - 1 for k in range(len(choices).bit_length()) if 2**k <= len(choices)}
    return [choices[number] for number in sorted(numbers)]


def branch_means(inputs: ScoringInputs, samples: Samples) -> dict[str, Tensor]:
    """Unit id -> the mean output of a branch over samples and positions, one value per channel."""
    taps = {unit.id: Tap(unit.path, "output") for unit in inputs.units}
    sums = {unit.id: torch.zeros(unit.channels, dtype=torch.float64) for unit in inputs.units}
    with evaluating(inputs.teacher):
        for batch in samples.batches(inputs.batch_size, inputs.device):
            outputs = read_taps(inputs.teacher, batch, taps)
            for unit in inputs.units:
                is_first = unit.layout == "channels_first"
                value = outputs[unit.id].movedim(1, -1) if is_first else outputs[unit.id]
                sums[unit.id] += value.flatten(0, -2).double().mean(0).cpu() * len(batch)
    means = {}
    for unit in inputs.units:
        shape = (-1, *[1] * (len(unit.shape) - 1)) if unit.layout == "channels_first" else (-1,)
        means[unit.id] = (sums[unit.id] / len(samples)).float().view(shape)
    return means


ROWS_PER_INPUT = 4
"""Rows of a fit for each input, from which on its own rows tell how well it does on others."""
MAX_SUMS = 64 * 2**20
"""Values of second moments that are held at once: 512 MiB in double precision."""


def _in_memory(units: Sequence[WidthUnit], teacher: nn.Module) -> Iterator[Sequence[WidthUnit]]:
    """The units in groups whose second moments fit in memory together."""
    group: list[WidthUnit] = []
    total = 0
    for unit in units:
        n_inputs = matrix_of(module_at(teacher, unit.path)).shape[1]
        if group and total + n_inputs**2 > MAX_SUMS:
            yield group
            group, total = [], 0
        group.append(unit)
        total += n_inputs**2
    if group:
        yield group


def _unit_rows(
    inputs: ScoringInputs, samples: Samples, sensitivity: float
) -> Iterator[tuple[Unit, Tensor, Tensor, Tensor]]:
    """(unit, its input rows, its output rows, their weights) for every batch and unit, in one teacher pass.

    Rows are weighted by ``1 - sensitivity + sensitivity x g``, where g is the squared gradient of the final features at
    that position, scaled to mean one.
    """
    sampled = sample_positions(inputs.teacher, inputs.units, samples, sensitivity, seed=inputs.seed)
    layers = {unit.id: module_at(inputs.teacher, unit.path) for unit in inputs.units}
    taps = {tap: tap for unit in inputs.units for tap in (Tap(unit.path, "input"), Tap(unit.path, "output"))}
    n_batches = -(-len(samples) // inputs.batch_size)
    with evaluating(inputs.teacher):
        for batch in track(samples.batches(inputs.batch_size, inputs.device), "fit", n_batches):
            values = read_taps(inputs.teacher, batch, taps)
            for unit in inputs.units:
                positions = sampled.positions(unit, batch)
                x = input_rows(values[Tap(unit.path, "input")], unit.layout, positions, layers[unit.id])
                y = rows(values[Tap(unit.path, "output")], unit.layout, positions)
                yield unit, x, y, sampled.row_weights(unit, batch, len(y))


def fit_layers(inputs: ScoringInputs, samples: Samples, sensitivity: float) -> dict[str, NormalEquations]:
    """Unit id -> normal equations of the outputs on the inputs of the layer that reads the unit's members."""
    equations = {}
    for unit in inputs.units:
        n_outputs, n_inputs = matrix_of(module_at(inputs.teacher, unit.path)).shape
        equations[unit.id] = NormalEquations(n_inputs, n_outputs, inputs.device)
    if equations:
        for unit, x, y, weight in _unit_rows(inputs, samples, sensitivity):
            equations[unit.id].add(x, y, weight)
    return equations


def input_energies(inputs: ScoringInputs, samples: Samples, sensitivity: float) -> dict[str, Tensor]:
    """Unit id -> (n_inputs,) summed squares of what the layer reads that reads the unit's members."""
    energies: dict[str, Tensor] = {}
    if inputs.units:
        for unit, x, _, weight in _unit_rows(inputs, samples, sensitivity):
            squares = (x.double().square() * weight.to(x.device, torch.float64)[:, None]).sum(0)
            energies[unit.id] = energies.get(unit.id, torch.zeros_like(squares)) + squares
    return energies


def fit_replacements(inputs: ScoringInputs, samples: Samples, ridge: float, sensitivity: float) -> dict[str, LinearMap]:
    """Unit id -> the best linear replacement of a block, on the teacher's own inputs."""
    fits = {unit.id: ReplacementFit(unit.channels, inputs.device) for unit in inputs.units}
    for unit, x, y, weight in _unit_rows(inputs, samples, sensitivity):
        fits[unit.id].add(x, y, weight)
    return {name: fit.solve(ridge) for name, fit in fits.items()}
