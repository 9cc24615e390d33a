"""Damage: how far the final features move when units are replaced and all later layers run, or when a student runs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.models.modules import patched_forward
from ttmpd.models.run import evaluating, predict, same_outputs
from ttmpd.models.taps import Tap, find_feature_tap, read_taps, tapped
from ttmpd.models.tokens import prediction_offsets
from ttmpd.progress import track
from ttmpd.records import DepthUnit, Unit
from ttmpd.surgery.replacements import forward_of

U = TypeVar("U", bound=Unit)

Replacement = Callable[[Tensor], Tensor]
"""Computes an output in place of a unit, from the unit's input."""


def replacement_damage(
    teacher: nn.Module,
    units: Sequence[U],
    samples: Samples,
    replacements: Callable[[U], Mapping[str, Replacement]],
    *,
    batch_size: int = 64,
    containers: Sequence[Unit] = (),
) -> dict[tuple[str, str], float]:
    """Squared change of the final features, relative to their variance, for every unit under every replacement.

    Features and not predictions, nor the sum of both: before any training single predictions are noisy, while features
    show how much there is to recover (their sum ranks plans worse, see ``benchmarks/rank_correlation.py``).

    Args:
        teacher: left untouched.
        units: in the order of the network; either all of them contain their shortcut, or none does.
        samples: on which the damage is measured.
        replacements: by name, for a unit.
        batch_size: samples per forward pass.
        containers: units that contain their shortcut, for ``units`` that lie within them: those before the container of
            a unit are skipped.

    Returns:
        (unit id, replacement name) -> damage; 1.0 is as far as from the features to their mean.

    Cost: one teacher pass, plus one run of the later layers for every unit and replacement. Earlier layers are skipped
    where the network allows it.
    """
    if not units:
        return {}
    device = next(teacher.parameters()).device
    pair = samples.batch(slice(0, 2), device)
    tap, entries = find_feature_tap(teacher, pair), _entries(teacher, units, containers, pair)
    starts = [start for start, _ in entries.values()]
    watched: dict[str, Unit] = {unit.id: unit for unit in units} | {unit.id: unit for unit in starts}
    by_unit = {unit.id: replacements(unit) for unit in units}
    sums = dict.fromkeys(((unit.id, name) for unit in units for name in by_unit[unit.id]), 0.0)
    moments: list[Tensor] = []
    with evaluating(teacher):
        for batch in track(samples.batches(batch_size, device), "score", -(-len(samples) // batch_size)):
            inputs, features = _observe(teacher, tuple(watched.values()), batch, tap)
            moments.append(_moments(features))
            for unit in units:
                for name, replacement in by_unit[unit.id].items():
                    output = replacement(inputs[unit.id])
                    with patched_forward(teacher, _patches(entries, unit, output, inputs)):
                        _, moved = _observe(teacher, (), batch, tap)
                    sums[unit.id, name] += _squared_change(features, moved)
    scale = _scale(moments, int(prediction_offsets(teacher, samples.inputs)[-1]))
    return {key: total / scale for key, total in sums.items()}


def student_damage(teacher: nn.Module, student: nn.Module, samples: Samples, batch_size: int = 64) -> float:
    """Squared change of the final features from teacher to student, relative to their variance in the teacher.

    Args:
        teacher: left untouched.
        student: with the same layers after the last removal; left untouched.
        samples: on which the damage is measured.
        batch_size: samples per forward pass.

    Cost: one pass of each.
    """
    device = next(teacher.parameters()).device
    tap = find_feature_tap(teacher, samples.batch(slice(0, 2), device))
    total, moments = 0.0, list[Tensor]()
    with evaluating(teacher), evaluating(student):
        for batch in samples.batches(batch_size, device):
            _, features = _observe(teacher, (), batch, tap)
            _, moved = _observe(student, (), batch, tap)
            total += _squared_change(features, moved)
            moments.append(_moments(features))
    return total / _scale(moments, int(prediction_offsets(teacher, samples.inputs)[-1]))


def _entries(
    teacher: nn.Module, units: Sequence[Unit], containers: Sequence[Unit], batch: Tensor
) -> dict[str, tuple[Unit, Sequence[Unit]]]:
    """Where a run can start for each unit: unit id -> (the unit or its container, the units before that one)."""
    if all(_contains_shortcut(unit) for unit in units):
        proven = skippable(teacher, units, batch)
        return {unit.id: (unit, units[:number]) for number, unit in enumerate(units) if unit.id in proven}
    proven, entries = skippable(teacher, containers, batch), {}
    chained = _chained(teacher, containers, batch)
    for unit in units:
        for number, container in enumerate(containers):
            # After the container before it, the network depends on that one's output alone: on this one's input.
            can_start = number and number in chained and containers[number - 1].id in proven
            if can_start and unit.path.startswith(f"{container.path}."):
                entries[unit.id] = (container, containers[:number])
    return entries


def _contains_shortcut(unit: Unit) -> bool:
    """True if the model goes on with the unit's input once the unit is dropped."""
    return isinstance(unit, DepthUnit) and not unit.branch


def _chained(teacher: nn.Module, units: Sequence[Unit], batch: Tensor) -> set[int]:
    """Numbers of the units whose input is the very output of the unit before: no other layer lies in between."""
    taps = {tap: tap for unit in units for tap in (Tap(unit.path, "input"), Tap(unit.path, "output"))}
    with evaluating(teacher):
        values = read_taps(teacher, batch, taps)
    pairs = enumerate(itertools.pairwise(units), 1)
    return {
        number for number, (a, b) in pairs if torch.equal(values[Tap(a.path, "output")], values[Tap(b.path, "input")])
    }


def _patches(
    entries: Mapping[str, tuple[Unit, Sequence[Unit]]], unit: Unit, output: Tensor, inputs: Mapping[str, Tensor]
) -> dict[str, Callable[..., Any]]:
    """Replaced ``forward`` functions by path, with which a run gives the unit's output and skips what it can."""
    if unit.id not in entries:
        return {unit.path: forward_of(unit, lambda _x: output)}
    start, earlier = entries[unit.id]
    if start is unit:
        return skip_to(earlier, unit, output)
    # The last of the units before the container returns the container's input.
    return skip_to(earlier[:-1], earlier[-1], inputs[start.id]) | {unit.path: forward_of(unit, lambda _x: output)}


def _observe(
    model: nn.Module, units: Sequence[Unit], batch: Tensor, tap: Tap | None
) -> tuple[dict[str, Tensor], Tensor]:
    """(input of each unit, final features as (rows, values)) for one batch; predictions where there are no features."""
    feature_tap = {} if tap is None else {"": tap}
    taps = {unit.id: Tap(unit.path, "input") for unit in units}
    with tapped(model, taps) as inputs, tapped(model, feature_tap) as features:
        predictions = predict(model, batch)
    return inputs, features.get("", predictions).flatten(1).float()


def _squared_change(features: Tensor, moved: Tensor) -> float:
    return float((moved - features).square().sum())


def _moments(features: Tensor) -> Tensor:
    return torch.stack([features.sum(0), features.square().sum(0)]).double().cpu()


def _scale(moments: Sequence[Tensor], n: int) -> float:
    """Variance of the features times the number of rows."""
    mean, square = torch.stack(list(moments)).sum(0) / n
    variance = square - mean.square() if n > 1 else square  # of one row there is no variance
    return max(float(variance.clamp_min(0).sum()), 1e-12) * n


def skippable(teacher: nn.Module, units: Sequence[Unit], batch: Tensor) -> frozenset[str]:
    """Ids of the units after which the network depends on their output alone.

    For these, earlier units need not run when only later layers are of interest. Decided by trial: with all earlier
    units skipped and the unit's true output put in, the predictions must be the model's own.

    Cost: one run of the later layers for every unit.
    """
    proven = set()
    with evaluating(teacher):
        outputs = read_taps(teacher, batch, {unit.id: Tap(unit.path, "output") for unit in units})
        predictions = predict(teacher, batch)
        for number, unit in enumerate(units):
            with patched_forward(teacher, skip_to(units[:number], unit, outputs[unit.id])):
                if same_outputs(predict(teacher, batch), predictions):
                    proven.add(unit.id)
    return frozenset(proven)


def skip_to(earlier: Sequence[Unit], unit: Unit, output: Tensor) -> dict[str, Callable[..., Any]]:
    """Replaced ``forward`` functions by path that skip the ``earlier`` units and return ``output`` for ``unit``."""
    patches = {other.path: forward_of(other, lambda x: x) for other in earlier}
    patches[unit.path] = forward_of(unit, lambda _x: output)
    return patches
