"""Workers: a real process that is killed and goes on, a thread, and what cannot be sent to a process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import ttmpd
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import BudgetUnreachableError, TTMPDError
from ttmpd.models.open import open_model
from ttmpd.pipeline.stages import ADAPT_STAGE
from ttmpd.plan.greedy import Greedy
from ttmpd.progress import tell, tell_stage
from ttmpd.serving import worker as worker_module
from ttmpd.serving.service import OnlineService
from ttmpd.serving.worker import STATUS, STUDENT, TEACHER, JobInputs, ProcessWorker, Progress, ThreadWorker, run_job
from ttmpd.testing.tiny_models import TinyNet, tiny_model, tiny_samples

QUICK: dict[str, Any] = {
    "speedup": 1.01,  # real milliseconds on a machine that may be busy
    "distill": OneTime(steps=2, views=1, batch_size=8),
    "plan": Greedy(),
    "batch_size": 8,
    "device": "cpu",
    "amp": "off",
}


def inputs(folder: Path, model: nn.Module | None = None, **given: Any) -> JobInputs:
    opened = open_model(tiny_model(n_blocks=4) if model is None else model)
    return JobInputs(opened, tiny_samples(40), folder, QUICK | {"num_samples": 40} | given)


def wait_for(condition: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


def test_a_killed_process_never_reaches_a_caller_and_the_next_one_goes_on(tmp_path):
    model = tiny_model(n_blocks=10)  # blocks make up nearly all of it
    settings = QUICK | {
        "num_samples": 40,
        "min_agreement": 0.0,
        "min_speedup": 0.0,
        "backoff": 0.1,
        "poll_seconds": 0.02,
    }
    settings |= {"niceness": 0}  # tests share the machine
    x, stop, lost = tiny_samples(8).batch(slice(None)), threading.Event(), []
    with OnlineService(model, **settings) as service:

        def ask() -> None:
            while not stop.is_set():
                try:
                    assert service(x).shape == (8, 4)
                except Exception as error:
                    lost.append(error)
                time.sleep(0.01)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        wait_for(lambda: (service.state()["progress"] or {}).get("stage") == "timing")
        first = service._controller._job._worker
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: service.state()["phase"] in ("serving", "idle"))
        state, folder = service.state(), Path(service._folder.name)
        stop.set()
        asking.join()
        assert lost == []
        assert (state["phase"], state["answers"], state["worker"]) == ("serving", "student", "process"), state
        assert state["n_swaps"] == 2
        report = (service.artifact / "report.json").read_text()
        assert "made by a running service" in report
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(first.pid, 0)


def test_a_process_that_is_done_ends_without_a_fault(tmp_path):
    # Out of reach, counted and not measured: stated, and over soon.
    worker = ProcessWorker(inputs(tmp_path, speedup=None, macs=1e-9))
    wait_for(lambda: worker.outcome() is not None)
    outcome = worker.outcome()
    assert outcome is not None
    assert outcome.error and not outcome.retryable
    assert worker._process is not None
    assert worker._process.returncode == 0


def test_a_process_ends_when_the_pipe_breaks_as_when_its_parent_dies(tmp_path):
    worker = ProcessWorker(inputs(tmp_path))
    worker._close_pipe()
    wait_for(lambda: not _alive(worker.pid))
    outcome = worker.outcome()
    assert outcome is not None
    assert "ended with exit code 1" in outcome.error


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_model_that_cannot_be_pickled_needs_a_thread(tmp_path):
    model = tiny_model()
    model.guard = threading.Lock()
    worker = ProcessWorker(inputs(tmp_path, model))
    outcome = worker.outcome()
    assert outcome is not None
    assert outcome.needs_thread and "cannot be sent to a process" in outcome.error
    assert (worker.pid, worker.progress()) == (None, Progress())
    worker.stop()


def test_what_a_script_defines_is_sent_along(tmp_path):
    script = type("Net", (TinyNet,), {"__module__": "__main__", "scale": lambda _, x: 2 * x})
    worker = ProcessWorker(inputs(tmp_path, script(), speedup=None, macs=1e-9))  # out of reach, and said only there
    wait_for(lambda: worker.outcome() is not None)
    outcome = worker.outcome()
    assert outcome is not None
    assert "MACs" in outcome.error and not outcome.needs_thread


def test_a_model_that_cannot_be_rebuilt_needs_a_thread(tmp_path, monkeypatch):
    here_only = ModuleType("here_only")
    here_only.Net = type("Net", (TinyNet,), {"__module__": "here_only"})
    monkeypatch.setitem(sys.modules, "here_only", here_only)
    worker = ProcessWorker(inputs(tmp_path, here_only.Net()))
    wait_for(lambda: worker.outcome() is not None)
    outcome = worker.outcome()
    assert outcome is not None
    assert outcome.needs_thread and "cannot be rebuilt in a process" in outcome.error


def test_stop_ends_a_process_at_once(tmp_path):
    worker = ProcessWorker(inputs(tmp_path))
    assert worker.outcome() is None
    worker.stop()
    worker.stop()
    assert worker.pid is not None
    assert not _alive(worker.pid)


# -------------------------------------------------------------------------------------------------------------- thread


def compressing(monkeypatch: pytest.MonkeyPatch, does: Callable[..., object]) -> None:
    monkeypatch.setattr(worker_module, "compress", does)


def test_a_thread_lays_the_teacher_down_as_soon_as_it_is_adapted(tmp_path, monkeypatch):
    def compress(*_: Any, output: Path, **__: Any) -> None:
        (output / ".work").mkdir(parents=True)
        tell("adapting", 1, 1)
        adapted = output / ".work" / "any-name"
        adapted.write_bytes(b"teacher")
        tell_stage("score", adapted)
        assert not (tmp_path / TEACHER).exists()
        tell_stage(ADAPT_STAGE, adapted)
        tell("timing", 1, 2)

    compressing(monkeypatch, compress)
    worker = ThreadWorker(inputs(tmp_path))
    wait_for(lambda: worker.outcome() is not None)
    assert worker.outcome() == worker_module.Outcome()
    assert worker.progress() == Progress("timing", 1, 2)
    assert (tmp_path / TEACHER).read_bytes() == b"teacher"


@pytest.mark.parametrize(
    ("error", "retryable"),
    [(RuntimeError("broken"), True), (BudgetUnreachableError("too fast", 1.0), False), (TTMPDError("no"), False)],
)
def test_stated_errors_are_final_and_others_are_not(tmp_path, monkeypatch, error, retryable):
    def compress(*_: Any, **__: Any) -> None:
        raise error

    compressing(monkeypatch, compress)
    worker = ThreadWorker(inputs(tmp_path))
    wait_for(lambda: worker.outcome() is not None)
    outcome = worker.outcome()
    assert outcome is not None
    assert (outcome.retryable, outcome.needs_thread) == (retryable, False)
    assert str(error) in outcome.error


def test_a_thread_stops_where_it_next_tells_its_progress(tmp_path, monkeypatch):
    begun = threading.Event()

    def compress(*_: Any, **__: Any) -> None:
        while True:
            begun.set()
            tell("timing", 1, 0)
            time.sleep(0.001)

    compressing(monkeypatch, compress)
    worker = ThreadWorker(inputs(tmp_path))
    wait_for(begun.is_set)
    worker.stop()
    wait_for(lambda: worker.outcome() is not None)  # `stop` waits for a little only
    assert worker.outcome() == worker_module.Outcome("stopped")


def test_the_work_is_what_compress_does(tmp_path, monkeypatch):
    heard, given = [], {}

    def compress(model: Any, samples: Any, **settings: Any) -> None:
        given.update(settings, n=len(samples))
        tell("training", 3, 4)

    compressing(monkeypatch, compress)
    run_job(inputs(tmp_path, speedup=1.5), lambda *told: heard.append(told))
    assert heard == [("training", 3, 4)]
    assert (given["speedup"], given["n"], given["output"], given["resume"]) == (1.5, 40, tmp_path / STUDENT, False)
    assert not (tmp_path / STATUS).exists()


def test_the_public_name_is_the_class():
    assert ttmpd.OnlineService is OnlineService
