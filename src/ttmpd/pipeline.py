"""``inspect`` and ``compress``: join the verbs. Reads like the paper's algorithm.

    adapt -> find units -> time and score them -> plan -> cut and repair -> distill -> measure
"""

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.adapt.base import Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.checkpoint import check_output, save_artifact
from ttmpd.distill.base import Distiller, Work
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import BudgetUnreachableError, InvalidValueError, ModelError, SamplesError, UnsupportedError
from ttmpd.facts import collect
from ttmpd.guard import logits_of
from ttmpd.method import check_range
from ttmpd.models import OpenedModel, open_model
from ttmpd.modules import clone, has_nan, to_fast_format, to_plain_format
from ttmpd.plan.base import Planner, most_saved
from ttmpd.plan.knapsack import Knapsack
from ttmpd.records import ACTIONS, Action, Fit, Option, Plan, Removal, Samples, Score
from ttmpd.repair import fold, repaired, replay
from ttmpd.samples import open_samples
from ttmpd.savings import UnitTiming, compare, skeleton, time_units
from ttmpd.score.base import Scorer
from ttmpd.score.ttmpd import TTMPD
from ttmpd.stages import Stages, disk_guarded, fingerprint, locked, weights_fingerprint
from ttmpd.targets import load_targets, save_targets
from ttmpd.units.base import Found
from ttmpd.units.block import Block

MAX_PLANS = 4
"""Rounds of planning, cutting and measuring before the best reachable is taken."""
MARGIN = 0.015
"""How much faster than asked a plan aims to be: measured medians move by about as much."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The latency that is asked for: a speedup, a share of the original's, or milliseconds per batch.

    Example:
        >>> Target.parse("0.5x").budget_ms(30.0), Target.parse("12ms").budget_ms(30.0), Target(speedup=2).budget_ms(30.0)
        (15.0, 12.0, 15.0)
    """

    speedup: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.ms is None):
            raise InvalidValueError("the target must be one of speedup and latency; give exactly one of them")
        if self.speedup is not None and not (math.isfinite(self.speedup) and self.speedup > 1):
            raise InvalidValueError(f"speedup must be greater than 1, but got {self.speedup!r}")
        if self.ms is not None and not (math.isfinite(self.ms) and self.ms > 0):
            raise InvalidValueError(f"latency must be greater than 0 ms, but got {self.ms!r}")

    @classmethod
    def parse(cls, text: str | float) -> "Target":
        """From ``"12ms"``, ``"0.5x"`` (a share of the original latency) or a number of milliseconds."""
        value, scale = str(text).strip().lower(), "ms"
        for suffix in ("ms", "x"):
            if value.endswith(suffix):
                value, scale = value.removesuffix(suffix).strip(), suffix
        try:
            number = float(value)
        except ValueError:
            raise InvalidValueError(f'latency must be like "12ms" or "0.5x", but got {text!r}') from None
        if scale == "x" and not 0 < number < 1:
            raise InvalidValueError(f"a share of the latency must lie between 0x and 1x, but got {text!r}")
        return cls(speedup=1 / number) if scale == "x" else cls(ms=number)

    def budget_ms(self, original_ms: float) -> float:
        """The latency to reach, in milliseconds."""
        return original_ms / self.speedup if self.speedup is not None else float(self.ms or 0.0)

    def __str__(self) -> str:
        return f"speedup {self.speedup:.4g}" if self.speedup is not None else f"latency {self.ms:.4g} ms"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that defines a run beside the model, the samples and the target."""

    adapt: Adapter = Norm()
    score: Scorer = TTMPD()
    plan: Planner = Knapsack()
    distill: Distiller = OneTime()
    actions: tuple[Action, ...] = ACTIONS
    num_samples: int = 500
    holdout: float = 0.15
    batch_size: int = 64
    device: str = "auto"
    seed: int = 0
    amp: str = "auto"
    time_budget: float = math.inf

    def __post_init__(self) -> None:
        check_range("num_samples", self.num_samples, 1)
        check_range("holdout", self.holdout, 0.0, 0.9)
        check_range("batch_size", self.batch_size, 1)
        check_range("time_budget", self.time_budget, 0.0)
        if not self.actions or not set(self.actions) <= set(ACTIONS):
            raise InvalidValueError(f"actions must be some of {', '.join(ACTIONS)}, but got {self.actions!r}")
        if self.amp not in ("auto", "on", "off"):
            raise InvalidValueError(f"amp must be auto, on or off, but got {self.amp!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: methods under their verbs."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            plain[item.name] = value.to_dict() if hasattr(value, "to_dict") else value
        plain["actions"] = list(self.actions)
        plain["time_budget"] = self.time_budget if math.isfinite(self.time_budget) else None
        return plain


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """What is known before a target is chosen: made once, serves many targets."""

    opened: OpenedModel
    source: nn.Module
    teacher: nn.Module
    samples: Samples
    held_out: Samples
    found: Found
    timings: tuple[UnitTiming, ...]
    original_ms: float
    scores: tuple[Score, ...]
    options: tuple[Option, ...]
    adapt_note: str
    adapt_facts: dict[str, float]
    settings: Settings
    deadline: float

    @property
    def batch(self) -> Tensor:
        """The batch on which latency is measured: the samples, repeated to the batch size."""
        device = next(self.source.parameters()).device
        size = self.settings.batch_size
        index = torch.arange(size) % len(self.samples)
        return self.samples.batch(index, device)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A compressed model with its proof.

    Args:
        model: a plain ``nn.Module`` in eval mode, on the CPU or the device asked for.
        plan: what was removed.
        facts: everything that was measured, as plain data: the report draws it.
        sample_ids: content hashes of the unlabelled samples that were used.
        opened: where the model came from.
        met: whether the measured latency meets the target.
    """

    model: nn.Module
    plan: Plan
    facts: dict[str, Any]
    sample_ids: tuple[str, ...]
    opened: OpenedModel
    met: bool

    def save(self, folder: str | Path) -> Path:
        """Write the artifact: plan.json, model.safetensors, README.md, report.html, report.json."""
        return save_artifact(
            Path(folder), model=self.model, plan=self.plan, opened=self.opened, sample_ids=self.sample_ids, facts=self.facts
        )

    save_pretrained = save


