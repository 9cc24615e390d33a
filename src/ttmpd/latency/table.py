"""Milliseconds that each removal saves, measured on this device."""

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttmpd.latency.device import synchronize
from ttmpd.latency.timing import Timings, forward_call, interleaved, time_models
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import common_path, module_at
from ttmpd.models.run import evaluating, first_tensor
from ttmpd.models.taps import Tap, read_taps
from ttmpd.models.trace import trace
from ttmpd.records import UNCHANGED, Action, DepthUnit, Lossless, Unit, WidthUnit
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager
from ttmpd.surgery.cut import has_replacement, replacement
from ttmpd.surgery.find import holders_of, width_kind
from ttmpd.surgery.lossless import applied, apply, within

PRECISION = 0.015
"""How well a speedup is to be known: its standard error over it. On an idle machine a few rounds say more than this."""


LARGE = 64 * 2**20
"""Bytes of a map beyond which the units around it are timed by themselves."""


_Arguments = tuple[tuple[object, ...], dict[str, object]]
"""The arguments of a call."""


@dataclass(frozen=True, slots=True)
class UnitLatency:
    """Milliseconds per batch of a unit, of its replacements (action -> ms) and of its widths (members -> ms)."""

    unit: str
    ms: float
    replacements: Mapping[str, float]
    widths: Mapping[str, float] = field(default_factory=dict)

    def times(self, factor: float) -> "UnitLatency":
        """All of these milliseconds multiplied by a factor."""
        replacements, widths = (
            {name: ms * factor for name, ms in values.items()} for values in (self.replacements, self.widths)
        )
        return UnitLatency(self.unit, self.ms * factor, replacements, widths)

    def offers(self, action: Action, n_kept: int = 0) -> bool:
        """True when the action was timed."""
        if action == "narrow":
            return str(n_kept) in self.widths
        return (action == "drop" and not self.widths) or action in self.replacements

    def saved_ms(self, action: Action, n_kept: int = 0) -> float:
        """Milliseconds per batch that the action saves; negative where a replacement is slower than the unit."""
        left = self.widths[str(n_kept)] if action == "narrow" else self.replacements.get(action, 0.0)
        return self.ms - left


def time_units(
    model: nn.Module,
    units: Sequence[Unit],
    batch: Tensor,
    *,
    lossless: Lossless = UNCHANGED,
    rounds: int = 7,
    min_seconds: float = 1.0,
) -> tuple[UnitLatency, ...]:
    """Time every unit, its replacements and its widths on the input it really gets, in eager PyTorch.

    Units alike in class, shape, weights and operations are timed as one: they differ by noise alone. Members are timed
    with everything in the smallest module that holds them and what reads them; where that is most of the network, which
    would drown what they save, the layers that make and read them are timed alone. A unit's own milliseconds are what
    would be saved without any member. Of the branch beside a shortcut its own modules are timed. Of many widths every
    second one is timed, those between lie on the line.

    Args:
        model: on the device, as it was given.
        units: what to time.
        batch: a batch of the size that latency is promised for.
        lossless: changes that are made to the model, and therefore to everything that is timed.
        rounds: interleaved rounds over all units.
        min_seconds: see :func:`ttmpd.latency.timing.interleaved`.
    """
    if not units:
        return ()
    representatives = {_signature(unit): unit for unit in reversed(units)}
    numbered = dict(enumerate(representatives.values()))
    median: dict[str, float] = {}
    deployed = applied(model, lossless)
    with evaluating(model), evaluating(deployed):
        far = _far_apart(model, numbered.values(), batch)
        groups = _groups(model, numbered, far, batch)
        for group in groups:
            runs = _runs(_Timed(model, deployed, lossless), group, far, batch)
            timings = interleaved(runs, rounds=rounds, warmup=2, min_seconds=min_seconds / len(groups))
            median |= {name: statistics.median(values) for name, values in timings.ms.items()}
    numbers = {signature: number for number, signature in enumerate(representatives)}
    return _bounded(units, [_timing(unit, numbers[_signature(unit)], median) for unit in units])


