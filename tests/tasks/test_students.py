"""Students are trained on labels and on a teacher as their task says, or not at all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, ModelError, UnsupportedError
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.models.tokens import carried_task
from ttmpd.select.el2n import EL2N
from ttmpd.students.adversarial import Attack
from ttmpd.students.run import run_student
from ttmpd.students.train import train_student

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"fraction": 1.0, "steps": 60, "batch_size": 16, "lr": 0.02, "weight_decay": 0.0}


def samples() -> Samples:
    return open_samples(X, None)


def net(n_outputs: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, n_outputs)).eval()


NUMBERS = X[:, :1] * 2 + X[:, 1:2]
SIGNS = (X[:, :3] > 0).float()


@pytest.mark.parametrize(
    ("task", "labels", "measure", "sign"),
    [
        ("classification", X[:, :3].argmax(1), "accuracy", 1.0),
        ("regression", NUMBERS, "mean_absolute_error", -1.0),
        ("multi_label", SIGNS, "right_labels", 1.0),
    ],
)
def test_labels_are_learned_as_the_task_says(task: str, labels: Tensor, measure: str, sign: float) -> None:
    student = net(3 if task != "regression" else 1)
    result = train_student(student, samples(), labels, task=task, **QUICK)
    carried = carried_task(result.model)
    assert carried.name == task and carried_task(student) is None
    before, after = (carried.metrics(predictions_of(model, samples(), 16), labels) for model in (student, result.model))
    assert sign * after[measure] > sign * before[measure], "training must move the measure of the task"
    goal = predictions_of(result.model, samples(), 16)
    fresh = net(goal.shape[1], 1)
    taught = train_student(fresh, samples(), labels, task=task, teacher=result.model, alpha=1.0, **QUICK)
    start, end = (carried.loss(predictions_of(model, samples(), 16), goal) for model in (fresh, taught.model))
    assert float(end) < float(start), "the teacher's predictions must be mimicked"


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("regression", torch.zeros(48, 2), r"1 finite numbers per sample"),
        ("regression", torch.full((48, 1), float("nan")), "NaN or infinity"),
        ("multi_label", torch.zeros(48, dtype=torch.long), r"1 zeros or ones per sample"),
        ("multi_label", torch.full((48, 1), 0.5), r"zeros or ones"),
        ("classification", torch.zeros(48, 1), "one class index per sample"),
    ],
)
def test_labels_of_another_shape_are_refused(task: str, labels: Tensor, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        train_student(net(1), samples(), labels, task=task, **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balanced": True}, "a balanced selection must have one row of class scores.*regression"),
        ({"attack": Attack()}, "an attack must have one row of class scores.*regression"),
        ({"select": EL2N(), "fraction": 0.5}, "a selector must have one row of class scores.*regression"),
    ],
)
def test_what_needs_classes_is_refused(settings: dict[str, Any], message: str) -> None:
    teacher = net(1)
    with pytest.raises(UnsupportedError, match=message):
        train_student(net(1, 1), samples(), NUMBERS, teacher=teacher, **QUICK | settings)
    assert carried_task(teacher) is None


def test_a_task_without_labels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"task embedding has none.*ttmpd\.compress"):
        train_student(net(4), samples(), torch.zeros(48, dtype=torch.long), task="embedding", **QUICK)


def test_a_teacher_of_another_task_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"same classes.*regression"):
        train_student(net(3), samples(), X[:, :3].argmax(1), teacher=net(1), **QUICK)


def test_a_file_of_labels_is_one_of_classes(tmp_path: Any) -> None:
    import numpy as np

    np.savez(tmp_path / "data.npz", x=X.numpy(), y=np.zeros(48, dtype=np.int64))
    with pytest.raises(UnsupportedError, match=r"a file of labels must have one row of class scores.*train_student"):
        run_student(OpenedModel(net(1), "", False), str(tmp_path / "data.npz"), None, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


class Auxiliary(nn.Module):
    """In train mode it answers with another head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head, self.auxiliary = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        features = self.norm(self.body(x))
        return [self.auxiliary(features), self.head(features)] if self.training else self.head(features)


class AsksItsNorm(Auxiliary):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return (scores, scores) if self.norm.training else scores


def test_a_student_is_not_asked_in_its_own_train_mode() -> None:
    student = Auxiliary().eval()
    result = train_student(student, samples(), X[:, :3].argmax(1), **QUICK)
    trained = result.model.state_dict()
    assert torch.equal(trained["auxiliary.bias"], student.state_dict()["auxiliary.bias"])
    assert not torch.equal(trained["norm.running_mean"], student.state_dict()["norm.running_mean"])
    with pytest.raises(ModelError, match="train mode as in eval mode"):
        train_student(AsksItsNorm().eval(), samples(), X[:, :3].argmax(1), **QUICK)
