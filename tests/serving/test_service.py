"""A service in front of a tiny model: answers, swaps, drift, failures; worker and clock are in the test's hands."""

import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import ttmpd
from service_stage import Stage
from ttmpd.errors import InvalidValueError
from ttmpd.serving import acceptance
from ttmpd.serving import service as service_module
from ttmpd.serving.service import OnlineService
from ttmpd.testing.tiny_models import assert_untouched, tiny_samples

pytestmark = pytest.mark.usefixtures("twice_as_fast")


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


def test_what_a_killed_service_left_is_removed_at_once_by_the_next_one(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, unlocked, other = (tmp_path / name for name in ("ttmpd-online-left", "ttmpd-online-unlocked", "other"))
    for folder in (left, unlocked, other):
        (folder / "job-1" / "student").mkdir(parents=True)
    (left / ".lock").touch()
    (left / "job-1" / "student" / "plan.json").touch()

    def folders():
        return sorted(path for path in tmp_path.iterdir() if path.is_dir())

    with OnlineService(model, speedup=1.5, poll_seconds=float("inf")) as first:
        own = Path(first._folder.name)
        assert folders() == sorted([other, own])
        OnlineService(model, speedup=1.5, poll_seconds=float("inf")).close()
        assert folders() == sorted([other, own])  # that of a service that runs stays
    assert folders() == [other]
    assert f"{left}: its samples, and a student, which was not saved" in caplog.text
    assert f"{unlocked}: its samples, and no student yet" in caplog.text


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
