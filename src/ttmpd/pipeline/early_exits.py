"""``add_early_exits``: put exits on a model, and choose how sure a sample must be to leave for a mean latency."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.artifact.measurements import AttemptReport, ExitReport, ExitsReport, TargetReport
from ttmpd.artifact.write import Result, check_output
from ttmpd.data.labels import Labels, open_labels
from ttmpd.data.samples import Samples
from ttmpd.early_exit.base import EarlyExit, Equipped
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.pipeline import defaults
from ttmpd.pipeline.exit_choice import ThresholdChoice, choose, fitted, time_exits
from ttmpd.pipeline.exit_threshold import ExitConfidences, curve, exit_answers, exit_confidences
from ttmpd.pipeline.preparation import PASS_SIZE, Prepared, prepare
from ttmpd.pipeline.report_data import RunInputs, exits_report, latency_report
from ttmpd.pipeline.settings import Settings, Target, settings_of
from ttmpd.records import Plan
from ttmpd.surgery.exits.model import check_without_exits
from ttmpd.tasks.classification import Classification
from ttmpd.training.task import check_finite, task_of

_USED = ("num_samples", "holdout", "batch_size", "device", "seed", "task")
"""The settings of a run that exits look at."""
_DEFAULTS = {"num_samples": defaults.EXIT_NUM_SAMPLES, "batch_size": defaults.EXIT_BATCH_SIZE}


def add_early_exits(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    *,
    speedup: float | None = None,
    latency: str | float | None = None,
    labels: str | Path | Sequence[int] | None = None,
    method: EarlyExit = RightTool(),
    output: str | Path | None = None,
    command: str = "",
    **settings: Any,
) -> Result:
    """A copy of the model that answers sure samples early, with the threshold that meets a mean latency.

    Nothing of the model is changed or trained. Exits learn its answers, the threshold is chosen by how sure they are
    of samples they were not trained on; neither asks for labels. Put exits on last: a pruned model may be given.

    Args:
        model: any classifier that is a row of blocks, or the id of one.
        samples: from the place of use, whatever :func:`ttmpd.compress` takes.
        speedup: how many times faster the mean of the samples shall be answered, e.g. 1.5.
        latency: instead of ``speedup``: ``"12ms"`` per batch, or ``"0.5x"`` of the model's own.
        labels: of the samples, when there are some: see :func:`ttmpd.evaluate`. Exits learn and are calibrated to them.
        method: that makes the exits.
        output: folder for an artifact.
        command: recorded in the report.
        **settings: of :class:`ttmpd.Settings`: ``num_samples`` (1000), ``holdout`` (their share on which the result is
            compared with the model), ``batch_size`` (1: on which latency is measured), ``device``, ``seed``.

    Raises:
        BudgetUnreachableError: the first exit takes longer; ``best_ms`` says how long.
        UnsupportedError: there is no place for exits, or the model has some.
        SamplesError, ModelError, InvalidValueError: see their messages.

    Example:
        >>> import torch
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> found = add_early_exits(tiny_model(), torch.rand(60, 3, 8, 8), latency="1000ms", num_samples=60)
        >>> found.model.threshold = 1.1  # no sample leaves early

    Cost: a few passes of the model over the samples, seconds of training, and about half a minute of measuring.
    """
    target, chosen = Target.of(speedup, latency), _settings(settings)
    if output is not None:
        check_output(Path(output))
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    check_without_exits(opened.module)
    classes = _labels(labels, samples)
    prepared = prepare(opened, samples, chosen)
    source, calibration = prepared.source, prepared.calibration
    check_exits_fit(source)
    start = time.perf_counter()
    classes_of_fit = None if classes is None else classes.of(calibration.fit)
    equipped, confidences, before = _equipped(prepared, method, classes_of_fit, chosen.seed)
    trained = time.perf_counter()
    equipped, confidences, choice = _timed(prepared, method, equipped, confidences, target, chosen.batch_size)
    plan = Plan((), 0.0, choice.original_ms, choice.budget_ms, choice.predicted_ms)
    logits = (before, predictions_of(equipped.model, calibration.held_out, PASS_SIZE))
    check_finite(equipped.model, logits[1])
    report = exits_report(
        RunInputs(opened, source, calibration, chosen),
        equipped.model,
        _exits(equipped, choice, confidences, classes is not None),
        method=method,
        logits=logits,
    )
    report = dataclasses.replace(
        report,
        target=TargetReport(str(target), choice.met, choice.within_spread, plan.budget_ms),
        attempts=tuple(AttemptReport(predicted, measured) for predicted, measured in choice.attempts),
        latency=latency_report(choice.timings, plan, chosen.batch_size),
        seconds={"exits": trained - start, "measure": time.perf_counter() - trained},
        command=command,
    )
    result = Result(equipped.model.cpu().eval(), plan, report, calibration.ids, opened)
    if output is not None:
        result.save(output)
    return result


def check_exits_fit(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` unless the model predicts one class per sample and nothing else beside it."""
    task = task_of(model)
    if not isinstance(task, Classification) or task.parts not in ((), ("",), ("logits",)):
        raise UnsupportedError(
            "a model with early exits must answer with one tensor of class scores, but the task is "
            f"{task.name}{' of ' + ', '.join(task.parts) if any(task.parts) else ''}; wrap the model so that it does"
        )


