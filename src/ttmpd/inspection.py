"""``inspect`` and ``preview``: what could be removed, and what a run would do, before anything is changed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.choosing import walk
from ttmpd.early_exit._model import check_without_exits
from ttmpd.errors import InvalidValueError
from ttmpd.method import check_range
from ttmpd.models import OpenedModel, open_model
from ttmpd.modules import clone, count_macs, count_parameters
from ttmpd.pipeline import prepared
from ttmpd.planning import Planned, make_plan, needed_ms
from ttmpd.ready import Ready
from ttmpd.records import Timing, Unit
from ttmpd.samples import open_samples
from ttmpd.savings import UnitTiming, time_units
from ttmpd.settings import DEFAULT_UNITS, Target, check_kinds, choose_device, settings_of
from ttmpd.surgery import find_units, whole_of
from ttmpd.text import Tokenization, random_ids
from ttmpd.timing import machine, time_models


@dataclasses.dataclass(frozen=True, slots=True)
class Inspection:
    """What a model offers.

    Args:
        model: class name.
        parameters: of the whole model.
        macs: multiply-accumulates per sample of the whole model.
        input_shape: of one sample.
        units: removable, in the order of the network.
        refused: (path, reason) of what looks like a unit and is not removable.
        batch_size: on which the milliseconds were measured.
        machine: device, threads and torch version they belong to.
        whole: milliseconds per batch of the whole model; None when nothing was timed.
        timings: milliseconds per batch of each unit; empty when nothing was timed.
    """

    model: str
    parameters: int
    macs: int
    input_shape: tuple[int, ...]
    units: tuple[Unit, ...]
    refused: tuple[tuple[str, str], ...]
    batch_size: int
    machine: dict[str, str | int]
    whole: Timing | None = None
    timings: tuple[UnitTiming, ...] = ()

    @property
    def removable_share(self) -> float:
        """Share of the MACs that the units hold, parts of other units not counted twice."""
        outer = [unit for unit in self.units if not whole_of(unit, self.units)]
        return sum(unit.macs for unit in outer) / max(1, self.macs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: each unit with its id, its shares and, when timed, its milliseconds."""
        ms = {timing.unit: timing for timing in self.timings}
        units = []
        for unit in self.units:
            row = {"id": unit.id} | dataclasses.asdict(unit) | {"macs_share": unit.macs / max(1, self.macs)}
            if self.whole is not None:
                row["ms"] = ms[unit.id].ms
                row |= {f"{action}_ms": stand_in for action, stand_in in ms[unit.id].stand_ins.items()}
                row["ms_share"] = ms[unit.id].ms / self.whole.median_ms
            units.append(row)
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["whole"] = None if self.whole is None else dataclasses.asdict(self.whole)
        del plain["timings"]
        return plain | {"units": units}


def inspect(
    model: nn.Module | str | OpenedModel,
    samples: Any = None,
    *,
    batch_size: int = 64,
    device: str = "auto",
    timed: bool = True,
    units: Sequence[str] = DEFAULT_UNITS,
) -> Inspection:
    """What can be removed from a model, what cannot and why, and how long each part takes here.

    Args:
        model: as in :func:`ttmpd.compress`.
        samples: real inputs; random values in the model's own input size when None.
        batch_size: on which milliseconds are measured.
        device: "auto", "cpu", "cuda", "mps".
        timed: False leaves the clock alone.
        units: the kinds to look for, as in :class:`ttmpd.Settings`.

    Raises:
        InvalidValueError: there are no samples and the model does not say how large its input is.
        ModelError: the model cannot be run.

    Example:
        >>> from ttmpd.demo import demo_model
        >>> found = inspect(demo_model(), timed=False)
        >>> len(found.units), found.units[0].id
        (12, 'stage1.0')
    """
    check_range("batch_size", batch_size, 1)
    check_kinds(units)
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    where = choose_device(device)
    check_without_exits(opened.module)
    net = clone(opened.module).to(where).eval()
    batch = example_batch(opened, samples, batch_size).to(where)
    few = batch[:2]
    found = find_units(net, few, units)
    known = Inspection(
        type(net).__name__,
        count_parameters(net),
        count_macs(net, few)[""],
        tuple(batch.shape[1:]),
        found.units,
        found.refused,
        batch_size,
        machine(where),
    )
    if not timed:
        return known
    whole = time_models({"whole": net}, batch, rounds=5, min_seconds=0.5).timing("whole")
    timings = time_units(net, found.units, batch, rounds=3, min_seconds=0.5)
    return dataclasses.replace(known, whole=whole, timings=timings)


def example_batch(opened: OpenedModel, samples: Any = None, batch_size: int = 64, shape: Sequence[int] = ()) -> Tensor:
    """A batch of the right shape: real inputs, repeated to the size, or random values.

    Args:
        opened: says how large its input is.
        samples: real inputs, or None.
        batch_size: rows of the batch.
        shape: of one input, for a model that does not say it; the number of tokens for one that takes text.

    Raises:
        InvalidValueError: nothing says how large an input is.
    """
    if samples is not None:
        found = open_samples(samples, opened.preprocessing, n_samples=batch_size)
        return found.trimmed(torch.arange(batch_size) % len(found))
    if isinstance(opened.preprocessing, Tokenization):
        longest = opened.preprocessing.max_length
        return random_ids(opened.module, opened.preprocessing, (batch_size, *(shape or (longest,))))
    if opened.preprocessing is not None:
        shape = opened.preprocessing.input_size
    if not shape:
        raise InvalidValueError(
            "a model must say how large its input is, but has no preprocessing; give some samples (--data), or set a "
            "dict `pretrained_cfg` on the module with input_size, mean and std"
        )
    return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Preview:
    """What ``compress`` would do.

    Args:
        ready: timings, scores and the adapted teacher.
        plans: the plan for each target with the planner's rounds; the last one measured the cut model.
        seconds: per stage.
    """

    ready: Ready
    plans: tuple[Planned, ...]
    seconds: dict[str, float]


def preview(
    model: nn.Module | str | OpenedModel, samples: Any, *, targets: Sequence[Target], **settings: Any
) -> Preview:
    """Adapt, find, time, score and plan as :func:`ttmpd.compress_many` would, and stop there; nothing is kept.

    Args:
        model: as in :func:`ttmpd.compress`.
        samples: as in :func:`ttmpd.compress`.
        targets: one plan each.
        **settings: as in :func:`ttmpd.compress`.

    Raises:
        BudgetUnreachableError: a target cannot be reached.
    """
    with prepared(model, samples, settings_of(settings)) as (ready, stages):
        waypoints = walk(ready, max(needed_ms(ready, target) for target in targets), stages)
        plans = tuple(make_plan(ready, waypoints, target) for target in targets)
        return Preview(ready, plans, stages.seconds())