def runtime_ratio(model: nn.Module, batch: Tensor, runtime: Runtime) -> float:
    """Milliseconds of a model in a runtime divided by those in eager PyTorch, in which single units are timed.

    Args:
        model: on the batch's device, in the form in which it is used.
        batch: of the size that latency is promised for.
        runtime: runs whole models.

    Returns:
        What the milliseconds of units are multiplied by; 1 for eager PyTorch, which is not timed against itself.
    """
    if isinstance(runtime, Eager):
        return 1.0
    with evaluating(model):
        runtimes = {"run": runtime, "eager": Eager()}
        calls = {name: forward_call(model, batch, runtime=each) for name, each in runtimes.items()}
        return interleaved(calls, rounds=7, min_seconds=1.0, max_seconds=5.0).ratio("run", "eager").median_ms


def _bounded(units: Sequence[Unit], timings: Sequence[UnitLatency]) -> tuple[UnitLatency, ...]:
    """The timings, those of units no longer than any unit that holds them: more than that is noise."""
    holders, bounded = holders_of(units), {timing.unit: timing for timing in timings}
    for unit in sorted(units, key=lambda unit: len(holders[unit.id])):
        timing = bounded[unit.id]
        limit = min((bounded[holder].ms for holder in holders[unit.id]), default=timing.ms)
        if timing.ms > limit:
            bounded[unit.id] = timing.times(limit / timing.ms)
    return tuple(bounded[unit.id] for unit in units)


def _groups(model: nn.Module, units: Mapping[int, Unit], far: Set[str], batch: Tensor) -> list[dict[int, Unit]]:
    """Units that are timed in turn: all together, but those apart whose maps are large, or which are far apart.

    Large maps of many sizes, allocated in changing order, leave freed memory in pieces that add up to gigabytes.
    """
    largest = _largest_maps(model, batch)
    groups: dict[str, dict[int, Unit]] = {}
    for number, unit in units.items():
        place = timed_path(unit)
        key = unit.id if unit.id in far else place if largest.get(place, 0) > LARGE else ""
        groups.setdefault(key, {})[number] = unit
    return list(groups.values())


def _largest_maps(model: nn.Module, batch: Tensor) -> dict[str, int]:
    """Path -> bytes of the largest tensor that the module, or any in it, answers with for the batch."""
    pair, largest = batch[:2], dict[str, int]()
    for call in trace(model, pair).calls:
        if call.output is not None and issubclass(call.output_type, Tensor):
            size = call.output.n_bytes * len(batch) // len(pair)
            names = call.path.split(".")
            for holder in (".".join(names[:n]) for n in range(1, len(names) + 1)):
                largest[holder] = max(largest.get(holder, 0), size)
    return largest


@dataclass(frozen=True, slots=True, eq=False)
class _Timed:
    """What is timed: the model as it was given, for what is cut from it, and as it will be used, for what stays."""

    model: nn.Module
    deployed: nn.Module
    lossless: Lossless