def choose_device(device: str) -> torch.device:
    """``"auto"`` is cuda, then mps, then cpu."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InvalidValueError(f"device must be auto, cpu, cuda or mps, but got {device!r}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compress(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    *,
    speedup: float | None = None,
    latency: str | float | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    **settings: Any,
) -> Result:
    """A faster model, adapted to the samples, with the measurements that prove it.

    Args:
        model: any classifier, or the id of one (``timm:NAME``, ``torchvision:NAME``, ``hf:...``, ``file.py:factory``).
        samples: unlabelled: a folder of images, an array file, a tensor, any iterable of batches, a Dataset or a
            DataLoader; a second element (labels) is ignored.
        speedup: how many times faster the result shall be, e.g. 2.0.
        latency: instead of ``speedup``: ``"12ms"`` per batch, or ``"0.5x"`` of the original.
        output: folder for the artifact; finished stages are kept there while the run lasts.
        resume: go on with what an interrupted run left in ``output``.
        command: recorded in the report.
        **settings: the fields of :class:`Settings`: ``adapt``, ``score``, ``plan``, ``distill`` (method instances),
            ``actions``, ``num_samples``, ``holdout``, ``batch_size``, ``device``, ``seed``, ``amp``, ``time_budget`` (s).

    Returns:
        The result; it is saved already when ``output`` is given.

    Raises:
        BudgetUnreachableError: no plan meets the target; ``best_ms`` says what can be reached.
        SamplesError, ModelError, UnsupportedError, InvalidValueError: see their messages.

    Example:
        >>> result = compress(net, "photos/", speedup=2.0)  # doctest: +SKIP
        >>> result.model(batch)  # doctest: +SKIP

    Source: TT-MPD (arXiv 2412.07114).
    """
    target = Target(speedup=speedup) if latency is None and speedup is not None else None
    if target is None:
        if latency is None or speedup is not None:
            raise InvalidValueError("the target must be one of speedup and latency; give exactly one of them")
        target = Target.parse(latency)
    return compress_many(
        model, samples, targets=[target], outputs=[output], resume=resume, command=command, **settings
    )[0]


def compress_many(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    *,
    targets: Sequence[Target],
    outputs: Sequence[str | Path | None] = (),
    resume: bool = False,
    command: str = "",
    **settings: Any,
) -> list[Result]:
    """The same for several targets: adaptation, timing, scores and the teacher's answers are made once.

    Args:
        model: as in :func:`compress`.
        samples: as in :func:`compress`.
        targets: one result each.
        outputs: one folder each, or none.
        resume: as in :func:`compress`.
        command: as in :func:`compress`.
        **settings: as in :func:`compress`.
    """
    chosen = settings_of(settings)
    folders = [None if o is None else Path(o) for o in (outputs or [None] * len(targets))]
    for folder in folders:
        if folder is not None:
            check_output(folder)
    results = []
    with prepared(model, samples, chosen, folders[0], resume) as (ready, stages):
        for number, (target, folder) in enumerate(zip(targets, folders, strict=True)):
            result = finish(ready, target, stages, number if len(targets) > 1 else None, command)
            if folder is not None:
                result.save(folder)
            results.append(result)
    return results


@contextmanager
def prepared(
    model: nn.Module | str | OpenedModel, samples: Any, chosen: Settings, output: Path | None = None, resume: bool = False
) -> Iterator[tuple[Ready, Stages]]:
    """What is made once for all targets, and the stages: kept in ``output`` until the block ends well."""
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    deadline = time.monotonic() + chosen.time_budget
    found = open_samples(samples, opened.preprocessing, n_samples=chosen.num_samples, seed=chosen.seed)
    few = _split(found, chosen)
    with _work_folder(output) as work:
        run = fingerprint(
            weights_fingerprint(opened.module), few[0].ids, few[1].ids, chosen.to_dict() | {"time_budget": None}
        )
        stages = Stages(work, run, resume)
        yield get_ready(opened, few, chosen, stages, deadline), stages


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings from keyword arguments, with a clear error for unknown ones."""
    known = {item.name for item in dataclasses.fields(Settings)}
    for name in given:
        if name not in known:
            raise InvalidValueError(f"a setting must be one of {', '.join(sorted(known))}, but got {name!r}")
    return Settings(**given)


