"""A running service reads, compares, watches and shows predictions as the task of its model says."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import carried_task, carry_task
from ttmpd.serving.acceptance import accept
from ttmpd.serving.monitor import AnswerMonitor, Served
from ttmpd.serving.policy import Policy
from ttmpd.serving.service import OnlineService
from ttmpd.serving.worker import JobInputs, Outcome, Progress
from ttmpd.tasks.base import Task
from ttmpd.tasks.classification import Classification
from ttmpd.tasks.embedding import Embedding
from ttmpd.tasks.multi_label import MultiLabel
from ttmpd.tasks.regression import Regression
from ttmpd.tasks.segmentation import Segmentation
from ttmpd.training.task import assign_task


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.digit, self.ink = flat(4), flat(3)

    def forward(self, x: Tensor) -> Any:
        return {"digit": self.digit(x), "ink": self.ink(x)}


def flat(n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, n_outputs))


def dense() -> nn.Module:
    return nn.Conv2d(3, 4, 1)


def images(n: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


class IdleWorker:
    kind = "process"

    def progress(self) -> Progress:
        return Progress()

    def outcome(self) -> Outcome | None:
        return None

    def stop(self) -> None:
        pass


@contextmanager
def serving(net: nn.Module, **settings: Any) -> Iterator[tuple[OnlineService, list[JobInputs]]]:
    jobs: list[JobInputs] = []

    def begin(inputs: JobInputs, _kind: str) -> IdleWorker:
        jobs.append(inputs)
        return IdleWorker()

    opened = OpenedModel(net.eval(), "", False)
    settings |= {"speedup": 1.5, "num_samples": 32, "acceptance_holdout": 0.5, "poll_seconds": math.inf}
    with OnlineService(opened, worker=begin, **settings) as service:
        yield service, jobs


CASES: list[tuple[nn.Module, Task | None, type[Task], set[str]]] = [
    (flat(4), None, Classification, {"class", "probability", "top", "scores"}),
    (TwoHeads(), Classification(parts=("digit", "ink")), Classification, {"parts"}),
    (flat(1), None, Regression, {"values"}),
    (flat(6), MultiLabel(), MultiLabel, {"labels", "probabilities"}),
    (flat(5), Embedding(), Embedding, {"values"}),
    (dense(), Segmentation(), Segmentation, {"classes"}),
]


@pytest.mark.parametrize(("net", "task", "kind", "keys"), CASES)
def test_a_service_tells_and_shows_what_its_model_predicts(
    net: nn.Module, task: Task | None, kind: type[Task], keys: set[str]
) -> None:
    settings = {} if task is None else {"task": task}
    with serving(net, **settings) as (service, jobs):
        x = images()
        records = service.records(x, service.answer(x))
        assert len(records) == 40 and set(records[0]) == keys
        service.look()
        assert type(carried_task(jobs[0].opened.module)) is kind, "the worker must get the task with the model"
        assert service.state()["n_unnoted"] == 0
        for seed in range(1, 9):
            service(images(64, seed) * 30 + 9)
            service.look()
        assert service.state()["n_moves"] >= 1, "drift must be seen in predictions of any task"
    assert carried_task(net) is None, "the caller's module must stay as it was"


def test_what_is_shown_is_what_was_predicted() -> None:
    x = images(3)
    with serving(dense(), task="segmentation") as (service, _):
        answer = service.answer(x)
        shown = [record["classes"] for record in service.records(x, answer)]
        assert shown == answer.output.argmax(1).tolist()
    with serving(flat(6), task="multi_label") as (service, _):
        answer = service.answer(x)
        for record, row in zip(service.records(x, answer, top=6), answer.output, strict=True):
            assert {label["label"] for label in record["labels"]} == set((row > 0).nonzero().flatten().tolist())
    with serving(TwoHeads(), task=Classification(parts=("ink",))) as (service, _):
        answer = service.answer(x)
        shown = [record["class"] for record in service.records(x, answer)]
        assert shown == answer.output["ink"].argmax(1).tolist()


def test_an_output_that_no_task_can_read_is_answered_and_said() -> None:
    with serving(TwoHeads()) as (service, jobs):
        assert set(service(images())) == {"digit", "ink"}
        service.look()
        state = service.state()
        assert "there will be no student" in state["error"] and "digit, ink" in state["error"]
        assert (state["n_unnoted"], state["n_collected"], jobs) == (1, 0, [])


def samples(n: int = 40) -> Samples:
    return open_samples(images(n), None)


def carrying(net: nn.Module, task: Task | None = None) -> nn.Module:
    assign_task(net.eval(), images(4), task)
    return net


@pytest.mark.parametrize(
    ("net", "task", "change"),
    [
        (flat(1), None, 3.0),  # the arg-max of one number is always the same
        (flat(6), MultiLabel(), 3.0),  # a softmax does not see a shift of all logits
    ],
)
def test_a_student_is_accepted_by_what_its_task_calls_the_same(
    net: nn.Module, task: Task | None, change: float
) -> None:
    teacher = carrying(net, task)
    student = carrying(nn.Sequential(flat(1 if task is None else 6)), task)
    student.load_state_dict({f"0.{name}": value for name, value in teacher.state_dict().items()})
    same = accept(student, teacher, samples(), n_batch=2, policy=Policy(min_speedup=0.0))
    assert (same.refused, same.agreement) == ("", 1.0)
    with torch.no_grad():
        student[0][1].bias.add_(change)  # type: ignore[index, union-attr]
    other = accept(student, teacher, samples(), n_batch=2, policy=Policy(min_speedup=0.0))
    assert "answers like the teacher" in other.refused and other.agreement < 0.8


def test_without_a_criterion_the_first_candidate_answers_again() -> None:
    monitor = AnswerMonitor(Policy())
    first, second = (Served(name, carrying(flat(1)), number) for number, name in enumerate(("teacher", "student")))
    monitor.begin(second, samples())
    for _ in range(4):
        monitor.note(second, images(16), torch.zeros(16, 1))
    assert monitor.better([first, second]) is first
    shadow = monitor.compare(second.module, first.module)
    assert shadow is not None and shadow.share < 1.0


def test_a_task_by_hand_is_carried_from_the_model_to_the_service() -> None:
    net = flat(6).eval()
    carry_task(net, MultiLabel())
    with serving(net) as (service, _):
        x = images(2)
        assert "labels" in service.records(x, service.answer(x))[0]
