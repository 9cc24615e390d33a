"""Which students a running service takes in, keeps and takes out again."""

import dataclasses

import pytest
import torch

from service_stage import Stage
from ttmpd.serving import acceptance

pytestmark = pytest.mark.usefixtures("twice_as_fast")

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
