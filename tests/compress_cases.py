"""A quick compression, and measurements that a test states."""

from ttmpd.distill.one_time import OneTime
from ttmpd.latency.timing import Timings
from ttmpd.pipeline import analysis, planning
from ttmpd.pipeline import compress as pipeline
from ttmpd.records import UNCHANGED

QUICK = {
    "distill": OneTime(steps=3, views=2, batch_size=8),
    "num_samples": 40,
    "holdout": 0.25,
    "batch_size": 8,
    "device": "cpu",
    "amp": "off",
}


def set_compare(monkeypatch, compare) -> None:
    for module in (pipeline, planning):
        monkeypatch.setattr(module, "compare", compare)

    def nothing_lossless(model, batch, **_):
        return UNCHANGED, Timings(dict.fromkeys(("original", "lossless"), compare(model, model, batch).ms["original"]))

    monkeypatch.setattr(analysis, "find_lossless", nothing_lossless)
