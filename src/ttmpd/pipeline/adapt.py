"""``adapt_to``: the first half of the main job alone, a teacher moved to the data with nothing removed."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from ttmpd.artifact.write import Result, check_output
from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import to_fast_format, to_plain_format
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.pipeline.preparation import prepare
from ttmpd.pipeline.report_data import RunInputs, adapted_report
from ttmpd.pipeline.settings import settings_of
from ttmpd.records import Plan
from ttmpd.training.task import check_finite

_USED = ("adapt", "num_samples", "holdout", "batch_size", "device", "seed", "task")
"""The settings of a run that an adaptation alone looks at."""


def adapt_to(
    model: nn.Module | str | OpenedModel, samples: Any, *, output: str | Path | None = None, **settings: Any
) -> Result:
    """A copy of the model, adapted to the samples without labels; nothing is removed.

    Args:
        model: any classifier, or the id of one.
        samples: unlabelled, whatever :func:`ttmpd.compress` takes.
        output: folder for an artifact.
        **settings: of :class:`ttmpd.Settings`: ``adapt`` (a method or its name), ``num_samples``, ``holdout`` (their
            share on which the result is compared with the original and to which it is not adapted), ``batch_size``,
            ``device`` and ``seed``.

    Raises:
        SamplesError, ModelError, InvalidValueError: see their messages.

    Example:
        >>> import torch
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> result = adapt_to(tiny_model(), torch.rand(40, 3, 8, 8), batch_size=8)
        >>> result.model.training
        False
    """
    for name in settings:
        if name not in _USED:
            raise InvalidValueError(f"a setting of an adaptation must be one of {', '.join(_USED)}, but got {name!r}")
    chosen = settings_of(settings)
    if output is not None:
        check_output(Path(output))
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    prepared = prepare(opened, samples, chosen)
    source, calibration = to_fast_format(prepared.source), prepared.calibration
    size = prepared.step_size(chosen.batch_size)
    start = time.perf_counter()
    adapted = chosen.adapt.adapt(source, calibration.fit, batch_size=size, seed=chosen.seed)
    seconds = time.perf_counter() - start
    before, after = (predictions_of(net, calibration.held_out, chosen.batch_size) for net in (source, adapted.model))
    check_finite(adapted.model, after)
    report = adapted_report(RunInputs(opened, source, calibration, chosen), adapted, (before, after), seconds)
    net = to_plain_format(adapted.model).cpu().eval()
    result = Result(net, Plan((), 0.0, 0.0, 0.0, 0.0), report, calibration.ids, opened)
    if output is not None:
        result.save(output)
    return result
