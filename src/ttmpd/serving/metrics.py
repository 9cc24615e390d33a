"""Counts of a server in the text format of Prometheus; all names and labels are from closed sets."""

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from ttmpd.serving.state import ServiceState

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histogram of seconds."""
PHASES = ("collecting", "adapting", "compressing", "retrying", "serving", "idle", "fallback", "closed")

__all__ = ["BUCKETS", "CONTENT_TYPE", "PHASES", "Metrics"]


class Metrics:
    """Counters of a server in a registry of its own; safe under concurrent calls.

    Example:
        >>> metrics = Metrics()
        >>> metrics.answered("source", 2, 0.004)
        >>> metrics.responded(200)
        >>> print(metrics.text().splitlines()[2])
        ttmpd_responses_total{status="200"} 1.0
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter("ttmpd_responses", "Responses to predictions by status.", ["status"], registry=None)
        self._samples = Counter("ttmpd_samples", "Samples that were answered, by model.", ["by"], registry=None)
        self._seconds = Histogram(
            "ttmpd_answer_seconds", "Seconds that the model took for a batch.", buckets=BUCKETS, registry=None
        )
        for counts in (self._responses, self._samples, self._seconds):
            self._registry.register(_WithoutTimes(counts))

    def answered(self, by: str, n_samples: int, seconds: float) -> None:
        """Count a batch that a model answered."""
        self._samples.labels(by=by).inc(n_samples)
        self._seconds.observe(seconds)

    def responded(self, status: int) -> None:
        """Count the status of a response to a prediction."""
        self._responses.labels(status=str(status)).inc()

    def text(self, state: ServiceState | None = None) -> str:
        """The exposition: the counters, and what a service's state says at this moment.

        Args:
            state: of :meth:`ttmpd.OnlineService.state`; the counters alone where there is none.
        """
        moment = CollectorRegistry()
        if state is not None:
            moment.register(_StateCollector(state))
        return (generate_latest(self._registry) + generate_latest(moment)).decode()


class _WithoutTimes(Collector):
    """Counters without the times at which they began, which this text format has no place for."""

    def __init__(self, counts: Counter | Histogram) -> None:
        self.counts = counts

    def collect(self) -> Iterator[Metric]:
        for metric in self.counts.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _StateCollector(Collector):
    """The numbers in a service's state."""

    def __init__(self, state: ServiceState) -> None:
        self.state = state

    def collect(self) -> Iterator[Metric]:
        phases = GaugeMetricFamily("ttmpd_phase", "1 for the phase that the service is in.", labels=["phase"])
        for phase in PHASES:
            phases.add_metric([phase], phase == self.state["phase"])
        yield phases
        for name, (value, text) in self._values().items():
            if value is not None and math.isfinite(value):
                family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                yield family(name, text, value=value)

    def _values(self) -> dict[str, tuple[float | None, str]]:
        state = self.state
        student, drift = state["student"], state["drift"]
        return {
            "ttmpd_collected_samples": (state["n_collected"], "Samples in the reservoir."),
            "ttmpd_rounds_total": (state["n_rounds"], "Compressions that were begun."),
            "ttmpd_moves_total": (state["n_moves"], "How often the data moved."),
            "ttmpd_swaps_total": (state["n_swaps"], "How often another model took over."),
            "ttmpd_student_agreement": (
                student and student["agreement"],
                "Agreement with the adapted model on held-out samples.",
            ),
            "ttmpd_student_speedup": (
                student and student["speedup"],
                "Times faster than the teacher, measured in service.",
            ),
            "ttmpd_drift_statistic": (drift["statistic"], "Largest z-value of the last window."),
            "ttmpd_drift_threshold": (drift["threshold"], "What it exceeds when answers changed."),
        }