@contextmanager
def _work_folder(output: Path | None) -> Iterator[Path]:
    """Where stages are kept: inside the output folder, removed once the artifact is written; else temporary."""
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="ttmpd-")
        with temporary as folder, disk_guarded(Path(folder)):
            yield Path(folder) / "work"
        return
    with locked(output), disk_guarded(output):
        for left in output.glob(".writing-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = output / ".work"
        yield work
        shutil.rmtree(work, ignore_errors=True)


def _split(samples: Samples, settings: Settings) -> tuple[Samples, Samples]:
    """(for fitting, held out), by seed."""
    n = len(samples)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    n_held = round(n * settings.holdout) if n > 1 else 0
    n_held = min(n - 1, n_held)
    if n - n_held < 2:
        raise SamplesError(f"compress must have at least 2 samples to fit on, but got {n - n_held}; give more samples")
    return samples.subset(order[n_held:]), samples.subset(order[:n_held])


def get_ready(
    opened: OpenedModel, few: tuple[Samples, Samples], settings: Settings, stages: Stages, deadline: float
) -> Ready:
    """Adapt the teacher, find, time and score the units."""
    samples, held_out = few
    device = choose_device(settings.device)
    source = to_plain_format(clone(opened.module).to(device)).eval()
    _check_answers(source, samples, device)
    kind = Block()
    with stages.timed("find"):
        found = kind.find(source, samples.batch(slice(0, 2), device))
    if not found.units:
        raise UnsupportedError(_nothing_to_remove(source, found))
    teacher = clone(source)
    state, told = stages.tensors("adapt", lambda: _adapt(teacher, samples, settings))
    teacher.load_state_dict(state)
    to_fast_format(teacher)
    ready = Ready(
        opened, source, teacher, samples, held_out, found, (), 0.0, (), (), told["note"], told["facts"], settings, deadline
    )
    timed = stages.json("timing", lambda: _time(ready, kind))
    scored = stages.json("score", lambda: _score(ready))
    timings = tuple(UnitTiming(**row) for row in timed["units"])
    scores = tuple(Score(**row) for row in scored)
    options = _options(scores, timings, settings.actions, kind)
    return dataclasses.replace(
        ready, timings=timings, original_ms=timed["original_ms"], scores=scores, options=options
    )


def _check_answers(model: nn.Module, samples: Samples, device: torch.device) -> None:
    logits = logits_of(model, samples.subset(range(min(4, len(samples)))), 4)
    if logits.dim() != 2 or has_nan(logits):
        what = "NaN or infinity" if has_nan(logits) else f"the shape {tuple(logits.shape)}"
        raise ModelError(
            f"{type(model).__name__} must answer each sample with one finite row of class scores, but got {what}; "
            "check the weights and the preprocessing"
        )


def _nothing_to_remove(model: nn.Module, found: Found) -> str:
    reasons = "; ".join(f"{path} {reason}" for path, reason in found.refused[:5])
    return (
        f"{type(model).__name__} must have a block whose output has the shape of its input, but none was found"
        f"{': ' + reasons if reasons else ''}; run `ttmpd inspect` for the whole list"
    )


def _adapt(teacher: nn.Module, samples: Samples, settings: Settings) -> tuple[dict[str, Tensor], dict[str, Any]]:
    to_fast_format(teacher)
    adapted = settings.adapt.adapt(teacher, samples, batch_size=settings.batch_size, seed=settings.seed)
    return adapted.model.state_dict(), {"note": adapted.note, "facts": adapted.facts}


def _time(ready: Ready, kind: Block) -> dict[str, Any]:
    """Unit and whole-model milliseconds of the source model in the plain memory format, as users run it."""
    units = time_units(ready.source, kind, ready.found.units, ready.batch)
    whole = compare(ready.source, ready.source, ready.batch, rounds=5, min_seconds=1.0)
    return {
        "original_ms": min(whole.timing("original").median_ms, whole.timing("compressed").median_ms),
        "units": [dataclasses.asdict(timing) for timing in units],
    }


def _score(ready: Ready) -> list[dict[str, Any]]:
    scores = ready.settings.score.score(
        ready.teacher,
        ready.found.units,
        ready.samples,
        batch_size=ready.settings.batch_size,
        seed=ready.settings.seed,
    )
    return [dataclasses.asdict(score) for score in scores]


def _options(
    scores: Sequence[Score], timings: Sequence[UnitTiming], actions: Sequence[Action], kind: Block
) -> tuple[Option, ...]:
    by_unit = {timing.unit: timing for timing in timings}
    return tuple(
        Option(score.unit, score.action, score.harm, by_unit[score.unit].saving(score.action).saved_ms)
        for score in scores
        if score.action in actions
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One round of the planner: what was predicted, what the cut model measured."""

    predicted_ms: float
    measured_ms: float
    harm: float
    actions: dict[str, Action]


def make_plan(ready: Ready, target: Target) -> tuple[Plan, list[Attempt]]:
    """Choose removals, cut, measure the cut model, and correct what was asked of the planner until it fits.

    Raises:
        BudgetUnreachableError: even removing every unit is predicted to be too slow.
    """
    budget = target.budget_ms(ready.original_ms)
    needed = ready.original_ms - budget * (1 - MARGIN)
    attempts: list[Attempt] = []
    for _ in range(MAX_PLANS):
        try:
            chosen = ready.settings.plan.choose(ready.options, needed, seed=ready.settings.seed)
        except BudgetUnreachableError as error:
            if attempts:
                break
            best = ready.original_ms - error.best_ms
            raise BudgetUnreachableError(_unreachable(ready, target, best), best) from None
        attempt = _try(ready, chosen)
        attempts.append(attempt)
        if attempt.measured_ms <= budget:
            break
        # The units saved less than they promised: ask for as much more as was missing, and a little.
        needed += (attempt.measured_ms - budget) * 1.1
    met = [attempt for attempt in attempts if attempt.measured_ms <= budget]
    best_attempt = min(met, key=lambda a: a.harm) if met else min(attempts, key=lambda a: a.measured_ms)
    actions = best_attempt.actions
    removals = tuple(Removal(unit, actions[unit.id]) for unit in ready.found.units if unit.id in actions)
    plan = Plan(removals, best_attempt.harm, ready.original_ms, budget, best_attempt.predicted_ms)
    return plan, attempts


def _unreachable(ready: Ready, target: Target, best_ms: float) -> str:
    return (
        f"the target must be reachable by removing blocks, but {target} is not: with all {len(ready.found.units)} "
        f"units removed {best_ms:.3g} of {ready.original_ms:.3g} ms remain; ask for --speedup "
        f"{max(1.01, math.floor(ready.original_ms / max(best_ms, 1e-9) * 95) / 100):.4g} or less"
    )


def _try(ready: Ready, chosen: Sequence[Option]) -> Attempt:
    actions = {option.unit: option.action for option in chosen}
    removals = [Removal(unit, actions[unit.id]) for unit in ready.found.units if unit.id in actions]
    cut = skeleton(ready.source, Block(), removals)
    rounds = compare(ready.source, cut, ready.batch, rounds=7, min_seconds=1.5)
    predicted = ready.original_ms - sum(option.saved_ms for option in chosen)
    measured = ready.original_ms / rounds.ratio("original", "compressed").median_ms
    return Attempt(predicted, measured, sum(max(0.0, option.harm) for option in chosen), actions)


def front(ready: Ready, shares: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)) -> list[dict[str, float]]:
    """Predicted harm over predicted latency: scores once, many targets."""
    rows = []
    for share in shares:
        needed = ready.original_ms * (1 - share)
        if needed > most_saved(ready.options):
            break
        chosen = ready.settings.plan.choose(ready.options, needed, seed=ready.settings.seed)
        rows.append(
            {
                "target": share,
                "predicted_ms": ready.original_ms - sum(o.saved_ms for o in chosen),
                "harm": sum(max(0.0, o.harm) for o in chosen),
                "n_removed": len(chosen),
            }
        )
    return rows


def finish(ready: Ready, target: Target, stages: Stages, number: int | None, command: str) -> Result:
    """Plan for one target, cut, repair, distill, measure."""
    suffix = "" if number is None else f"-{number}"
    plan, attempts = _plan(ready, target, stages, suffix)
    student = _repaired(ready, plan, stages, suffix)
    start = logits_of(student, ready.held_out, ready.settings.batch_size)
    fit, teacher_logits = _distill(ready, student, stages, f"-{fingerprint(plan.actions)[:8]}{suffix}")
    final = logits_of(student, ready.held_out, ready.settings.batch_size)
    with stages.timed("measure"):
        rounds = compare(ready.source, student, ready.batch)
    ratio = rounds.ratio("original", "compressed")
    met = ratio.high_ms >= ready.original_ms / plan.budget_ms
    facts = collect(
        ready, target=str(target), plan=plan, attempts=attempts, front=front(ready), student=student, rounds=rounds,
        fit=fit, logits=(teacher_logits, start, final), seconds=stages.seconds, command=command, met=met,
    )  # fmt: skip
    ids = ready.samples.ids + ready.held_out.ids
    return Result(student.cpu(), plan, facts, ids, ready.opened, met)


def _plan(ready: Ready, target: Target, stages: Stages, suffix: str) -> tuple[Plan, list[Attempt]]:
    def compute() -> dict[str, Any]:
        plan, attempts = make_plan(ready, target)
        return {
            "actions": plan.actions,
            "numbers": [plan.harm, plan.original_ms, plan.budget_ms, plan.predicted_ms],
            "attempts": [dataclasses.asdict(attempt) for attempt in attempts],
        }

    # The target is part of the file's name: the stages before serve every target.
    stored = stages.json(f"plan-{fingerprint(str(target))[:8]}{suffix}", compute)
    actions = stored["actions"]
    removals = tuple(Removal(unit, actions[unit.id]) for unit in ready.found.units if unit.id in actions)
    return Plan(removals, *stored["numbers"]), [Attempt(**row) for row in stored["attempts"]]


def _repaired(ready: Ready, plan: Plan, stages: Stages, suffix: str) -> nn.Module:
    batch = ready.samples.batch(slice(0, 2), next(ready.teacher.parameters()).device)
    made: nn.Module | None = None

    def compute() -> tuple[dict[str, Tensor], Any]:
        few = ready.samples.subset(range(min(256, len(ready.samples))))
        student = repaired(ready.teacher, plan.removals, few, batch_size=ready.settings.batch_size)
        fold(student, plan.removals, batch)
        nonlocal made
        made = student
        return student.state_dict(), None

    state, _ = stages.tensors(f"repair-{fingerprint(plan.actions)[:8]}{suffix}", compute)
    return made if made is not None else replay(ready.teacher, plan.removals, state)


def _distill(ready: Ready, student: nn.Module, stages: Stages, suffix: str) -> tuple[Fit, Tensor]:
    """Prepare targets once for all students, then train this student; the teacher is out of reach of ``fit``."""
    method, settings = ready.settings.distill, ready.settings
    work = Work(
        folder=stages.folder / "targets",
        batch_size=settings.batch_size,
        seed=settings.seed,
        deadline=ready.deadline,
        amp=settings.amp,
    )
    targets = load_targets(work.folder) if method.one_time else None
    if targets is None:
        with stages.timed("prepare"):
            targets = method.prepare(ready.teacher, ready.samples, ready.held_out, work)
        if method.one_time:
            save_targets(targets, work.folder)
    else:
        stages.reused.append("prepare")
    work = dataclasses.replace(work, folder=stages.folder / f"distill{suffix}")
    work.folder.mkdir(exist_ok=True)

    def compute() -> tuple[dict[str, Tensor], Any]:
        fit = method.fit(student, ready.samples, ready.held_out, targets, work)
        return student.state_dict(), dataclasses.asdict(fit)

    state, told = stages.tensors(f"distill{suffix}", compute)
    student.load_state_dict(state)
    return Fit(**told), targets.held_out
