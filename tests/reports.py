"""Reports for tests that need one, but no run."""

import dataclasses
from typing import Any

from ttmpd.artifact.run_report import (
    ModelReport,
    RunReport,
    RuntimeReport,
    SamplesReport,
    StudentReport,
    TaskReport,
)
from ttmpd.latency.device import Machine

SMALL = RunReport(
    kind="compressed",
    version="0.1.0",
    created="2026-03-02T10:11:12+00:00",
    seed=0,
    model=ModelReport("", "Net", False, 1000, 2000),
    student=StudentReport(500, 1000),
    task=TaskReport("classification", "sample", "the same class", detected=True),
    machine=Machine("AMD EPYC", "cpu", 2, "2.15.0", "kept"),
    runtime=RuntimeReport("eager", "2.15.0"),
    settings={},
    methods={},
    samples=SamplesReport(4, 0, (1, 8, 8)),
)


def small_report(*, input_shape: tuple[int, ...] = (), batch_size: int = 0, **changes: Any) -> RunReport:
    """A report that says next to nothing, with some fields changed."""
    if input_shape:
        changes["samples"] = dataclasses.replace(SMALL.samples, input_shape=input_shape)
    if batch_size:
        changes["settings"] = {"batch_size": batch_size}
    return dataclasses.replace(SMALL, **changes)
