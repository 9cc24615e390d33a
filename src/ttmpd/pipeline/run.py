"""A run from the start to its analysis: what was asked for, where finished stages are kept, and what they depend on."""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from torch import nn

from ttmpd.latency.device import choose_device, machine
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.analysis import Analysis, analyze
from ttmpd.pipeline.preparation import prepare
from ttmpd.pipeline.settings import Settings
from ttmpd.pipeline.stages import Stages
from ttmpd.storage import disk_guarded, fingerprint, locked, weights_fingerprint


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a run was asked for beside its targets.

    Args:
        opened: the model.
        settings: of the run.
        stages: what is finished.
        deadline: value of ``time.monotonic()`` at which training ends.
    """

    opened: OpenedModel
    settings: Settings
    stages: Stages
    deadline: float


@contextmanager
def analyzed(
    model: nn.Module | str | OpenedModel,
    samples: Any,
    settings: Settings,
    output: Path | None = None,
    resume: bool = False,
) -> Iterator[tuple[Analysis, Run]]:
    """The analysis of a model, made once for all targets; its stages stay in ``output`` until the block ends well."""
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    deadline = time.monotonic() + settings.time_budget
    prepared = prepare(opened, samples, settings)
    with _work_folder(output) as work:
        name = fingerprint(
            weights_fingerprint(opened.module),
            prepared.calibration.fit.ids,
            prepared.calibration.held_out.ids,
            settings.to_dict() | {"time_budget": None},
            None if opened.preprocessing is None else opened.preprocessing.to_dict(),
        )
        stages = Stages(work, name, resume, circumstances(settings))
        yield analyze(prepared, settings, stages), Run(opened, settings, stages, deadline)


def circumstances(chosen: Settings) -> dict[str, str | int]:
    """What milliseconds of this run depend on: the device that "auto" is, threads, versions, allocator, runtime."""
    runtime = chosen.runtime
    return {
        "ttmpd": installed_version("ttmpd"),
        **dataclasses.asdict(machine(choose_device(chosen.device))),
        "runtime": f"{runtime.name} {runtime.version}",
    }


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
