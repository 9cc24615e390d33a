"""The task of a model: found once, and carried by every copy; and train mode for those layers alone that need it."""

import dataclasses
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, ModelError, SamplesError, cause
from ttmpd.models.modules import clone, has_nan, keep_plain_format, prefers_channels_last, to_fast_format
from ttmpd.models.run import OTHER_KERNELS, evaluating, predict, same_outputs
from ttmpd.models.tokens import carried_task, carry_task
from ttmpd.tasks.base import Clues, Task, detect_task
from ttmpd.tasks.classification import Classification

_log = logging.getLogger(__name__)

NOT_FINITE = "the model answers NaN or infinity"
"""Why a sample is left out."""

_RANDOM = ("Drop", "StochasticDepth")
"""Beginnings of the names of layers that draw at random in train mode."""


def task_of(model: nn.Module) -> Task:
    """The task that :func:`assign_task` found for a model or for the one that it is a copy of; else classification."""
    return cast(Task, carried_task(model) or Classification())


def assign_task(model: nn.Module, batch: Tensor, task: Task | None = None, preparation: object = None) -> Task:
    """Find what a model predicts, check that it does, and let the model and its copies carry the task. In place.

    Args:
        model: in eval mode from the first pass to the last.
        batch: (B, ...) a few samples on its device.
        task: the task by hand; None for the one that the model carries, else the one that is detected.
        preparation: the preprocessing of the model; of text it says what each token is for.

    Raises:
        ModelError: the model does not run on the batch, no task fits its output, or a prediction is not finite.
    """
    raw = _run(model, batch)
    chosen = adopt_task(model, raw, batch, task, preparation)
    _check_repeatable(model, raw, batch)
    if not bool(torch.isfinite(chosen.outputs(raw, batch)).all(1).any()):
        raise ModelError(
            f"{type(model).__name__} must predict finite values, but got NaN or infinity for every sample; check the "
            "weights and the preprocessing"
        )
    return chosen