def _runs(timed: _Timed, units: Mapping[int, Unit], far: Set[str], batch: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed: number of the unit and name of what runs in its place -> the call."""
    near = {path for unit in units.values() if unit.id not in far for path in _timed_paths(unit)}
    arguments = _recorded_calls(timed.deployed, near, batch) if near else {}
    return {
        f"{number} {name}": _synchronized(run, batch.device)
        for number, unit in units.items()
        for name, run in (_layers(timed, unit, batch) if unit.id in far else _variants(timed, unit, arguments)).items()
    }


def count_units(units: Sequence[Unit]) -> tuple[UnitLatency, ...]:
    """A latency table with millions of multiply-accumulates per sample in the place of milliseconds."""
    return tuple(_counted(unit) for unit in units)


def _counted(unit: Unit) -> UnitLatency:
    millions = unit.macs / 1e6
    if isinstance(unit, WidthUnit):
        return UnitLatency(unit.id, millions, {}, {str(n): millions * n / unit.n_members for n in unit.widths})
    per_weight = math.prod(unit.shape) * unit.channels / 1e6
    return UnitLatency(unit.id, millions, {"linear": per_weight} if has_replacement(unit) else {})


def _far_apart(model: nn.Module, units: Iterable[Unit], batch: Tensor) -> frozenset[str]:
    """Ids of units with members of which no module that is called holds all but one that does most of the work.

    Those between two blocks, say, or in a list or dictionary of layers, which a model's own forward calls one by one.
    """
    spread = [unit for unit in units if isinstance(unit, WidthUnit) and len(unit.paths) > 1]
    if not spread:
        return frozenset()
    macs = count_macs(model, batch[:2])
    return frozenset(unit.id for unit in spread if macs.get(timed_path(unit), math.inf) > macs[""] / 2)


def _layers(timed: _Timed, unit: Unit, batch: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of a unit far apart, at every width: the layers that make and read its members."""
    taps = {path: Tap(path, "input") for path in unit.paths}
    inputs = read_taps(timed.deployed, batch, taps)
    runs = {"unit": _in_turn(timed.deployed, inputs)}
    assert isinstance(unit, WidthUnit)
    for width in _timed_widths(unit):
        smaller = copy.deepcopy(timed.model)
        width_kind(unit).narrow(smaller, unit, range(width))
        apply(smaller, timed.lossless)
        narrow = read_taps(smaller, batch[:2], taps)  # as wide as the inputs are now
        cut_inputs = {path: _compact(x[:, *map(slice, narrow[path].shape[1:])], like=x) for path, x in inputs.items()}
        runs[str(width)] = _in_turn(smaller, cut_inputs)
    return runs


def _compact(part: Tensor, like: Tensor) -> Tensor:
    """A part of a tensor in memory of its own, in the same format."""
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return part.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _in_turn(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """Runs the model's layers one after the other, each on its input."""
    calls = [functools.partial(module_at(model, path), x) for path, x in inputs.items()]
    return lambda: [call() for call in calls]


def _variants(timed: _Timed, unit: Unit, arguments: Mapping[str, _Arguments]) -> dict[str, Callable[[], object]]:
    """What is timed of a unit: itself as "unit", and what may come in its place under the action or the width."""
    # In-place activations at a block's start would change the recorded input: each call gets the same anyway.
    paths = _timed_paths(unit)
    calls = [
        functools.partial(module_at(timed.deployed, path), *arguments[path][0], **arguments[path][1]) for path in paths
    ]
    runs: dict[str, Callable[[], object]] = {"unit": lambda: [call() for call in calls]}
    place = paths[-1]
    args, kwargs = arguments[place]
    if isinstance(unit, WidthUnit):
        kind = width_kind(unit)
        for width in _timed_widths(unit):
            smaller = _Held(copy.deepcopy(module_at(timed.model, place)))
            kind.narrow(smaller, _inside(unit), range(width))
            apply(smaller, within(timed.lossless, place, "held"))
            runs[str(width)] = functools.partial(smaller, *args, **kwargs)
        return runs
    if has_replacement(unit):
        x = first_tensor(args or kwargs)
        assert x is not None
        linear = apply(replacement(unit).to(x.device).eval(), within(timed.lossless, place))
        runs["linear"] = functools.partial(linear, x)
    return runs


def _timing(unit: Unit, number: int, median: Mapping[str, float]) -> UnitLatency:
    whole = median[f"{number} unit"]
    if not isinstance(unit, WidthUnit):
        replacements = {"linear": median[f"{number} linear"]} if has_replacement(unit) else {}
        return UnitLatency(unit.id, whole, replacements)
    timed = _timed_widths(unit)
    left = _falling([whole, *(median[f"{number} {width}"] for width in timed)])
    ms = (left[0] - left[-1]) * unit.n_members / (unit.n_members - timed[-1])
    saved = [left[0] - value for value in reversed(left)]
    between = np.interp(unit.widths, [*reversed(timed), unit.n_members], saved)
    return UnitLatency(
        unit.id, ms, {}, {str(n): ms - float(value) for n, value in zip(unit.widths, between, strict=True)}
    )


def _falling(values: Sequence[float]) -> list[float]:
    """The nearest values that never rise: fewer members never take longer, what says so is noise.

    Isotonic regression by pooling what rises (Ayer et al., 1955). A running minimum would follow the noise downwards.

    Example:
        >>> _falling([5.0, 3.0, 4.0, 1.0])
        [5.0, 3.5, 3.5, 1.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, n = value, 1
        while pools and pools[-1][0] < mean:
            before, n_before = pools.pop()
            mean, n = (before * n_before + mean * n) / (n_before + n), n_before + n
        pools.append((mean, n))
    return [mean for mean, n in pools for _ in range(n)]


def _timed_widths(unit: WidthUnit) -> tuple[int, ...]:
    """The widths that are timed, widest first: of many every second one, the narrowest among them."""
    return unit.widths[::-2][::-1] if len(unit.widths) > 4 else unit.widths


def timed_path(unit: Unit) -> str:
    """Path of the smallest module that holds everything of the unit."""
    return common_path(*unit.paths)


def _timed_paths(unit: Unit) -> tuple[str, ...]:
    """Paths of what is run to time a unit: its own modules where it is a branch, else the one that holds them all."""
    return unit.paths if isinstance(unit, DepthUnit) and unit.branch else (timed_path(unit),)


class _Held(nn.Module):
    """Holds the module that is timed: even the whole of it may be replaced."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


def _inside(unit: WidthUnit) -> WidthUnit:
    """The unit with its paths as seen from what holds the module that is timed."""
    n = len(prefix) + 1 if (prefix := timed_path(unit)) else 0
    producers, consumers = (tuple(f"held.{path[n:]}" for path in paths) for paths in (unit.producers, unit.consumers))
    return dataclasses.replace(unit, path=consumers[0], producers=producers, consumers=consumers)


def _signature(unit: Unit) -> tuple[object, ...]:
    return (
        unit.kind,
        unit.module,
        unit.shape,
        unit.n_params,
        unit.macs,
        unit.widths if isinstance(unit, WidthUnit) else (),
    )


def _recorded_calls(model: nn.Module, paths: Set[str], batch: Tensor) -> dict[str, _Arguments]:
    """Path -> the arguments that the model gives the module there for ``batch``."""
    arguments: dict[str, _Arguments] = {}
    for call in trace(model, batch, paths=paths, values=True).calls:
        arguments |= {name: (call.args, dict(call.kwargs)) for name in call.names}
    return arguments


def _synchronized(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def timed() -> None:
        with torch.no_grad():
            run()
        synchronize(device)

    return timed


def compare(
    original: nn.Module,
    student: nn.Module,
    batch: Tensor,
    *,
    unpruned: nn.Module | None = None,
    runtime: Runtime = Eager(),
    rounds: int = 15,
    min_seconds: float = 2.0,
    max_seconds: float = 10.0,
    precision: float = PRECISION,
) -> Timings:
    """Interleaved forward passes under the names "original" and "compressed", and "lossless" where that is given.

    It takes longer, up to twice ``max_seconds``, until the speedup is known to ``precision``.

    Args:
        original: the model before.
        student: the compressed model.
        batch: what all of them are run on.
        unpruned: the model with the lossless changes alone.
        runtime: runs all of them.
        rounds: see :func:`ttmpd.latency.timing.interleaved`.
        min_seconds: of the counted rounds together.
        max_seconds: of the counted rounds together.
        precision: standard error of the speedup, as a share of it.
    """
    models = {"original": original, "compressed": student} | ({} if unpruned is None else {"lossless": unpruned})
    return time_models(
        models,
        batch,
        rounds=rounds,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        precision=precision,
        runtime=runtime,
    )
