"""``inspect`` and ``preview``: what could be removed, and what a run would do, before anything is changed."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from ttmpd.latency.device import Machine, choose_device, machine
from ttmpd.latency.table import UnitLatency, time_units
from ttmpd.latency.timing import Timing, time_models
from ttmpd.method import check_range, method_of
from ttmpd.models.example import example_batch
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import count_parameters
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.analysis import Analysis
from ttmpd.pipeline.candidates import rescored_path
from ttmpd.pipeline.planning import MeasuredPlan, make_plan, needed_ms
from ttmpd.pipeline.preparation import working_copy
from ttmpd.pipeline.reach import within_reach
from ttmpd.pipeline.run import analyzed
from ttmpd.pipeline.settings import DEFAULT_UNITS, Target, check_kinds, settings_of
from ttmpd.records import Unit
from ttmpd.surgery.exits.model import check_without_exits
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.tasks.base import Task
from ttmpd.training.task import task_of


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
        task: what the model predicts: the name of a file in ``ttmpd/tasks``.
    """

    model: str
    parameters: int
    macs: int
    input_shape: tuple[int, ...]
    units: tuple[Unit, ...]
    refused: tuple[tuple[str, str], ...]
    batch_size: int
    machine: Machine
    whole: Timing | None = None
    timings: tuple[UnitLatency, ...] = ()
    task: str = "classification"

    @property
    def removable_share(self) -> float:
        """Share of the MACs that the units hold, parts of other units not counted twice."""
        holders = holders_of(self.units)
        outer = [unit for unit in self.units if not holders[unit.id]]
        return sum(unit.macs for unit in outer) / max(1, self.macs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: each unit with its id, its shares and, when timed, its milliseconds."""
        ms = {timing.unit: timing for timing in self.timings}
        units = []
        for unit in self.units:
            row = {"id": unit.id} | dataclasses.asdict(unit) | {"macs_share": unit.macs / max(1, self.macs)}
            if self.whole is not None:
                row["ms"] = ms[unit.id].ms
                row |= {f"{action}_ms": value for action, value in ms[unit.id].replacements.items()}
                row["ms_share"] = ms[unit.id].ms / self.whole.median_ms
            units.append(row)
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["machine"] = dataclasses.asdict(self.machine)
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
    task: Task | str | None = None,
) -> Inspection:
    """What can be removed from a model, what cannot and why, and how long each part takes here.

    Args:
        model: as in :func:`ttmpd.compress`.
        samples: real inputs; random values in the model's own input size when None.
        batch_size: on which milliseconds are measured.
        device: "auto", "cpu", "cuda", "mps".
        timed: False leaves the clock alone.
        units: the kinds to look for, as in :class:`ttmpd.Settings`.
        task: what the model predicts; None detects it.

    Raises:
        InvalidValueError: there are no samples and the model does not say how large its input is.
        ModelError: the model cannot be run.

    Example:
        >>> from ttmpd.demo.digits import demo_model
        >>> inspection = inspect(demo_model(), timed=False)
        >>> len(inspection.units), inspection.units[0].id
        (25, 'stage1.0')
    """
    check_range("batch_size", batch_size, 1)
    check_kinds(units)
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    check_without_exits(opened.module)
    where = choose_device(device)
    batch = example_batch(opened, samples, batch_size).to(where)
    pair = batch[:2]
    net = working_copy(opened, pair, cast(Task, method_of("task", task)) if isinstance(task, str) else task)
    search = find_units(net, pair, units)
    inspection = Inspection(
        type(net).__name__,
        count_parameters(net),
        count_macs(net, pair)[""],
        tuple(batch.shape[1:]),
        search.units,
        tuple((path, str(refusal)) for path, refusal in search.not_removable.items()),
        batch_size,
        machine(where),
        task=task_of(net).name,
    )
    if not timed:
        return inspection
    whole = time_models({"whole": net}, batch, rounds=5, min_seconds=0.5).timing("whole")
    latencies = time_units(net, search.units, batch, rounds=3, min_seconds=0.5)
    return dataclasses.replace(inspection, whole=whole, timings=latencies)


@dataclasses.dataclass(frozen=True, eq=False)
class Preview:
    """What ``compress`` would do.

    Args:
        analysis: the units with their latencies, and the adapted teacher.
        plans: the plan for each target with the planner's rounds; the last one measured the cut model.
        seconds: per stage.
    """

    analysis: Analysis
    plans: tuple[MeasuredPlan, ...]
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

    Example:
        >>> import torch
        >>> from ttmpd.pipeline.settings import Target
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> quick = {"score": "magnitude", "adapt": "none", "lossless": False, "batch_size": 8, "num_samples": 40}
        >>> plans = preview(tiny_model(), torch.rand(40, 3, 8, 8), targets=[Target(macs=0.9)], **quick).plans
        >>> len(plans)
        1
    """
    chosen = settings_of(settings)
    with analyzed(model, samples, chosen) as (analysis, run):
        analysis = within_reach(analysis, targets, chosen, run.stages)
        path = rescored_path(analysis, max(needed_ms(analysis, target) for target in targets), chosen, run.stages)
        plans = tuple(make_plan(analysis, path, target, settings=chosen, stages=run.stages) for target in targets)
        return Preview(analysis, plans, run.stages.seconds())
