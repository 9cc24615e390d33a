"""Before a target is chosen: select samples, adapt the teacher, find, time and score the units.

Made once, serves many targets.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ttmpd.data.open import by_length
from ttmpd.errors import UnsupportedError
from ttmpd.latency.lossless import find_lossless, unchanged
from ttmpd.latency.table import UnitLatency, runtime_ratio, time_units
from ttmpd.models.batch_size import ActivationMemory
from ttmpd.models.modules import clone, to_fast_format
from ttmpd.models.state import load_tensor_state, tensor_state
from ttmpd.pipeline.calibration import Calibration
from ttmpd.pipeline.preparation import PASS_SIZE, Prepared, latency_batch
from ttmpd.pipeline.settings import Settings, judged_kinds
from ttmpd.pipeline.stages import ADAPT_STAGE, Stages
from ttmpd.records import Action, Lossless, Option, Removal, Score, Unit
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.surgery.lossless import applied
from ttmpd.surgery.reasons import Refusal
from ttmpd.surgery.units.base import UnitSearch

MAX_TEXTS_PER_PASS = 32
"""Most texts of like length in one pass: a pass is as long as its longest text, and the rest of it is padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What was measured of a model and found in it before a target is chosen; one analysis serves many targets.

    Args:
        source: the model as it is, on the device.
        teacher: the same, adapted to the samples.
        calibration: the samples that were selected, and those held out; texts of like length side by side.
        batch: on which latency is measured.
        units: what can be removed, in the order of the network.
        not_removable: path -> why it is not, of what looks like a unit.
        latencies: of the units, after the lossless changes.
        original_ms: milliseconds per batch of the model as it is.
        lossless: what makes it faster without changing it.
        lossless_ms: milliseconds per batch after that.
        runtime_ratio: milliseconds of the model in the chosen runtime divided by those in eager PyTorch.
        adapt_note: what the adaptation did, in a sentence.
        adapt_facts: what it measured.
        memory: what the activations of a training step take.
        pass_size: samples per pass without gradients.
    """

    source: nn.Module
    teacher: nn.Module
    calibration: Calibration
    batch: Tensor
    units: tuple[Unit, ...]
    not_removable: Mapping[str, Refusal]
    latencies: tuple[UnitLatency, ...]
    original_ms: float
    lossless: Lossless
    lossless_ms: float
    runtime_ratio: float
    adapt_note: str
    adapt_facts: dict[str, float]
    memory: ActivationMemory
    pass_size: int

    def options(self, scores: Sequence[Score], actions: Sequence[Action]) -> tuple[Option, ...]:
        """The scored removals that are among the allowed actions, each with what it saves."""
        latencies = {latency.unit: latency for latency in self.latencies}
        holders = holders_of(self.units)
        options = []
        for score in scores:
            latency, n_kept = latencies[score.unit_id], len(score.kept)
            if score.action in actions and latency.offers(score.action, n_kept):
                saved_ms = latency.saved_ms(score.action, n_kept)
                held_by = holders[score.unit_id]
                options.append(Option(score.unit_id, score.action, score.harm, saved_ms, score.kept, held_by))
        return tuple(options)

    def removals(self, chosen: Sequence[Option]) -> tuple[Removal, ...]:
        """The chosen options as removals, in the order of the network."""
        options = {option.unit_id: option for option in chosen}
        return tuple(
            Removal(unit, options[unit.id].action, options[unit.id].kept) for unit in self.units if unit.id in options
        )


def analyze(prepared: Prepared, settings: Settings, stages: Stages) -> Analysis:
    """Select samples, adapt the teacher, find the units and time them.

    Raises:
        UnsupportedError: nothing can be removed from the model.
    """
    source, calibration = prepared.source, _selected(prepared, settings, stages)
    with stages.timed("find"):
        search = _find(source, calibration.fit.batch(slice(0, 2), prepared.device), settings)
    teacher = clone(source)
    state, adapted = stages.tensors(ADAPT_STAGE, lambda: _adapt(teacher, prepared, calibration, settings))
    load_tensor_state(teacher, state)
    batch = latency_batch(source, calibration.fit, settings)
    timed = stages.json("timing", lambda: _time(source, search.units, batch, settings))
    pass_size = prepared.pass_size(max(settings.batch_size, PASS_SIZE))
    if calibration.fit.is_text:
        pass_size = min(pass_size, MAX_TEXTS_PER_PASS)
        calibration = Calibration(*(by_length(part, pass_size) for part in (calibration.fit, calibration.held_out)))
    return Analysis(
        source=source,
        teacher=to_fast_format(teacher),
        calibration=calibration,
        batch=batch,
        units=search.units,
        not_removable=search.not_removable,
        latencies=tuple(UnitLatency(**row) for row in timed["units"]),
        original_ms=timed["original_ms"],
        lossless=Lossless.from_dict(timed),
        lossless_ms=timed["lossless_ms"],
        runtime_ratio=timed["runtime_ratio"],
        adapt_note=adapted["note"],
        adapt_facts=adapted["facts"],
        memory=prepared.memory,
        pass_size=pass_size,
    )


def scores_of(analysis: Analysis, settings: Settings, stages: Stages) -> tuple[Score, ...]:
    """Scores of all units of the teacher; made when first asked for, since where nothing has to go nobody does."""
    rows = stages.json("score", lambda: score_rows(analysis, analysis.teacher, analysis.units, settings))
    return tuple(score_of(row) for row in rows)


def score_rows(analysis: Analysis, model: nn.Module, units: Sequence[Unit], settings: Settings) -> list[dict[str, Any]]:
    """Scores of units of the teacher, or of a partly pruned student, as plain data."""
    scores = settings.score.score(
        model,
        units,
        analysis.calibration.fit,
        actions=settings.actions,
        batch_size=analysis.pass_size,
        seed=settings.seed,
    )
    return [dataclasses.asdict(score) for score in scores]


def score_of(row: dict[str, Any]) -> Score:
    """A score from plain data."""
    return Score(**row | {"kept": tuple(row["kept"])})


def _selected(prepared: Prepared, settings: Settings, stages: Stages) -> Calibration:
    """The calibration set with those samples to fit on that the selector chooses; as it is when there are no more."""
    pool, held_out = prepared.calibration.fit, prepared.calibration.held_out
    n = min(len(prepared.calibration), settings.num_samples) - len(held_out)
    if n >= len(pool):
        return prepared.calibration

    def compute() -> list[int]:
        teacher, size = to_fast_format(clone(prepared.source)), prepared.step_size(settings.batch_size)
        return list(settings.select.select(teacher, pool, n, batch_size=size, seed=settings.seed))

    return Calibration(pool.subset(stages.json("select", compute)), held_out)


def _find(source: nn.Module, batch: Tensor, settings: Settings) -> UnitSearch:
    """The units that the scorer can judge, and what is not removable; there is at least one unit."""
    search = find_units(source, batch, judged_kinds(settings.units, settings.score))
    units = tuple(unit for unit in search.units if settings.score.can_judge(source, unit))
    if not units:
        reasons = "; ".join(f"{path} {reason}" for path, reason in list(search.not_removable.items())[:5])
        raise UnsupportedError(
            f"{type(source).__name__} must have a block whose output has the shape of its input, but none was found"
            f"{': ' + reasons if reasons else ''}; run `ttmpd inspect` for the whole list"
        )
    return dataclasses.replace(search, units=units)


def _adapt(
    teacher: nn.Module, prepared: Prepared, calibration: Calibration, settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    size = prepared.step_size(settings.batch_size)
    adapted = settings.adapt.adapt(to_fast_format(teacher), calibration.fit, batch_size=size, seed=settings.seed)
    return tensor_state(adapted.model), {"note": adapted.note, "facts": adapted.facts}


def _time(source: nn.Module, units: Sequence[Unit], batch: Tensor, settings: Settings) -> dict[str, Any]:
    """Milliseconds of the model as it was given and after what is lossless, and of its units after that.

    Units are timed in eager PyTorch; their milliseconds are scaled by how the runtime changes the whole model's.
    """
    runtime = settings.runtime
    lossless, timings = (find_lossless if settings.lossless else unchanged)(source, batch, runtime=runtime)
    ratio = runtime_ratio(applied(source, lossless), batch, runtime)
    latencies = time_units(source, units, batch, lossless=lossless)
    original_ms = timings.timing("original").median_ms
    return {
        "original_ms": original_ms,
        "lossless_ms": original_ms / timings.ratio("original", "lossless").median_ms,
        **lossless.to_dict(),
        "runtime_ratio": ratio,
        "units": [dataclasses.asdict(latency.times(ratio)) for latency in latencies],
    }
