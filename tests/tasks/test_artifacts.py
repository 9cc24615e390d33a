"""An artifact keeps the task with which it was made: nobody has to name it again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ttmpd
from ttmpd.artifact.read import open_any, read_artifact
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import CheckpointError, InvalidValueError
from ttmpd.models.tokens import carried_task
from ttmpd.tasks.multi_label import MultiLabel
from ttmpd.testing.tiny_models import tiny_model
from ttmpd.training.task import task_of

TINY = "ttmpd.testing.tiny_models:tiny_model"
QUICK = {"num_samples": 40, "batch_size": 8}


def images(n: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores look like those of classes, compressed as one of several labels."""
    place = tmp_path_factory.mktemp("labels") / "out"
    ttmpd.compress(
        TINY, images(), macs=0.9, task="multi_label", score="magnitude", output=place,
        distill=OneTime(steps=1, views=1), **QUICK,
    )  # fmt: skip
    return place


def test_a_loaded_model_carries_its_task(folder: Path) -> None:
    for net in (ttmpd.load(folder, tiny_model()), open_any(folder, TINY).module):
        task = task_of(net)
        assert isinstance(task, MultiLabel) and task.widths == (4,)


def test_all_commands_read_it_as_what_it_is(folder: Path) -> None:
    opened = open_any(folder, TINY)
    fresh = images(20, seed=1)
    for pair in ((folder, TINY), (TINY, folder)):
        measured = ttmpd.evaluate(pair[0], fresh, against=pair[1], source=TINY)
        assert measured.task == "multi_label" and measured.agreement is not None
    assert ttmpd.inspect(opened, fresh, timed=False).task == "multi_label"
    assert len(ttmpd.bench(folder, TINY, batch_sizes=[2], device="cpu")) == 1
    with ttmpd.OnlineService(opened, speedup=1.5, num_samples=16, poll_seconds=float("inf")) as service:
        assert "labels" in service.records(fresh, service.answer(fresh))[0]


@pytest.mark.usefixtures("quick_timing")
def test_a_second_run_goes_on_with_it(folder: Path, tmp_path: Path) -> None:
    ttmpd.adapt_to(open_any(folder, TINY), images(), output=tmp_path / "adapted", **QUICK)
    assert isinstance(read_artifact(tmp_path / "adapted").task, MultiLabel)


def test_another_task_by_hand_is_refused(folder: Path) -> None:
    opened = open_any(folder, TINY)
    for call in (
        lambda: ttmpd.evaluate(folder, images(20, seed=1), source=TINY, task="classification"),
        lambda: ttmpd.compress(opened, images(), macs=0.9, task="embedding"),
        lambda: ttmpd.inspect(opened, images(), timed=False, task="classification"),
    ):
        with pytest.raises(InvalidValueError, match=r"must be that with which the model was made, multi_label.*leave"):
            call()
    assert ttmpd.evaluate(folder, images(20, seed=1), source=TINY, task="multi_label").task == "multi_label"


def test_a_task_that_only_the_file_names_is_not_imported(folder: Path, tmp_path: Path) -> None:
    plan = (folder / "plan.json").read_text().replace('"name": "multi_label"', '"name": "antigravity:Task"', 1)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "plan.json").write_text(plan)
    with pytest.raises(CheckpointError, match="antigravity"):
        read_artifact(copy)


def test_a_model_of_ones_own_carries_nothing() -> None:
    net: nn.Module = tiny_model()
    ttmpd.evaluate(net, images(8), task="multi_label")
    assert carried_task(net) is None
