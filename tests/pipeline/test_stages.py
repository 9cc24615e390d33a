"""Stages on disk: what is finished is not computed again, what is broken is."""

import pytest
import torch

from ttmpd.pipeline.stages import Stages
from ttmpd.progress import watched


class Work:
    """Counts how often it is done."""

    def __init__(self) -> None:
        self.done = 0

    def data(self):
        self.done += 1
        return {"n": self.done}

    def tensors(self):
        self.done += 1
        return {"w": torch.full((2,), float(self.done))}, {"n": self.done}


def test_a_finished_stage_is_not_computed_again(tmp_path):
    work = Work()
    first = Stages(tmp_path / "w", "run", resume=True)
    assert first.json("a", work.data) == {"n": 1}
    assert first.tensors("b", work.tensors)[1] == {"n": 2}
    assert first.reused == []
    again = Stages(tmp_path / "w", "run", resume=True)
    assert again.json("a", work.data) == {"n": 1}
    tensors, data = again.tensors("b", work.tensors)
    assert (tensors["w"].tolist(), data) == ([2.0, 2.0], {"n": 2})
    assert work.done == 2
    assert again.reused == ["a", "b"]
    assert again.seconds() == first.seconds()


def test_stages_of_one_target_are_kept_apart_from_those_of_another(tmp_path):
    work = Work()
    stages = Stages(tmp_path / "w", "run")
    stages.json("time", work.data)
    assert stages.json("plan", work.data, "a") == {"n": 2}
    assert stages.json("plan", work.data, "b") == {"n": 3}
    assert stages.json("plan", work.data, "a") == {"n": 2}
    assert stages.tensors("fit", work.tensors, "a")[1] == {"n": 4}
    assert stages.tensors("fit", work.tensors, "b")[1] == {"n": 5}
    assert set(stages.seconds("a")) == {"time", "plan", "fit"}
    assert set(stages.seconds()) == {"time"}
    assert stages.reused == ["plan-a"]


@pytest.mark.parametrize(("run", "resume"), [("other", True), ("run", False)])
def test_another_run_or_a_new_start_keeps_nothing(tmp_path, run, resume):
    work = Work()
    Stages(tmp_path / "w", "run").json("a", work.data)
    assert Stages(tmp_path / "w", run, resume).json("a", work.data) == {"n": 2}


@pytest.mark.parametrize("broken", [b"", b"{", b"[1", b"null", b'{"data": 1}', b"\xff\xfe"])
def test_a_broken_file_is_computed_again(tmp_path, broken):
    work = Work()
    stages = Stages(tmp_path / "w", "run")
    stages.json("a", work.data)
    stages.tensors("b", work.tensors)
    (tmp_path / "w" / "a.json").write_bytes(broken)
    (tmp_path / "w" / "b.safetensors").write_bytes(broken)
    again = Stages(tmp_path / "w", "run", resume=True)
    assert again.json("a", work.data) == {"n": 3}
    assert again.tensors("b", work.tensors)[1] == {"n": 4}
    assert again.reused == []


def test_a_truncated_tensor_file_is_computed_again(tmp_path):
    work = Work()
    stages = Stages(tmp_path / "w", "run")
    stages.tensors("b", work.tensors)
    path = tmp_path / "w" / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert Stages(tmp_path / "w", "run", resume=True).tensors("b", work.tensors)[1] == {"n": 2}


def test_a_broken_marker_is_another_run(tmp_path):
    work = Work()
    Stages(tmp_path / "w", "run").json("a", work.data)
    (tmp_path / "w" / "run.json").write_text("{")
    assert Stages(tmp_path / "w", "run", resume=True).json("a", work.data) == {"n": 2}


def test_a_failing_stage_leaves_nothing(tmp_path):
    stages = Stages(tmp_path / "w", "run")

    def fail():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        stages.json("a", fail)
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["run.json"]
    assert stages.json("a", lambda: 5) == 5


def test_a_watcher_hears_of_every_stage_whether_new_or_reused(tmp_path):
    stages, finished = Stages(tmp_path / "w", "run"), []

    def note(name, path):
        finished.append((name, path.exists()))

    work = Work()
    with watched(lambda *_: None, note):
        stages.json("a", work.data)
        stages.tensors("b", work.tensors)
        Stages(tmp_path / "w", "run", resume=True).tensors("b", work.tensors)
    stages.json("c", work.data)
    assert finished == [("a", True), ("b", True), ("b", True)]


HERE = {"ttmpd": "1.0", "device": "this CPU", "threads": 2}


def left_by(tmp_path, now, resume=True):
    """The stages of a run that goes on with what a run under ``HERE`` left."""
    stages = Stages(tmp_path / "w", "run", circumstances=HERE)
    stages.json("score", lambda: 1)
    stages.tensors("adapt", lambda: ({"w": torch.ones(1)}, None))
    stages.json("timing", lambda: 1)
    stages.json("plan", lambda: 1, "a")
    (stages.folder / "targets").mkdir()
    return Stages(tmp_path / "w", "run", resume, now)


def test_the_same_circumstances_keep_everything(tmp_path):
    again = left_by(tmp_path, HERE)
    assert (again.json("timing", lambda: 2), again.json("plan", lambda: 2, "a"), again.restarted) == (1, 1, "")


@pytest.mark.parametrize("change", [{"device": "a GPU"}, {"threads": 1}, {"runtime": "eager 2"}])
def test_on_another_device_what_depends_on_milliseconds_is_made_anew(tmp_path, change, caplog):
    again = left_by(tmp_path, HERE | change)
    assert again.json("score", lambda: 2) == 1
    assert again.tensors("adapt", lambda: ({"w": torch.zeros(1)}, None))[0]["w"].item() == 1
    assert again.json("timing", lambda: 2) == 2
    assert again.json("plan", lambda: 2, "a") == 2
    assert not (again.folder / "targets").exists()
    assert next(iter(change)) in again.restarted
    assert again.restarted in caplog.text


def test_what_another_version_left_is_not_gone_on_with(tmp_path):
    again = left_by(tmp_path, HERE | {"ttmpd": "1.1"})
    assert again.json("score", lambda: 2) == 2
    assert "1.0, now 1.1" in again.restarted


def test_a_new_start_says_nothing(tmp_path):
    again = left_by(tmp_path, HERE | {"threads": 1}, resume=False)
    assert (again.json("score", lambda: 2), again.restarted) == (2, "")
