"""Which lossless changes are faster on this device."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from ttmpd.latency.timing import Timings, time_models
from ttmpd.models.modules import prefers_channels_last
from ttmpd.models.run import OTHER_KERNELS, evaluating, predict, same_outputs
from ttmpd.records import UNCHANGED, Lossless
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager
from ttmpd.surgery.lossless import applied, foldable

GAIN = 1.02
"""How many times as fast a model must become for a change to be made."""
MAX_COMPARED = 16
"""Samples on which the choices are compared; the best of them is timed on the whole batch. Several models in turn leave
freed memory in pieces, the more the larger the batch."""


def find_lossless(model: nn.Module, batch: Tensor, *, runtime: Runtime = Eager()) -> tuple[Lossless, Timings]:
    """What makes the model faster here without changing it, and the timings that show it.

    Args:
        model: as it is used now; left untouched.
        batch: of the size that latency is promised for, on the model's device.
        runtime: runs the models that are compared.

    Returns:
        The fastest choice, and interleaved milliseconds of "original" and "lossless".
    """
    choices = [UNCHANGED]
    if pairs := foldable(model, batch[:2]):
        choices.append(Lossless(pairs))
    if prefers_channels_last(model):
        choices += [dataclasses.replace(choice, channels_last=True) for choice in choices]
    changed = [choice for choice in choices[1:] if _same(model, applied(model, choice), batch[:2])]
    best = _fastest(model, changed, batch[:MAX_COMPARED], runtime)
    if best == UNCHANGED:
        return unchanged(model, batch, runtime=runtime)
    models = {"original": model, "lossless": applied(model, best)}
    timings = time_models(models, batch, rounds=7, min_seconds=1.0, max_seconds=5.0, runtime=runtime)
    return (best, timings) if timings.ratio("original", "lossless").median_ms >= GAIN else _without_changes(timings)


def _fastest(model: nn.Module, changed: Sequence[Lossless], batch: Tensor, runtime: Runtime) -> Lossless:
    """The change under which the batch takes the least time; none where that gains too little."""
    if not changed:
        return UNCHANGED
    models = {str(choice): applied(model, choice) for choice in changed} | {"original": model}
    timings = time_models(models, batch, rounds=7, min_seconds=1.0, max_seconds=4.0, runtime=runtime)
    gains = {choice: timings.ratio("original", str(choice)).median_ms for choice in changed}
    best = max(changed, key=lambda choice: gains[choice])
    return best if gains[best] >= GAIN else UNCHANGED


def unchanged(model: nn.Module, batch: Tensor, *, runtime: Runtime = Eager()) -> tuple[Lossless, Timings]:
    """The model as it is, and its milliseconds under both names."""
    models = {"original": model}
    return _without_changes(time_models(models, batch, rounds=7, min_seconds=1.0, max_seconds=5.0, runtime=runtime))


def _without_changes(timings: Timings) -> tuple[Lossless, Timings]:
    return UNCHANGED, Timings(dict.fromkeys(("original", "lossless"), timings.ms["original"]))


def _same(model: nn.Module, other: nn.Module, batch: Tensor) -> bool:
    """True when both predict the same; false where the other does not run, as with code that views its tensors."""
    with evaluating(model), evaluating(other):
        expected = predict(model, batch)
        try:
            outputs = predict(other, batch)
        except RuntimeError:
            return False
    return same_outputs(outputs, expected, OTHER_KERNELS)
