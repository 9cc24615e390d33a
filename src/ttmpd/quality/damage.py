"""Run what comes behind each unit, with the unit replaced: how far do features and predictions move?"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.models.modules import patched_forward
from ttmpd.models.run import evaluating, predict
from ttmpd.models.taps import Tap, find_feature_tap, read_taps, tapped
from ttmpd.models.tokens import prediction_offsets
from ttmpd.progress import track
from ttmpd.records import DepthUnit, Unit
from ttmpd.surgery.replacements import forward_of
from ttmpd.training.losses import soft_label_loss

U = TypeVar("U", bound=Unit)

Replacement = Callable[[Tensor], Tensor]
"""What answers for a unit, given its input."""


def replacement_damage(
    teacher: nn.Module,
    units: Sequence[U],
    samples: Samples,
    replacements: Callable[[U], Mapping[str, Replacement]],
    *,
    batch_size: int = 64,
    wholes: Sequence[Unit] = (),
) -> dict[tuple[str, str], dict[str, float]]:
    """Distances from the teacher for every unit under every replacement.

    Args:
        teacher: left untouched.
        units: in the order of the network; all of them hold their shortcut, or none does.
        samples: on which distances are measured.
        replacements: by name, what may answer for a unit.
        batch_size: samples per forward pass.
        wholes: units that hold their shortcut, for units that are part of one: those before it are skipped.

    Returns:
        (unit id, replacement name) -> {"feature": squared change of the final features over their variance,
        "prediction": mean Kullback-Leibler divergence of the predictions}.

    Cost: one teacher pass, plus one run of the layers behind each unit per replacement. Layers before are skipped
    where the network allows it.
    """
    device = next(teacher.parameters()).device
    few = samples.batch(slice(0, 2), device)
    tap, entries = find_feature_tap(teacher, few), _entries(teacher, units, wholes, few)
    before = {unit.id: unit for unit, _ in entries.values()}
    answers = {unit.id: replacements(unit) for unit in units}
    sums = {(unit.id, name): torch.zeros(2, dtype=torch.float64) for unit in units for name in answers[unit.id]}
    moments: list[Tensor] = []
    with evaluating(teacher):
        for batch in track(samples.batches(batch_size, device), "score", -(-len(samples) // batch_size)):
            inputs, features, logits = _observe(teacher, (*units, *before.values()), batch, tap)
            moments.append(_moments(features))
            for unit in units:
                for name, replacement in answers[unit.id].items():
                    answer = replacement(inputs[unit.id])
                    with patched_forward(teacher, _stubs(entries, unit, answer, inputs)):
                        _, moved, changed = _observe(teacher, (), batch, tap)
                    sums[unit.id, name] += _apart(features, logits, moved, changed)
    n = int(prediction_offsets(teacher, samples.inputs)[-1])
    scale = _scale(moments, n)
    return {key: _per_sample(total, scale, n) for key, total in sums.items()}


def _entries(
    teacher: nn.Module, units: Sequence[Unit], wholes: Sequence[Unit], few: Tensor
) -> dict[str, tuple[Unit, Sequence[Unit]]]:
    """Where to enter the network for each unit: unit id -> (the whole unit to begin with, the ones before it)."""
    if all(_hands_on(unit) for unit in units):
        proven = skippable(teacher, units, few)
        return {unit.id: (unit, units[:number]) for number, unit in enumerate(units) if unit.id in proven}
    proven, found = skippable(teacher, wholes, few), {}
    following = _following(teacher, wholes, few)
    for unit in units:
        for number, whole in enumerate(wholes):
            # What comes behind the whole before depends on its output alone: that is what this one is given.
            known = number and number in following and wholes[number - 1].id in proven
            if known and unit.path.startswith(f"{whole.path}."):
                found[unit.id] = (whole, wholes[:number])
    return found


def _hands_on(unit: Unit) -> bool:
    """Whether the model goes on with the unit's input once it is dropped."""
    return isinstance(unit, DepthUnit) and not unit.branch


def _following(teacher: nn.Module, wholes: Sequence[Unit], few: Tensor) -> set[int]:
    """Numbers of the units that are given the very output of the unit before: no other layer stands in between."""
    taps = {f"x {unit.id}": Tap(unit.path, "input") for unit in wholes}
    taps |= {f"y {unit.id}": Tap(unit.path, "output") for unit in wholes}
    with evaluating(teacher):
        seen = read_taps(teacher, few, taps)
    pairs = enumerate(itertools.pairwise(wholes), 1)
    return {number for number, (a, b) in pairs if torch.equal(seen[f"y {a.id}"], seen[f"x {b.id}"])}


