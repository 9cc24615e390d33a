"""A service in front of a tiny model: answers, swaps, drift, failures; worker and clock are in the test's hands."""

import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ttmpd
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import InvalidValueError
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.pipeline import analysis, planning
from ttmpd.pipeline import compress as pipeline
from ttmpd.records import UNCHANGED
from ttmpd.serving import acceptance
from ttmpd.serving import service as service_module
from ttmpd.serving.service import OnlineService
from ttmpd.serving.worker import STUDENT, TEACHER, JobInputs, Outcome, Progress
from ttmpd.testing.tiny_models import TinyNet, assert_untouched, tiny_model, tiny_samples

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


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("made") / "artifact")


@pytest.fixture
def model() -> TinyNet:
    return tiny_model(n_blocks=4)


@pytest.fixture(autouse=True)
def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_speedup", lambda *_: 2.0)


@pytest.fixture
def stage(artifact: Path, model: TinyNet) -> Iterator[Stage]:
    stage = Stage(artifact, model)
    yield stage
    stage.service.close()


# ------------------------------------------------------------------------------------------------------- from the start


def test_the_first_call_is_answered_as_by_the_model(stage, model):
    x = tiny_samples(4).batch(slice(None))
    assert torch.equal(stage.service(x), model(x))
    assert stage.service.answer(x).by == "source"
    state = stage.look()
    assert (state["phase"], state["answers"], state["n_calls"], state["n_seen"]) == ("collecting", "source", 2, 8)
    assert state["n_collected"] == 8


def test_source_then_teacher_then_student(stage, artifact, model):
    x = tiny_samples(4).batch(slice(None))
    stage.feed(99)
    assert stage.look()["phase"] == "collecting"
    stage.feed(1, seed=6)
    assert stage.look()["phase"] == "adapting"
    assert (len(stage.worker.inputs.samples), stage.worker.inputs.arguments["num_samples"]) == (80, 80)
    stage.worker.adapt(lambda state: state["head.bias"].add_(1.0))
    assert stage.look()["phase"] == "compressing"
    assert stage.service.answer(x).by == "teacher"
    assert torch.allclose(stage.service(x), model(x) + 1.0, atol=1e-6)
    stage.worker.finish()
    state = stage.look()
    assert (state["phase"], state["error"], state["student"]["speedup"]) == ("serving", "", 2.0)
    answer = stage.service.answer(x)
    assert answer.by == "student"
    assert torch.allclose(answer.output, ttmpd.load(artifact, model=model)(x), atol=1e-6)


def test_a_fast_worker_is_picked_up_in_one_look(stage):
    stage.feed()
    stage.look()
    stage.worker.adapt()
    stage.worker.finish()
    assert stage.look()["answers"] == "student"


def test_the_model_that_was_passed_in_stays_as_it_is(artifact, model):
    with assert_untouched(model):
        stage = Stage(artifact, model)
        stage.serve()
        stage.service.close()


def test_more_samples_may_have_to_go_by_than_are_collected(artifact, model):
    stage = Stage(artifact, model, min_seen=120)
    stage.feed(112)
    assert stage.look()["phase"] == "collecting"
    stage.feed(8)
    assert stage.look()["phase"] == "adapting"
    stage.service.close()


# ------------------------------------------------------------------------------------------------------ odd inputs


def test_inputs_that_are_not_finite_are_answered_and_not_collected(stage, model):
    x = tiny_samples(3).batch(slice(None))
    x[1, 0, 0, 0] = float("nan")
    answer = stage.service(x)
    assert torch.equal(answer[::2], model(x)[::2])
    assert answer[1].isnan().all()
    state = stage.look()
    assert (state["n_seen"], state["n_collected"], state["n_refused"]) == (3, 2, 1)


def test_a_wrong_shape_is_an_error_for_its_caller_alone(stage):
    with pytest.raises(RuntimeError):
        stage.service(torch.zeros(2, 5, 8, 8))
    stage.feed(8)
    state = stage.look()
    assert (state["n_calls"], state["n_collected"], state["error"]) == (1, 8, "")


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_batches_are_answered(stage, n):
    assert stage.service(torch.zeros(n, 3, 8, 8)).shape == (n, 4)
    stage.serve()
    assert stage.service(torch.zeros(n, 3, 8, 8)).shape == (n, 4)
    assert stage.look()["n_unnoted"] == 0


