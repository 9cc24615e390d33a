"""A service whose worker and clock are in the hands of the test."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

import ttmpd
from ttmpd.distill.one_time import OneTime
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.pipeline import analysis, planning
from ttmpd.pipeline import compress as pipeline
from ttmpd.records import UNCHANGED
from ttmpd.serving.service import OnlineService
from ttmpd.serving.worker import STUDENT, TEACHER, JobInputs, Outcome, Progress
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

SETTINGS: dict[str, Any] = {
    "distill": OneTime(steps=2, views=1, batch_size=8),
    "batch_size": 8,
    "device": "cpu",
    "amp": "off",
}


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """Does at once what it is told, in the folder in which a worker does it."""

    def __init__(self, inputs: JobInputs, kind: str, artifact: Path) -> None:
        self.inputs, self.kind, self.stopped = inputs, kind, False
        self._artifact, self._outcome = artifact, None

    _outcome: Outcome | None

    def adapt(self, change: Callable[[dict[str, Tensor]], None] = lambda state: None) -> None:
        state = {name: value.clone() for name, value in self.inputs.opened.module.state_dict().items()}
        change(state)
        save_file(state, self.inputs.folder / TEACHER)

    def finish(self, *, broken: bool = False) -> None:
        shutil.copytree(self._artifact, self.inputs.folder / STUDENT, dirs_exist_ok=True)
        if broken:
            (self.inputs.folder / STUDENT / "model.safetensors").write_bytes(b"cut")
        self._outcome = Outcome()

    def fail(self, error: str, *, retryable: bool = False, needs_thread: bool = False) -> None:
        self._outcome = Outcome(error, retryable, needs_thread)

    def progress(self) -> Progress:
        return Progress("timing", 1, 2)

    def outcome(self) -> Outcome | None:
        return self._outcome

    def stop(self) -> None:
        self.stopped = True


class Stage:
    """A service whose worker and clock are in the test's hands; nobody looks unless the test does."""

    def __init__(self, artifact: Path, model: nn.Module, **settings: Any) -> None:
        self.workers: list[FakeWorker] = []
        self.clock = Clock()
        self.start_error: Exception | None = None

        def begin(inputs: JobInputs, kind: str) -> FakeWorker:
            if self.start_error is not None:
                raise self.start_error
            self.workers.append(FakeWorker(inputs, kind, artifact))
            return self.workers[-1]

        given = SETTINGS | {
            "speedup": 1.2,
            "num_samples": 100,
            "poll_seconds": float("inf"),
            "min_agreement": 0.0,
            "window": 32,
        }
        self.service = OnlineService(model, worker=begin, clock=self.clock, **given | settings)

    @property
    def worker(self) -> FakeWorker:
        return self.workers[-1]

    def look(self) -> dict[str, Any]:
        self.service.look()
        return self.service.state()

    def feed(self, n: int = 100, seed: int = 5, *, looks: bool = False, change: float = 1.0) -> None:
        for batch in tiny_samples(n, seed).batches(8):
            self.service(batch * change)
            if looks:
                self.service.look()

    def serve(self) -> None:
        """To the phase in which the student answers."""
        self.feed()
        self.look()
        self.worker.adapt()
        self.look()
        self.worker.finish()
        assert self.look()["phase"] == "serving"


def made(folder: Path) -> Path:
    """An artifact of the tiny model, with latency taken from operations instead of a clock."""

    def compare(original: nn.Module, student: nn.Module, batch: Tensor, **_: Any) -> Timings:
        models = {"original": original, "compressed": student}
        return Timings({name: (count_macs(m, batch[:1])[""] / 1e3,) * 5 for name, m in models.items()})

    def time_units(_model: nn.Module, units: Any, _batch: Tensor, **_: Any) -> tuple[UnitLatency, ...]:
        return tuple(UnitLatency(u.id, u.macs / 1e3, {"linear": 1.0}) for u in units)

    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, planning):
            patch.setattr(module, "compare", compare)
        patch.setattr(analysis, "time_units", time_units)
        ms = compare(tiny_model(n_blocks=4), tiny_model(n_blocks=4), tiny_samples(2).batch(slice(0, 2))).ms["original"]
        patch.setattr(
            analysis,
            "find_lossless",
            lambda *_, **_k: (UNCHANGED, Timings(dict.fromkeys(("original", "lossless"), ms))),
        )
        ttmpd.compress(tiny_model(n_blocks=4), tiny_samples(40), speedup=1.3, output=folder, num_samples=40, **SETTINGS)
    return folder
