"""Counts of a server in the text format of Prometheus; all names and labels are from closed sets."""

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histogram of seconds."""
PHASES = ("collecting", "adapting", "compressing", "retrying", "serving", "settled", "fallback", "closed")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of a server; safe under concurrent calls.

    Example:
        >>> metrics = Metrics()
        >>> metrics.answered("source", 2, 0.004)
        >>> metrics.responded(200)
        >>> print(metrics.text({}).splitlines()[2])
        ttmpd_responses_total{status="200"} 1
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: Counter[str] = Counter()
        self._responses: Counter[int] = Counter()
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def answered(self, by: str, n_samples: int, seconds: float) -> None:
        """Note a batch that a model answered."""
        with self._lock:
            self._samples[by] += n_samples
            self._buckets[bisect_left(BUCKETS, seconds)] += 1
            self._seconds += seconds

    def responded(self, status: int) -> None:
        """Note the status of a response to a prediction."""
        with self._lock:
            self._responses[status] += 1

    def text(self, state: Mapping[str, Any]) -> str:
        """The exposition, with the gauges of a service's state."""
        with self._lock:
            lines = [*self._counters(), *_gauges(state)]
        return "\n".join(lines) + "\n"

    def _counters(self) -> Iterator[str]:
        yield from _head("ttmpd_responses_total", "counter", "Responses to predictions by status.")
        yield from (f'ttmpd_responses_total{{status="{status}"}} {n}' for status, n in sorted(self._responses.items()))
        yield from _head("ttmpd_samples_total", "counter", "Samples that were answered, by model.")
        yield from (f'ttmpd_samples_total{{by="{by}"}} {n}' for by, n in sorted(self._samples.items()))
        yield from _head("ttmpd_answer_seconds", "histogram", "Seconds that the model took for a batch.")
        total = 0
        for end, n in zip((*BUCKETS, math.inf), self._buckets, strict=True):
            total += n
            yield f'ttmpd_answer_seconds_bucket{{le="{"+Inf" if end == math.inf else end}"}} {total}'
        yield f"ttmpd_answer_seconds_sum {self._seconds:.6f}"
        yield f"ttmpd_answer_seconds_count {total}"


def _gauges(state: Mapping[str, Any]) -> Iterator[str]:
    if "phase" in state:
        yield from _head("ttmpd_phase", "gauge", "1 for the phase that the service is in.")
        yield from (f'ttmpd_phase{{phase="{phase}"}} {int(phase == state["phase"])}' for phase in PHASES)
    student, drift = state.get("student") or {}, state.get("drift") or {}
    values = {
        "ttmpd_collected_samples": (state.get("n_collected"), "Samples in the reservoir."),
        "ttmpd_rounds_total": (state.get("n_rounds"), "Compressions that were begun."),
        "ttmpd_moves_total": (state.get("n_moves"), "How often the data moved."),
        "ttmpd_swaps_total": (state.get("n_swaps"), "How often another model took over."),
        "ttmpd_student_agreement": (student.get("agreement"), "Agreement with the teacher on held samples."),
        "ttmpd_student_speedup": (student.get("speedup"), "Times faster than the teacher, measured in service."),
        "ttmpd_drift_statistic": (drift.get("statistic"), "Largest z-value of the last window."),
        "ttmpd_drift_threshold": (drift.get("threshold"), "What it exceeds when answers changed."),
    }
    for name, (value, said) in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield from _head(name, "counter" if name.endswith("_total") else "gauge", said)
            yield f"{name} {value}"


def _head(name: str, kind: str, said: str) -> Iterator[str]:
    yield f"# HELP {name} {said}"
    yield f"# TYPE {name} {kind}"
