"""Run what comes behind each unit, with the unit replaced: how far do features and predictions move?"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ttmpd.losses import soft_label_loss
from ttmpd.modules import call, evaluating, find_feature_tap, stubbed, tapped
from ttmpd.progress import track
from ttmpd.records import Samples, Tap, Unit
from ttmpd.repair import skippable, tail_stubs

Replacement = Callable[[Tensor], Tensor]
"""What answers for a unit, given its input."""


def teacher_tails(
    teacher: nn.Module,
    units: Sequence[Unit],
    samples: Samples,
    replacements: Callable[[Unit], Mapping[str, Replacement]],
    *,
    batch_size: int = 64,
) -> dict[tuple[str, str], dict[str, float]]:
    """Distances from the teacher for every unit under every replacement.

    Args:
        teacher: left untouched.
        units: in the order of the network.
        samples: on which distances are measured.
        replacements: by name, what may answer for a unit.
        batch_size: samples per forward pass.

    Returns:
        (unit id, replacement name) -> {"feature": squared change of the final features over their variance,
        "prediction": mean Kullback-Leibler divergence of the predictions}.

    Cost: one teacher pass, plus one run of the layers behind each unit per replacement. Layers before are skipped
    where the network allows it.
    """
    device = next(teacher.parameters()).device
    few = samples.batch(slice(0, 2), device)
    tap, skips = find_feature_tap(teacher, few), skippable(teacher, units, few)
    answers = {unit.id: replacements(unit) for unit in units}
    sums = {(unit.id, name): torch.zeros(2, dtype=torch.float64) for unit in units for name in answers[unit.id]}
    moments: list[Tensor] = []
    with evaluating(teacher):
        for batch in track(samples.batches(batch_size, device), "score", -(-len(samples) // batch_size)):
            inputs, features, logits = _observe(teacher, units, batch, tap)
            moments.append(torch.stack([features.sum(0), features.square().sum(0)]).double().cpu())
            for number, unit in enumerate(units):
                earlier = units[:number] if unit.id in skips else ()
                for name, replacement in answers[unit.id].items():
                    answer = replacement(inputs[unit.id])
                    with stubbed(teacher, tail_stubs(earlier, unit, answer)):
                        _, moved, changed = _observe(teacher, (), batch, tap)
                    sums[unit.id, name] += torch.tensor(
                        [float((moved - features).square().sum()), float(soft_label_loss(changed, logits)) * len(batch)]
                    )
    mean, square = torch.stack(moments).sum(0) / len(samples)
    spread = square - mean.square() if len(samples) > 1 else square  # one sample has no variance
    scale = max(float(spread.clamp_min(0).sum()), 1e-12) * len(samples)
    return {
        key: {"feature": float(total[0]) / scale, "prediction": float(total[1]) / len(samples)}
        for key, total in sums.items()
    }


def _observe(
    model: nn.Module, units: Sequence[Unit], batch: Tensor, tap: Tap | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(input of each unit, flat final features, logits) for one batch; the logits serve when there are no features."""
    taps = {unit.id: Tap(unit.path, "input") for unit in units}
    if tap is not None:
        taps["\0features"] = tap
    with tapped(model, taps) as seen:
        logits = call(model, batch)
    features = seen.pop("\0features", logits)
    return seen, features.flatten(1).float(), logits


def distances(parts: Mapping[str, float]) -> float:
    """The harm in a pair of distances: that of the features.

    Their sum with the divergence of the predictions ranks plans worse (``benchmarks/rank_correlation.py``): before any
    training single answers are noisy, while features say how much there is to recover.
    """
    return parts["feature"]
