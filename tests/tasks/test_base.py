"""What a model's output is read as, and which task it is of."""

import collections
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.method import from_dict
from ttmpd.tasks.base import Clues, Task, detect_task
from ttmpd.tasks.classification import Classification
from ttmpd.tasks.embedding import Embedding
from ttmpd.tasks.multi_label import MultiLabel
from ttmpd.tasks.next_token import NextToken
from ttmpd.tasks.regression import Regression
from ttmpd.tasks.segmentation import Segmentation
from ttmpd.tasks.token_classification import TokenClassification

A = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
B = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
IMAGES, IDS = torch.zeros(4, 3, 8, 8), torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])


class Config:
    """As Hugging Face's."""

    def __init__(self, problem_type: str = "") -> None:
        self.problem_type, self.architectures = problem_type, ()


def module(problem_type: str = "", **attributes: Any) -> nn.Module:
    net = nn.Linear(2, 2)
    if problem_type:
        net.config = Config(problem_type)  # type: ignore[assignment]
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


@pytest.mark.parametrize(
    ("net", "raw", "task"),
    [
        (module(), A, Classification),
        (module(), (A, B), Classification),
        (module(), {"embedding": B, "logits": A}, Classification),
        (module(), torch.randn(4, 1), Regression),
        (module(), torch.randn(4), Regression),
        (module("regression"), A, Regression),
        (module("multi_label_classification"), A, MultiLabel),
        (module("single_label_classification"), A, Classification),
        (module(num_classes=0), A, Embedding),
        (module(), {"last_hidden_state": torch.randn(4, 6, 5), "pooler_output": A}, Embedding),
    ],
)
def test_the_task_is_told_from_the_model(net: nn.Module, raw: Any, task: type[Task]) -> None:
    found = detect_task(Clues(net, raw, IMAGES))
    assert type(found) is task
    assert found.outputs(raw, IMAGES).shape[0] == 4


def test_text_models_are_told_by_what_they_answer() -> None:
    raw = torch.randn(2, 4, 9)
    assert type(detect_task(Clues(module(), raw, IDS, "token"))) is TokenClassification
    assert type(detect_task(Clues(module(), raw, IDS, "next"))) is NextToken


def test_all_heads_of_a_tuple_are_held() -> None:
    task = detect_task(Clues(module(), (A, B), IMAGES))
    outputs = task.outputs((A, B), IMAGES)
    assert task.parts == ("0", "1") and task.widths == (5, 3)
    assert torch.equal(outputs, torch.cat([A, B], 1))
    other = torch.cat([A, -3 * B], 1)
    assert task.agreement(other, outputs) < 1.0
    assert float(task.loss(other, outputs)) > 0.1


def test_of_a_dict_the_named_logits_count() -> None:
    task = detect_task(Clues(module(), {"embedding": B, "logits": A}, IMAGES))
    assert task.parts == ("logits",)
    assert torch.equal(task.outputs({"embedding": B, "logits": A}, IMAGES), A)
    ordered = collections.OrderedDict(aux=torch.randn(4, 5, 8, 8), out=torch.randn(4, 5, 8, 8))
    assert Segmentation().resolved(ordered, IMAGES).parts == ("out",)


def test_several_equally_likely_tensors_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"digit, ink.*parts=\('digit', 'ink'\)"):
        detect_task(Clues(module(), {"digit": A, "ink": B}, IMAGES))
    task = Classification(parts=("ink",)).resolved({"digit": A, "ink": B}, IMAGES)
    assert torch.equal(task.outputs({"digit": A, "ink": B}, IMAGES), B)


@pytest.mark.parametrize(
    ("shape", "step"), [((4, 5, 1, 1), r"\.flatten\(1\)"), ((4, 3, 8, 8), "segmentation"), ((4, 6, 5), "name its task")]
)
def test_other_shapes_are_refused_with_the_next_step(shape: tuple[int, ...], step: str) -> None:
    with pytest.raises(ModelError, match=step):
        detect_task(Clues(module(), torch.zeros(shape), IMAGES))


def test_a_missing_part_is_named() -> None:
    with pytest.raises(ModelError, match="'ink', but has digit"):
        Classification(parts=("ink",)).outputs({"digit": A}, IMAGES)


@pytest.mark.parametrize("task", [Regression(), Embedding()])
def test_what_has_no_entropy_says_so(task: Task) -> None:
    assert task.reason_not_to_adapt and task.confidence(A) is None
    with pytest.raises(UnsupportedError, match="use adapt none"):
        task.uncertainty(A)
    with pytest.raises(UnsupportedError, match="use adapt none"):
        task.information(A)


def test_a_resolved_task_comes_back_from_plain_data() -> None:
    task = detect_task(Clues(module(), (A, B), IMAGES))
    data: dict[str, Any] = json.loads(json.dumps(task.to_dict()))
    assert from_dict("tasks", data) == task


def rows(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_regression_is_measured_in_deviations_of_the_teacher() -> None:
    task, teacher = Regression(tolerance=0.5), rows(0, 2, 4, 6)
    assert task.agreement(teacher + 0.1, teacher) == 1.0
    assert task.agreement(torch.zeros(4, 1), teacher) == 0.25
    assert task.agreement(teacher * 10, teacher * 10) == 1.0
    assert task.metrics(teacher, teacher)["r2"] == 1.0
    assert task.metrics(torch.full((4, 1), 3.0), teacher)["r2"] == pytest.approx(0.0)
    assert float(task.loss(torch.full((4, 1), 3.0), teacher)) == pytest.approx(1.0)


def test_labels_depend_on_the_level_of_their_logits() -> None:
    task, teacher = MultiLabel(), torch.tensor([[2.0, -2.0, 2.0]])
    shifted = teacher + 5  # a softmax would not see it
    assert task.agreement(shifted, teacher) == pytest.approx(2 / 3)
    assert float(task.loss(shifted, teacher)) > 1.0
    assert task.metrics(teacher, torch.tensor([[1.0, 0.0, 0.0]]))["right_labels"] == pytest.approx(2 / 3)


def test_tokens_of_padding_do_not_count_and_many_are_spread() -> None:
    raw = torch.arange(2 * 4 * 9).reshape(2, 4, 9).float()
    task = TokenClassification(padding=0)
    assert task.outputs(raw, IDS).shape == (5, 9)
    assert task.row_counts(IDS).tolist() == [3, 2]
    assert TokenClassification(padding=0, max_tokens=2).row_counts(IDS).tolist() == [2, 2]
    assert NextToken(padding=0).targets(IDS).tolist() == [6, 7, -1, 6, -1]


def test_segmentation_reads_an_even_grid() -> None:
    raw = torch.randn(2, 4, 32, 48)
    task = Segmentation(pixels=100).resolved(raw, IMAGES[:2])
    outputs = task.outputs(raw, IMAGES[:2])
    assert len(outputs) == int(task.row_counts(IMAGES[:2]).sum()) <= 2 * 100 * 2
    assert torch.equal(outputs[0], raw[0, :, 0, 0])
    with pytest.raises(ModelError, match="two classes or more"):
        Segmentation().matrix(torch.zeros(2, 1, 8, 8), IMAGES)


def test_an_embedding_leaves_padding_out_of_its_mean() -> None:
    raw = torch.ones(2, 4, 3)
    raw[:, 3] = 100.0
    assert torch.equal(Embedding(padding=0).matrix(raw, IDS), torch.ones(2, 3))
