"""Milliseconds that each removal saves, measured on this device."""

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.modules import evaluating, first_tensor, hooks, module_at
from ttmpd.records import KERNELS, Action, Removal, Saving, Timing, Unit
from ttmpd.timing import Rounds, interleaved, synchronize, time_models
from ttmpd.units.block import Block, put


@dataclass(frozen=True, slots=True)
class UnitTiming:
    """Milliseconds per batch of a unit and of each of its stand-ins (action -> ms)."""

    unit: str
    ms: float
    stand_ins: Mapping[str, float]

    def offers(self, action: Action) -> bool:
        """Whether the action can be taken."""
        return action == "drop" or action in self.stand_ins

    def saving(self, action: Action) -> Saving:
        """What the action saves."""
        return Saving(self.unit, action, self.ms - (0.0 if action == "drop" else self.stand_ins[action]))


def time_units(
    model: nn.Module, kind: Block, units: Sequence[Unit], batch: Tensor, *, rounds: int = 7, min_seconds: float = 1.0
) -> tuple[UnitTiming, ...]:
    """Time every unit and its stand-ins on the input it really gets.

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
        given = _recorded_calls(model, representatives.values(), batch)
        for number, unit in enumerate(representatives.values()):
            args, kwargs = given[unit.id]
            # In-place activations at a block's start would change the recorded input: each call gets the same anyway.
            replay = functools.partial(module_at(model, unit.path), *args, **kwargs)
            rows[f"{number} unit"] = _synchronized(replay, batch.device)
            for action in kind.stand_ins(unit):
                stand_in = kind.stand_in(unit, action).to(batch.device).eval()
                x = first_tensor(args or kwargs)
                rows[f"{number} {action}"] = _synchronized(functools.partial(stand_in, x), batch.device)
        found = interleaved(rows, rounds=rounds, warmup=2, min_seconds=min_seconds)
    median = {name: statistics.median(values) for name, values in found.ms.items()}
    numbers = {signature: number for number, signature in enumerate(representatives)}
    return tuple(
        UnitTiming(
            unit.id,
            median[f"{numbers[_signature(unit)]} unit"],
            {action: median[f"{numbers[_signature(unit)]} {action}"] for action in kind.stand_ins(unit)},
        )
        for unit in units
    )


def _signature(unit: Unit) -> tuple[object, ...]:
    return (unit.kind, unit.module, unit.shape, unit.n_params, unit.macs)


def _recorded_calls(
    model: nn.Module, units: Iterable[Unit], batch: Tensor
) -> dict[str, tuple[tuple[object, ...], dict[str, object]]]:
    """Unit id -> the arguments that the model gives the unit for ``batch``."""
    seen: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {}
    handles = [
        module_at(model, unit.path).register_forward_pre_hook(
            lambda _m, args, kwargs, name=unit.id: seen.update({name: (args, kwargs)}), with_kwargs=True
        )
        for unit in units
    ]
    with hooks(handles):
        model(batch)
    return seen


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
        if removal.action in KERNELS:
            put(student, removal.unit, kind.stand_in(removal.unit, removal.action).to(device))
    return student.eval()


def compare(
    original: nn.Module,
    student: nn.Module,
    batch: Tensor,
    *,
    rounds: int = 15,
    min_seconds: float = 2.0,
    max_seconds: float = 15.0,
) -> Rounds:
    """Interleaved forward passes of both models under the names "original" and "compressed"."""
    models = {"original": original, "compressed": student}
    return time_models(models, batch, rounds=rounds, min_seconds=min_seconds, max_seconds=max_seconds)


def spread(timing: Timing) -> str:
    """Median with quartiles, for people."""
    return f"{timing.median_ms:.4g} ms ({timing.low_ms:.4g} to {timing.high_ms:.4g})"
