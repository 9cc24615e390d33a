"""What a service says about itself, as plain data with named and typed fields: what `/state` and `/metrics` read."""

from collections.abc import Mapping
from typing import TypedDict


class DriftState(TypedDict):
    """The last test for moved data; None before there was one."""

    statistic: float | None
    signal: str | None
    threshold: float | None
    n_tests: int
    n_alarms: int


class MonitorState(TypedDict):
    """The last drift test, and the last comparison with the teacher as a proportion."""

    drift: DriftState
    shadow: Mapping[str, float] | None


class ProgressState(TypedDict):
    """``done`` of ``total`` steps of a stage of the worker."""

    stage: str
    done: int
    total: int


class StudentState(TypedDict):
    """The last acceptance test of a student; ``refused`` is "" when it may answer."""

    refused: str
    agreement: float
    speedup: float


class ControllerState(MonitorState):
    """Which model answers, what was collected, and what the worker does."""

    phase: str
    answers: str
    error: str
    n_collected: int
    n_wanted: int
    n_refused: int
    collected_bytes: int
    n_rounds: int
    n_moves: int
    n_swaps: int
    worker: str
    worker_note: str
    tries: int
    progress: ProgressState | None
    student: StudentState | None
    seconds: Mapping[str, float]
    events: list[tuple[float, str]]


class ServiceState(ControllerState):
    """The same, with the number of calls, of samples in them, and of samples that could not be noted."""

    n_calls: int
    n_seen: int
    n_unnoted: int