def _stubs(
    entries: Mapping[str, tuple[Unit, Sequence[Unit]]], unit: Unit, answer: Tensor, inputs: Mapping[str, Tensor]
) -> dict[str, Callable[..., Any]]:
    if unit.id not in entries:
        return {unit.path: forward_of(unit, lambda _x: answer)}
    first, earlier = entries[unit.id]
    if first is unit:
        return skip_to(earlier, unit, answer)
    # The last of the units before hands on what the unit's whole was given.
    return skip_to(earlier[:-1], earlier[-1], inputs[first.id]) | {unit.path: forward_of(unit, lambda _x: answer)}


def _observe(
    model: nn.Module, units: Sequence[Unit], batch: Tensor, tap: Tap | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(input of each unit, flat final features, logits) for one batch; the logits serve when there are no features."""
    taps = {unit.id: Tap(unit.path, "input") for unit in units}
    if tap is not None:
        taps["\0features"] = tap
    with tapped(model, taps) as seen:
        logits = predict(model, batch)
    features = seen.pop("\0features", logits)
    return seen, features.flatten(1).float(), logits


def student_damage(teacher: nn.Module, student: nn.Module, samples: Samples, batch_size: int = 64) -> dict[str, float]:
    """How far a whole student is from the teacher: as in :func:`replacement_damage`.

    Args:
        teacher: left untouched.
        student: of the same structure behind the last removal; left untouched.
        samples: on which distances are measured.
        batch_size: samples per forward pass.
    """
    device = next(teacher.parameters()).device
    tap = find_feature_tap(teacher, samples.batch(slice(0, 2), device))
    sums, moments = torch.zeros(2, dtype=torch.float64), list[Tensor]()
    with evaluating(teacher), evaluating(student):
        for batch in samples.batches(batch_size, device):
            _, features, logits = _observe(teacher, (), batch, tap)
            _, moved, changed = _observe(student, (), batch, tap)
            sums += _apart(features, logits, moved, changed)
            moments.append(_moments(features))
    n = int(prediction_offsets(teacher, samples.inputs)[-1])
    return _per_sample(sums, _scale(moments, n), n)


def _apart(features: Tensor, logits: Tensor, moved: Tensor, changed: Tensor) -> Tensor:
    """(squared change of the features, divergence of the predictions), summed over the samples."""
    divergence = soft_label_loss(changed, logits) * len(logits)
    return torch.tensor([float((moved - features).square().sum()), float(divergence)])


def _moments(features: Tensor) -> Tensor:
    return torch.stack([features.sum(0), features.square().sum(0)]).double().cpu()


def _scale(moments: Sequence[Tensor], n: int) -> float:
    """Variance of the features times the number of samples."""
    mean, square = torch.stack(list(moments)).sum(0) / n
    spread = square - mean.square() if n > 1 else square  # one answer has no variance
    return max(float(spread.clamp_min(0).sum()), 1e-12) * n


def _per_sample(sums: Tensor, scale: float, n: int) -> dict[str, float]:
    return {"feature": float(sums[0]) / scale, "prediction": float(sums[1]) / n}


def feature_damage(parts: Mapping[str, float]) -> float:
    """The harm in a pair of distances: that of the features.

    Their sum with the divergence of the predictions ranks plans worse (``benchmarks/rank_correlation.py``): before any
    training single answers are noisy, while features say how much there is to recover.
    """
    return parts["feature"]


def skippable(teacher: nn.Module, units: Sequence[Unit], batch: Tensor) -> frozenset[str]:
    """Units behind which the network depends on their output alone.

    For them the units before can be skipped when only what comes after is of interest. Settled by numbers: with all
    earlier units skipped and the unit's true output handed in, the logits must be the model's own.
    """
    proven = set()
    with evaluating(teacher):
        seen = read_taps(teacher, batch, {unit.id: Tap(unit.path, "output") for unit in units})
        logits = predict(teacher, batch)
        for number, unit in enumerate(units):
            given = seen[unit.id]
            with patched_forward(teacher, skip_to(units[:number], unit, given)):
                if torch.allclose(predict(teacher, batch), logits, rtol=1e-4, atol=1e-4):
                    proven.add(unit.id)
    return frozenset(proven)


def skip_to(earlier: Sequence[Unit], unit: Unit, output: Tensor) -> dict[str, Callable[..., Any]]:
    """Stubs that skip ``earlier`` units and put ``output`` where ``unit`` would answer."""
    stubs = {u.path: forward_of(u, lambda x: x) for u in earlier}
    stubs[unit.path] = forward_of(unit, lambda _x: output)
    return stubs
