"""Milliseconds that each removal saves, measured on this device."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.modules import evaluating, module_at, tapped
from ttmpd.records import Removal, Saving, Tap, Timing, Unit
from ttmpd.timing import Rounds, interleaved, synchronize, time_models
from ttmpd.units.block import Block, put


@dataclass(frozen=True, slots=True)
class UnitTiming:
    """Milliseconds per batch of a unit and of its stand-in."""

    unit: str
    ms: float
    stand_in_ms: float

    def saving(self, action: str) -> Saving:
        """What the action saves."""
        if action == "drop":
            return Saving(self.unit, "drop", self.ms)
        return Saving(self.unit, "linear", self.ms - self.stand_in_ms)


def time_units(
    model: nn.Module, kind: Block, units: Sequence[Unit], batch: Tensor, *, rounds: int = 7, min_seconds: float = 1.0
) -> tuple[UnitTiming, ...]:
    """Time every unit and its stand-in on the input it really gets.

    Units alike in class, shape, weights and operations are timed as one: they differ by noise alone.

    Args:
        model: on the device, in the memory format in which it will be used.
        kind: the units' kind.
        units: what to time.
        batch: a batch of the size that latency is promised for.
        rounds: interleaved rounds over all units.
        min_seconds: see :func:`ttmpd.timing.interleaved`.
    """
    if not units:
        return ()
    representatives = {_signature(unit): unit for unit in reversed(units)}
    rows: dict[str, Callable[[], object]] = {}
    with evaluating(model):
        for number, unit in enumerate(representatives.values()):
            module = module_at(model, unit.path)
            replay = _recorded_call(model, module, batch)
            stand_in = kind.stand_in(unit).to(batch.device).eval()
            rows[f"{number} unit"] = _synchronized(replay, batch.device)
            rows[f"{number} stand-in"] = _synchronized(_call_on(stand_in, model, unit, batch), batch.device)
        found = interleaved(rows, rounds=rounds, warmup=2, min_seconds=min_seconds)
    number_of = {signature: number for number, signature in enumerate(representatives)}
    return tuple(
        UnitTiming(
            unit.id,
            statistics.median(found.ms[f"{number_of[_signature(unit)]} unit"]),
            statistics.median(found.ms[f"{number_of[_signature(unit)]} stand-in"]),
        )
        for unit in units
    )


def _signature(unit: Unit) -> tuple[object, ...]:
    return (unit.kind, unit.module, unit.shape, unit.n_params, unit.macs)


def _recorded_call(model: nn.Module, module: nn.Module, batch: Tensor) -> Callable[[], object]:
    """A call of ``module`` with the arguments the model gives it for ``batch``."""
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = module.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
    try:
        model(batch)
    finally:
        handle.remove()
    args, kwargs = seen[0]
    # In-place activations at a block's start would change the recorded input: every call gets the same values anyway.
    return lambda: module(*args, **kwargs)


def _call_on(stand_in: nn.Module, model: nn.Module, unit: Unit, batch: Tensor) -> Callable[[], object]:
    with tapped(model, {"x": Tap(unit.path, "input")}) as seen:
        model(batch)
    x = seen["x"]
    return lambda: stand_in(x)


def _synchronized(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def timed() -> None:
        with torch.no_grad():
            run()
        synchronize(device)

    return timed


def skeleton(model: nn.Module, kind: Block, removals: Sequence[Removal]) -> nn.Module:
    """The cut model with untrained stand-ins: as fast as the student will be, before any repair."""
    student = kind.cut(model, [removal.unit for removal in removals])
    device = next(model.parameters()).device
    for removal in removals:
        if removal.action == "linear":
            put(student, removal.unit, kind.stand_in(removal.unit).to(device))
    return student.eval()


def compare(
    original: nn.Module, student: nn.Module, batch: Tensor, *, rounds: int = 15, min_seconds: float = 2.0
) -> Rounds:
    """Interleaved forward passes of both models under the names "original" and "compressed"."""
    return time_models({"original": original, "compressed": student}, batch, rounds=rounds, min_seconds=min_seconds)


def spread(timing: Timing) -> str:
    """Median with quartiles, for people."""
    return f"{timing.median_ms:.4g} ms ({timing.low_ms:.4g} to {timing.high_ms:.4g})"