def test_empty_batches_are_not_what_a_student_is_timed_on(stage, monkeypatch):
    timed = []
    monkeypatch.setattr(acceptance, "_speedup", lambda *given: timed.append(given[-1]) or 2.0)
    for _ in range(30):
        stage.service(torch.zeros(0, 3, 8, 8))
    stage.serve()
    assert timed == [8]


def test_inputs_that_are_no_tensor_are_answered_and_counted(model):
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, inputs):
            return self.net(inputs["x"])

    with OnlineService(First().eval(), speedup=1.5, poll_seconds=float("inf")) as service:
        assert service({"x": torch.zeros(2, 3, 8, 8)}).shape == (2, 4)
        state = service.state()
    assert (state["n_calls"], state["n_seen"], state["n_unnoted"]) == (1, 0, 1)


def test_answers_belong_to_the_caller(stage):
    stage.serve()
    for _ in range(10):
        stage.service(tiny_samples(8).batch(slice(None))).fill_(float("nan"))
    state = stage.look()
    assert state["drift"]["n_tests"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 3}, "num_samples must be at least 8"),
        ({"speedup": 0.5}, "speedup must be greater than 1"),
        ({"speedup": None}, "give exactly one"),
        ({"min_agreement": 2.0}, "min_agreement must be from 0 to 1"),
        ({"windows": 3}, "a setting must be one of"),
        ({"worker": "fiber"}, "worker must be process or thread"),
    ],
)
def test_values_that_break_a_rule_are_refused_at_once(model, settings, message):
    with pytest.raises(InvalidValueError, match=message):
        OnlineService(model, **{"speedup": 1.5, **settings})


# --------------------------------------------------------------------------------------------------------- refused


def test_a_student_that_disagrees_is_refused(artifact, model):
    stage = Stage(artifact, model, min_agreement=1.0)
    stage.feed()
    stage.look()
    stage.worker.adapt(lambda state: state["head.weight"].neg_())  # the student is not of this teacher
    stage.worker.finish()
    state = stage.look()
    assert (state["phase"], state["answers"]) == ("idle", "teacher")
    assert "the student was refused: it answers like the teacher on" in state["error"]
    assert stage.service.artifact is None
    stage.service.close()


def test_a_student_that_is_not_faster_is_refused(stage, monkeypatch):
    monkeypatch.setattr(acceptance, "_speedup", lambda *_: 0.9)
    stage.feed()
    stage.look()
    stage.worker.adapt()
    stage.worker.finish()
    state = stage.look()
    assert (state["phase"], state["answers"]) == ("idle", "teacher")
    assert "0.90 times as fast" in state["error"]


def test_a_teacher_that_answers_with_nan_is_refused(stage):
    stage.feed()
    stage.look()
    stage.worker.adapt(lambda state: state["head.bias"].fill_(float("nan")))
    state = stage.look()
    assert (state["phase"], state["answers"]) == ("idle", "source")
    assert "must predict finite values" in state["error"]
    assert stage.worker.stopped


def test_a_broken_artifact_is_refused(stage):
    stage.feed()
    stage.look()
    stage.worker.adapt()
    stage.worker.finish(broken=True)
    state = stage.look()
    assert (state["phase"], state["answers"]) == ("idle", "teacher")
    assert state["error"]


# --------------------------------------------------------------------------------------------------------- failures


