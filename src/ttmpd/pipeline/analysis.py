"""Before a target is chosen: select samples, adapt the teacher, find, time and score the units.

Made once, serves many targets.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.open import by_length
from ttmpd.data.samples import Samples
from ttmpd.errors import UnsupportedError
from ttmpd.latency.device import choose_device
from ttmpd.latency.lossless import find_lossless, unchanged
from ttmpd.latency.table import UnitLatency, runtime_ratio, time_units
from ttmpd.models.batch_size import samples_that_fit
from ttmpd.models.modules import clone, to_fast_format
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.calibration import Calibration
from ttmpd.pipeline.settings import Settings, judged_kinds
from ttmpd.pipeline.stages import ADAPT_STAGE, Stages
from ttmpd.records import Lossless, Option, Removal, Score, Unit
from ttmpd.surgery.exits.model import check_without_exits
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.surgery.lossless import applied
from ttmpd.surgery.units.base import UnitSearch
from ttmpd.tasks.base import Task
from ttmpd.training.task import assign_task, check_structure

PASS_SIZE = 64
"""Samples per pass, if memory has room, where latency is measured on fewer."""
TEXTS_ALIKE = 32
"""Most texts of like length in one pass: a pass is as long as its longest text, and the rest of it is padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What is known before a target is chosen: made once, serves many targets."""

    opened: OpenedModel
    source: nn.Module
    teacher: nn.Module
    calibration: Calibration
    found: UnitSearch
    timings: tuple[UnitLatency, ...]
    original_ms: float
    lossless: Lossless
    lossless_ms: float
    runtime_ratio: float
    adapt_note: str
    adapt_facts: dict[str, float]
    settings: Settings
    deadline: float
    pass_size: int
    stages: Stages

    @functools.cached_property
    def scores(self) -> tuple[Score, ...]:
        """Of all units of the teacher; made when first asked for, since where nothing has to go nobody does."""
        rows = self.stages.json("score", lambda: score_rows(self, self.teacher, self.found.units))
        return tuple(score_of(row) for row in rows)

    @property
    def batch(self) -> Tensor:
        """The batch on which latency is measured: the samples, repeated to the batch size."""
        return latency_batch(self.source, self.calibration.fit, self.settings)

    def options_of(self, scores: Sequence[Score]) -> tuple[Option, ...]:
        """The scored removals that the settings allow, each with what it saves."""
        by_unit = {timing.unit: timing for timing in self.timings}
        holders = holders_of(self.found.units)
        options = []
        for score in scores:
            timing, n_kept = by_unit[score.unit_id], len(score.kept)
            if score.action in self.settings.actions and timing.offers(score.action, n_kept):
                saved = timing.saved_ms(score.action, n_kept)
                options.append(
                    Option(score.unit_id, score.action, score.harm, saved, score.kept, holders[score.unit_id])
                )
        return tuple(options)

    def removals(self, chosen: Sequence[Option]) -> tuple[Removal, ...]:
        """The chosen options as removals, in the order of the network."""
        by_unit = {option.unit_id: option for option in chosen}
        return tuple(
            Removal(unit, by_unit[unit.id].action, by_unit[unit.id].kept)
            for unit in self.found.units
            if unit.id in by_unit
        )

    @property
    def options(self) -> tuple[Option, ...]:
        """Every removal on the unpruned teacher."""
        return self.options_of(self.scores)


def analyze(
    opened: OpenedModel, calibration: Calibration, settings: Settings, stages: Stages, deadline: float
) -> Analysis:
    """Adapt the teacher, find and time the units."""
    samples = calibration.fit
    device = choose_device(settings.device)
    source = source_of(opened, samples, device, settings.task)
    with stages.timed("find"):
        found = find_units(source, samples.batch(slice(0, 2), device), judged_kinds(settings.units, settings.score))
        found = dataclasses.replace(found, units=tuple(u for u in found.units if settings.score.can_judge(source, u)))
    if not found.units:
        raise UnsupportedError(_nothing_to_remove(source, found))
    teacher = clone(source)
    state, told = stages.tensors(ADAPT_STAGE, lambda: _adapt(teacher, samples, settings))
    teacher.load_state_dict(state)
    to_fast_format(teacher)
    batch = latency_batch(source, samples, settings)
    timed = stages.json("timing", lambda: _time(source, found, batch, settings))
    size = pass_size(source, samples, max(settings.batch_size, PASS_SIZE))
    if samples.is_text:
        size = min(size, TEXTS_ALIKE)
        calibration = Calibration(by_length(samples, size), by_length(calibration.held_out, size))
    return Analysis(
        opened=opened,
        source=source,
        teacher=teacher,
        calibration=calibration,
        found=found,
        timings=tuple(UnitLatency(**row) for row in timed["units"]),
        original_ms=timed["original_ms"],
        lossless=Lossless.from_dict(timed),
        lossless_ms=timed["lossless_ms"],
        runtime_ratio=timed["runtime_ratio"],
        adapt_note=told["note"],
        adapt_facts=told["facts"],
        settings=settings,
        deadline=deadline,
        pass_size=size,
        stages=stages,
    )


def source_of(opened: OpenedModel, samples: Samples, device: torch.device, task: Task | None = None) -> nn.Module:
    """A copy of the model as it is, on the device; it has answered.

    What its owner froze is frozen for another training: students of it learn in all of their layers.
    """
    check_without_exits(opened.module)
    source = clone(opened.module).to(device).eval()
    for parameter in source.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    few = samples.first(4).trimmed(slice(None), device)
    assign_task(source, few, task, opened.preprocessing)
    check_structure(source, few)
    return source


def selected(opened: OpenedModel, pool: Samples, n: int, settings: Settings, stages: Stages) -> Samples:
    """The ``n`` samples of the pool that the student is fitted on; the pool itself when it holds no more."""
    if n >= len(pool):
        return pool

    def compute() -> list[int]:
        source = to_fast_format(source_of(opened, pool, choose_device(settings.device), settings.task))
        return list(
            settings.select.select(source, pool, n, batch_size=step_size(source, pool, settings), seed=settings.seed)
        )

    return pool.subset(stages.json("select", compute))


def latency_batch(source: nn.Module, samples: Samples, settings: Settings) -> Tensor:
    """The batch on which latency is measured, on the model's device; text is as long as the longest sample in it.

    Which samples are in it depends on their contents, not on their order: lengths are mixed as in the data.
    """
    by_id = torch.tensor(sorted(range(len(samples)), key=samples.ids.__getitem__))
    index = by_id[torch.arange(settings.batch_size) % len(samples)]
    return samples.trimmed(index, next(source.parameters()).device)


def _nothing_to_remove(model: nn.Module, found: UnitSearch) -> str:
    reasons = "; ".join(f"{path} {reason}" for path, reason in list(found.not_removable.items())[:5])
    return (
        f"{type(model).__name__} must have a block whose output has the shape of its input, but none was found"
        f"{': ' + reasons if reasons else ''}; run `ttmpd inspect` for the whole list"
    )


def _adapt(teacher: nn.Module, samples: Samples, settings: Settings) -> tuple[dict[str, Tensor], dict[str, Any]]:
    to_fast_format(teacher)
    size = step_size(teacher, samples, settings)
    adapted = settings.adapt.adapt(teacher, samples, batch_size=size, seed=settings.seed)
    return adapted.model.state_dict(), {"note": adapted.note, "facts": adapted.facts}


def _time(source: nn.Module, found: UnitSearch, batch: Tensor, settings: Settings) -> dict[str, Any]:
    """Milliseconds of the model as it was given and after what is lossless, and of its units after that.

    Units are timed in eager PyTorch; their milliseconds are scaled by how the runtime changes the whole model's.
    """
    runtime = settings.runtime
    how, rounds = (find_lossless if settings.lossless else unchanged)(source, batch, runtime=runtime)
    ratio = runtime_ratio(applied(source, how), batch, runtime)
    units = time_units(source, found.units, batch, how=how)
    original_ms = rounds.timing("original").median_ms
    return {
        "original_ms": original_ms,
        "lossless_ms": original_ms / rounds.ratio("original", "lossless").median_ms,
        **how.to_dict(),
        "runtime_ratio": ratio,
        "units": [dataclasses.asdict(timing.times(ratio)) for timing in units],
    }


def step_size(model: nn.Module, samples: Samples, settings: Settings) -> int:
    """Samples per pass with gradients: as many as latency is measured on, and no fewer than do well."""
    if settings.batch_size >= PASS_SIZE:
        return settings.batch_size
    few = samples.trimmed(slice(0, 2), next(model.parameters()).device)
    return max(settings.batch_size, samples_that_fit(model, few, PASS_SIZE))


def pass_size(model: nn.Module, samples: Samples, most: int) -> int:
    """Samples per pass without gradients: twice as many as a training step may have, which keeps what they need."""
    few = samples.trimmed(slice(0, 2), next(model.parameters()).device)
    return min(most, 2 * samples_that_fit(model, few, most))


def score_rows(analysis: Analysis, model: nn.Module, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Scores of units of the teacher, or of a student on the way, as plain data."""
    scores = analysis.settings.score.score(
        model,
        units,
        analysis.calibration.fit,
        actions=analysis.settings.actions,
        batch_size=analysis.pass_size,
        seed=analysis.settings.seed,
    )
    return [dataclasses.asdict(score) for score in scores]


def score_of(row: dict[str, Any]) -> Score:
    """A score from plain data."""
    return Score(**row | {"kept": tuple(row["kept"])})