def _equipped(
    prepared: Prepared, method: EarlyExit, classes: Tensor | None, seed: int
) -> tuple[Equipped, ExitConfidences, Tensor]:
    """The model with exits, their confidences on all samples, the held-out ones last, and its logits on these."""
    size, calibration = prepared.pass_size(PASS_SIZE), prepared.calibration
    equipped = method.equip(prepared.source, calibration.fit, labels=classes, batch_size=size, seed=seed)
    exit_logits, logits = exit_answers(equipped.model, calibration.held_out, size)
    all_exit_logits = torch.cat([equipped.exit_logits.cpu(), exit_logits], 1)
    return equipped, exit_confidences(all_exit_logits, torch.cat([equipped.logits.cpu(), logits])), logits


def _timed(
    prepared: Prepared,
    method: EarlyExit,
    equipped: Equipped,
    confidences: ExitConfidences,
    target: Target,
    batch_size: int,
) -> tuple[Equipped, ExitConfidences, ThresholdChoice]:
    """Time the exits, keep those that are worth their time, and set the threshold that meets the target."""
    samples = _joined(prepared.calibration.fit, prepared.calibration.held_out)
    latencies = time_exits(prepared.source, equipped.model, samples, batch_size)
    budget_ms = target.budget_ms(latencies.original_ms)
    equipped, confidences, latencies = fitted(method, equipped, confidences, latencies, budget_ms)
    choice = choose(prepared.source, equipped.model, samples, confidences, latencies, budget_ms)
    equipped.model.threshold = choice.threshold
    return equipped, confidences, choice


def _settings(arguments: dict[str, Any]) -> Settings:
    for name in arguments:
        if name not in _USED:
            raise InvalidValueError(f"a setting of exits must be one of {', '.join(_USED)}, but got {name!r}")
    return settings_of(_DEFAULTS | arguments)


def _labels(labels: str | Path | Sequence[int] | None, data: Any) -> Labels | None:
    if labels is None or isinstance(labels, str | Path):
        return None if labels is None else open_labels(labels, data)
    return Labels({str(i): int(value) for i, value in enumerate(labels)}, "labels")


def _joined(first: Samples, second: Samples) -> Samples:
    """The samples of both, the second ones last."""
    inputs, names = torch.cat([first.inputs, second.inputs]), first.names + second.names
    return dataclasses.replace(first, inputs=inputs, ids=first.ids + second.ids, names=names)


def _exits(equipped: Equipped, choice: ThresholdChoice, confidences: ExitConfidences, labelled: bool) -> ExitsReport:
    """What the report tells of exits, and of the end."""
    spec, shares = equipped.model.spec, choice.shares(confidences.n_exits)
    numbers = equipped.facts or ({},) * len(spec.exits)
    rows = zip(spec.exits, spec.thresholds(choice.threshold), shares, choice.ms, numbers, strict=False)
    exits = tuple(
        ExitReport(
            exit.path,
            threshold,
            share,
            ms,
            *(row.get(name) for name in ("agreement", "temperature", "calibration_error_before", "calibration_error")),
        )
        for exit, threshold, share, ms, row in rows
    )
    return ExitsReport(
        note=equipped.note,
        labelled=labelled,
        threshold=choice.threshold,
        agreement=confidences.agreement(choice.depths),
        n_samples=len(choice.depths),
        predicted_ms=choice.predicted_ms,
        exits=exits,
        end_share=shares[-1],
        end_ms=choice.ms[-1],
        curve=curve(confidences, choice.ms),
    )