def test_a_dead_worker_is_replaced_with_growing_pauses_and_then_no_more(stage):
    stage.feed()
    stage.look()
    for number, pause in ((1, 5.0), (2, 10.0)):
        assert len(stage.workers) == number
        stage.worker.fail("the background process was killed by signal 9", retryable=True)
        state = stage.look()
        assert (state["phase"], state["answers"]) == ("retrying", "source")
        assert "signal 9" in state["error"]
        stage.clock.now += pause - 0.1
        stage.look()
        assert len(stage.workers) == number
        stage.clock.now += 0.2
        assert stage.look()["phase"] == "adapting"
        assert len(stage.workers) == number + 1
        assert stage.worker.inputs.resume
    stage.worker.fail("killed again", retryable=True)
    assert stage.look()["phase"] == "idle"
    assert len(stage.workers) == 3
    assert stage.service(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


def test_a_worker_that_dies_late_keeps_the_teacher(stage):
    stage.feed()
    stage.look()
    stage.worker.adapt()
    stage.look()
    stage.worker.fail("killed", retryable=True)
    state = stage.look()
    assert (state["phase"], state["answers"]) == ("retrying", "teacher")
    stage.clock.now += 5
    stage.look()
    stage.worker.finish()
    assert stage.look()["phase"] == "serving"


def test_a_stated_error_is_not_tried_again(stage):
    stage.feed()
    stage.look()
    stage.worker.fail("no plan meets the target")
    state = stage.look()
    assert (state["phase"], state["error"], len(stage.workers)) == ("idle", "no plan meets the target", 1)


def test_what_a_process_cannot_do_a_thread_does(stage, caplog):
    stage.feed()
    stage.look()
    stage.worker.fail("the model cannot be rebuilt", needs_thread=True)
    state = stage.look()
    assert (state["worker"], state["worker_note"]) == ("thread", "the model cannot be rebuilt")
    assert [worker.kind for worker in stage.workers] == ["process", "thread"]
    assert "goes on in a thread" in caplog.text


def test_a_worker_that_cannot_be_started_is_tried_again(stage):
    stage.start_error = OSError("no memory")
    stage.feed()
    stage.look()
    state = stage.look()
    assert state["phase"] == "retrying"
    assert "could not be started: OSError: no memory" in state["error"]
    stage.start_error = None
    stage.clock.now += 5
    stage.look()
    assert len(stage.workers) == 1


def test_an_error_while_looking_never_reaches_a_caller(stage, monkeypatch):
    stage.serve()
    monkeypatch.setattr(type(stage.service._controller.monitor), "moved", lambda _: 1 / 0)
    assert "ZeroDivisionError" in stage.look()["error"]
    assert stage.service.answer(torch.zeros(2, 3, 8, 8)).by == "student"


# ------------------------------------------------------------------------------------------------------------ drift


def test_data_that_stay_keep_the_student(stage):
    stage.serve()
    stage.feed(800, seed=9, looks=True)
    state = stage.look()
    assert (state["phase"], state["n_moves"]) == ("serving", 0)
    assert state["drift"]["n_tests"] > 20


def test_data_that_move_lead_to_a_new_student(stage):
    stage.serve()
    stage.feed(160, seed=9, looks=True, change=4.0)
    state = stage.look()
    assert state["n_moves"] == 1
    assert any("the data moved" in event for _, event in state["events"])
    assert state["phase"] == "collecting"  # whatever the student says is good enough here: it goes on
    assert state["answers"] == "student"
    stage.clock.now += 59.0
    stage.feed(100, seed=10, change=4.0)
    assert stage.look()["phase"] == "collecting"  # the pause between two rounds
    stage.clock.now += 1.0
    assert stage.look()["phase"] == "adapting"
    assert stage.service.artifact is not None
    stage.worker.adapt()
    stage.worker.finish()
    state = stage.look()
    assert (state["phase"], state["n_rounds"], state["answers"]) == ("serving", 2, "student")


def test_a_student_that_parts_from_its_teacher_is_taken_out(stage):
    stage.serve()
    stage.service.policy = dataclasses.replace(stage.service.policy, min_agreement=1.0)
    stage.service._controller.policy = stage.service._controller.monitor.policy = stage.service.policy
    with torch.no_grad():
        stage.service._controller.student.module.head.weight.neg_()
    stage.feed(160, seed=9, looks=True, change=4.0)
    state = stage.look()
    assert (state["phase"], state["n_moves"]) == ("fallback", 1)
    assert state["answers"] in ("teacher", "source")
    assert state["shadow"]["share"] < 1.0


def test_shadows_tell_when_student_and_teacher_part(artifact, model):
    stage = Stage(artifact, model, shadow=1.0, window=100_000)
    stage.serve()
    stage.service._controller.policy = stage.service._controller.monitor.policy = dataclasses.replace(
        stage.service.policy, min_agreement=0.9
    )
    with torch.no_grad():
        stage.service._controller.student.module.head.weight.neg_()
    stage.feed(80, seed=9, looks=True)
    state = stage.look()
    assert (state["phase"], state["n_moves"]) == ("fallback", 1)
    assert any("student and teacher part" in event for _, event in state["events"])
    stage.service.close()


def test_data_that_move_while_compressing_end_the_worker(stage):
    stage.feed()
    stage.look()
    folder = stage.worker.inputs.folder
    stage.feed(160, seed=9, looks=True, change=4.0)
    state = stage.look()
    assert (state["phase"], state["answers"], state["n_moves"]) == ("collecting", "source", 1)
    assert stage.worker.stopped
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------------- many callers


def test_concurrent_callers_get_every_answer_from_one_model_each(stage, artifact, model):
    x = tiny_samples(8).batch(slice(None))
    stage.serve()
    student = ttmpd.load(artifact, model=model)(x).detach()
    expected = {"source": model(x).detach(), "student": student}
    controller, n, wrong, counts = stage.service._controller, 60, [], []
    answering = [controller.source, controller.student]

    def ask() -> None:
        right = 0
        for _ in range(n):
            answer = stage.service.answer(x)
            right += 1
            if answer.output.shape != (8, 4) or not torch.allclose(answer.output, expected[answer.by], atol=1e-5):
                wrong.append(answer.by)
        counts.append(right)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    before = stage.service.state()["n_calls"]
    for thread in threads:
        thread.start()
    for number in range(200):
        controller.served = answering[number % 2]
        stage.service.state()
        time.sleep(0)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert counts == [n] * 8
    assert stage.service.state()["n_calls"] - before == 8 * n
    assert stage.service.state()["n_unnoted"] == 0


def test_the_service_looks_by_itself(artifact, model):
    stage = Stage(artifact, model, poll_seconds=0.005)
    with stage.service as service:
        stage.feed()
        deadline = time.monotonic() + 120
        while service.state()["phase"] == "collecting" and time.monotonic() < deadline:
            time.sleep(0.005)
        assert service.state()["phase"] == "adapting"
    assert stage.worker.stopped
    assert not any(thread.name == "ttmpd-look" for thread in threading.enumerate())


# ----------------------------------------------------------------------------------------------------- save and close


def test_the_artifact_can_be_saved_and_loaded(stage, model, tmp_path):
    with pytest.raises(InvalidValueError, match="made a student to save, but is collecting"):
        stage.service.save(tmp_path / "early")
    stage.serve()
    x = tiny_samples(4).batch(slice(None))
    loaded = ttmpd.load(stage.service.save(tmp_path / "out"), model=model)
    assert torch.allclose(loaded(x), stage.service(x), atol=1e-6)


def test_the_newest_student_is_kept_in_the_output(artifact, model, tmp_path):
    stage = Stage(artifact, model, output=tmp_path / "kept")
    stage.serve()
    stage.service.close()
    assert (tmp_path / "kept" / "plan.json").exists()
    assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith(".")]