def answered(model: nn.Module, samples: Samples, batch_size: int) -> Samples:
    """The samples for which the model predicts finite values; the others are among those that were skipped.

    Args:
        model: in eval mode, with its task.
        samples: on which it can be run.
        batch_size: samples per pass.

    Raises:
        SamplesError: there are none.

    Cost: one pass over the samples.
    """
    device, task = next(model.parameters()).device, task_of(model)
    finite: list[bool] = []
    with evaluating(model):
        for batch in samples.batches(batch_size, device):
            rows = torch.isfinite(predict(model, batch)).flatten(1).all(1).cpu()
            finite += [bool(part.all()) for part in torch.split(rows, task.row_counts(batch).tolist())]
    if all(finite):
        return samples
    names = samples.names or tuple(map(str, range(len(samples))))
    skipped = [(name, NOT_FINITE) for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if len(skipped) == len(samples):
        raise SamplesError(
            f"{type(model).__name__} must predict finite values, but answers NaN or infinity for all {len(samples)} "
            "samples; check the weights and the preprocessing"
        )
    _log.warning(
        "%d of %d samples are left out: %s, the first for %s", len(skipped), len(samples), NOT_FINITE, skipped[0][0]
    )
    left = samples.subset([number for number, is_finite in enumerate(finite) if is_finite])
    return dataclasses.replace(left, skipped=(*samples.skipped, *skipped))


def check_finite(model: nn.Module, predictions: Tensor) -> None:
    """Refuse to hand on a model that predicts NaN or infinity.

    Raises:
        ModelError: it does.
    """
    if has_nan(predictions):
        raise ModelError(
            f"{type(model).__name__} must predict finite values when it is done, but predicts NaN or infinity; nothing "
            "was written: try another seed, fewer steps, or --adapt none"
        )


def _check_repeatable(model: nn.Module, raw: Any, batch: Tensor) -> None:
    """Refuse a model that draws at random in eval mode; note of one that needs contiguous memory that it does.

    Args:
        model: in eval mode.
        raw: its output for the batch.
        batch: (B, ...) a few samples.

    Raises:
        ModelError: another pass over the same samples gives other answers.
    """
    with evaluating(model):
        torch.rand(1, device=batch.device)  # the state of the generator is not the one that the first pass began with
        again = model(batch)
    if not same_outputs(again, raw, OTHER_KERNELS):
        raise ModelError(
            f"{type(model).__name__} must answer alike when it is asked twice in eval mode, but does not: something in "
            "it draws at random, such as F.dropout without training=self.training"
        )
    if prefers_channels_last(model):
        trial = to_fast_format(clone(model))
        try:
            with evaluating(trial):
                trial(batch)
        except RuntimeError:
            keep_plain_format(model)


def adopt_task(model: nn.Module, raw: Any, batch: Tensor, task: Task | None = None, preparation: object = None) -> Task:
    """Find what a model predicts from an output that it gave, and let it carry the task. In place.

    Args:
        model: whose output it is.
        raw: the output, as the model returned it.
        batch: (B, ...) the samples that it is for.
        task: as for :func:`assign_task`.
        preparation: as for :func:`assign_task`.

    Raises:
        ModelError: no task fits the output.
        InvalidValueError: ``task`` is another one than that which the model carries.
    """
    by_hand = task or cast(Task | None, carried_task(model))
    check_agrees(task, cast(Task | None, carried_task(model)))
    text, padding = "", 0
    if isinstance(preparation, Tokenization):
        text, padding = preparation.task, preparation.padding
    chosen = detect_task(Clues(model, raw, batch, text, padding)) if by_hand is None else by_hand.resolved(raw, batch)
    n_rows, n_predicted = int(chosen.row_counts(batch).sum()), len(chosen.outputs(raw, batch))
    if n_predicted != n_rows:
        raise ModelError(
            f"{type(model).__name__} must predict {n_rows} rows for {len(batch)} samples, but predicted {n_predicted}; "
            "samples must come first in its output"
        )
    carry_task(model, chosen)
    return chosen


def check_agrees(task: Task | None, carried: Task | None) -> None:
    """Refuse to read a model that says what it predicts, such as that of an artifact, as something else.

    Args:
        task: by hand; None agrees with every model.
        carried: by the model; None agrees with every task.

    Raises:
        InvalidValueError: these are different tasks, or of different parts.
    """
    if task is None or carried is None:
        return
    if type(task) is not type(carried) or (task.parts and carried.parts and task.parts != carried.parts):
        names = [f"{each.name}{' of ' + ', '.join(each.parts) if any(each.parts) else ''}" for each in (carried, task)]
        raise InvalidValueError(
            f"task must be that with which the model was made, {names[0]}, but got {names[1]}; leave it out"
        )


def check_structure(model: nn.Module, batch: Tensor) -> None:
    """Refuse a model whose output has another structure once its norm and dropout layers are in train mode.

    Raises:
        ModelError: it has; other modules are never put into train mode, so that a model that asks for its own mode
            is not concerned.
    """
    copy = clone(model)
    there = _structure(_run(copy, batch))
    with torch.random.fork_rng(enabled=True), torch.no_grad():
        train_norms(copy)
        here = _structure(copy(batch))
    if here != there:
        raise ModelError(
            f"{type(model).__name__} must answer in train mode as in eval mode, but answers {here} in place of "
            f"{there}; wrap the model so that it always answers the same way"
        )


def train_norms(model: nn.Module, on: bool = True) -> None:
    """Put norm and dropout layers into train mode and everything else into eval mode, in place.

    What a model answers may depend on its own mode (auxiliary heads, losses): that stays as it is in use.

    Args:
        model: in any mode.
        on: False puts these into eval mode, too.
    """
    model.eval()
    for module in model.modules():
        random = type(module).__name__.startswith(_RANDOM) or isinstance(module, nn.modules.dropout._DropoutNd)
        if on and (random or isinstance(module, nn.modules.batchnorm._NormBase)):
            module.training = True


def _run(model: nn.Module, batch: Tensor) -> Any:
    with evaluating(model):
        try:
            return model(batch)
        except ModelError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"{type(model).__name__} must run on a batch of shape {tuple(batch.shape)}, but failed: "
                f"{cause(error)}; check the input size and the preprocessing"
            ) from error


def _structure(raw: Any) -> Any:
    """Types and shapes of an output, without its values."""
    if isinstance(raw, Tensor):
        return tuple(raw.shape)
    if isinstance(raw, dict):
        return {key: _structure(value) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [type(raw).__name__, *map(_structure, raw)]
    return type(raw).__name__