def test_a_copy_that_broke_off_is_made_again(stage, tmp_path, monkeypatch):
    def full(source: Path, goal: Path) -> None:
        if source.name == "plan.json":
            raise KeyboardInterrupt
        shutil.copyfile(source, goal)

    stage.serve()
    with monkeypatch.context() as patch:
        patch.setattr(service_module, "write_copy", full)
        with pytest.raises(KeyboardInterrupt):
            stage.service.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (stage.service.save(tmp_path / "out") / "plan.json").exists()


def test_a_student_that_is_taken_in_while_the_service_closes_is_kept(artifact, model, tmp_path, monkeypatch):
    stage = Stage(artifact, model, output=tmp_path / "kept")
    stage.feed()
    stage.look()
    stage.worker.adapt()
    stage.worker.finish()
    controller, closing = stage.service._controller, threading.Thread(target=stage.service.close)
    true = controller.look

    def look() -> None:
        closing.start()  # it has to wait
        closing.join(0.05)
        true()

    monkeypatch.setattr(controller, "look", look)
    stage.service.look()
    closing.join()
    assert (tmp_path / "kept" / "plan.json").exists()
    assert stage.service.state()["phase"] == "closed"


def test_what_a_killed_service_left_is_removed_by_the_next_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young, other = (tmp_path / name for name in ("ttmpd-online-left", "ttmpd-online-young", "other"))
    for folder in (left, young, other):
        (folder / "job-1").mkdir(parents=True)
    (left / ".lock").touch()
    with OnlineService(model, speedup=1.5, poll_seconds=float("inf")) as first:
        own = Path(first._folder.name)
        for folder in (left, other, own):
            os.utime(folder, (0, 0))
        OnlineService(model, speedup=1.5, poll_seconds=float("inf")).close()
        assert sorted(tmp_path.iterdir()) == sorted([young, other, own])
    assert sorted(tmp_path.iterdir()) == sorted([young, other])


def test_close_ends_everything_twice(stage):
    stage.feed()
    stage.look()
    folder = stage.worker.inputs.folder
    stage.service.close()
    stage.service.close()
    assert stage.worker.stopped
    assert not folder.exists()
    assert stage.look()["phase"] == "closed"
    assert stage.service.artifact is None
    assert stage.service(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
