"""What answers tell: how much the samples explain, whether two models part, what a user is told."""

import math

import pytest
import torch

from ttmpd.quality.evidence import GROUPS, Answers, parting
from ttmpd.tasks.classification import Classification
from ttmpd.tasks.embedding import Embedding

TASK = Classification()


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def answers(outputs: torch.Tensor, reference: torch.Tensor | None = None) -> Answers:
    return Answers(TASK, outputs, outputs if reference is None else reference)


def entropy(*p: float) -> float:
    return -sum(value * math.log(value) for value in p)


def test_the_share_that_samples_explain_by_hand():
    outputs = logits((0.9, 0.1), (0.3, 0.7))  # the mean is (0.6, 0.4)
    expected = 1 - (entropy(0.9, 0.1) + entropy(0.3, 0.7)) / 2 / entropy(0.6, 0.4)
    assert answers(outputs).explained() == pytest.approx(expected, rel=1e-5)


def test_a_mixture_of_few_classes_explains_as_much_as_one_of_many():
    sure = 0.97
    many = logits(*([(1 - sure) / 3 if i != c else sure for i in range(4)] for c in range(4))).repeat(10, 1)
    two = many[(many.argmax(-1) < 2)]
    assert TASK.information(two) < 0.6 * TASK.information(many)  # information alone would prefer the many by far
    assert answers(two).explained() == pytest.approx(answers(many).explained(), abs=0.1)


def test_answers_that_are_sure_but_all_the_same_explain_nothing():
    assert answers(logits(*[(0.99, 0.01)] * 20)).explained() == pytest.approx(0.0, abs=1e-6)
    assert answers(torch.tensor([[100.0, 0.0]] * 20)).explained() == pytest.approx(0.0, abs=1e-6)


def test_variety_that_is_not_its_own_earns_nothing():
    one_class, spread = logits(*[(0.9, 0.1)] * 10, *[(0.8, 0.2)] * 10), logits((0.9, 0.1), (0.1, 0.9)).repeat(10, 1)
    assert answers(spread).explained() > answers(one_class).explained() + 0.3
    before, after = answers(one_class), answers(logits((0.85, 0.15), (0.15, 0.85)).repeat(10, 1), one_class)
    assert after.explained() < before.explained() + 0.05


def test_answers_that_are_not_finite_explain_nothing_at_all():
    assert answers(torch.full((20, 3), float("nan"))).explained() == -math.inf


def test_the_error_is_that_of_leaving_out_groups():
    generator = torch.Generator().manual_seed(0)
    first, second = (answers(3 * torch.randn(GROUPS * 4, 5, generator=generator)) for _ in range(2))
    gain, error = first.gain(second)
    assert gain == pytest.approx(first.explained() - second.explained())
    kept = [torch.arange(GROUPS * 4) // 4 != group for group in range(GROUPS)]
    each = torch.tensor([first.explained(rows) - second.explained(rows) for rows in kept])
    assert error == pytest.approx(
        math.sqrt((GROUPS - 1) / GROUPS * float((each - each.mean()).square().sum())), rel=1e-4
    )
    assert first.gain(first) == (0.0, 0.0)


def test_two_part_beyond_doubt_where_they_differ_more_than_they_say_they_err():
    sure, other = logits((0.99, 0.01)).repeat(100, 1), logits((0.99, 0.01)).repeat(100, 1)
    other[:20] = other[:20].flip(-1)  # a fifth differs, each of the two says it errs in one of a hundred
    assert answers(sure).parted_beyond_doubt(answers(other), 2.0)
    unsure = logits((0.8, 0.2)).repeat(100, 1)
    unsure[:20] = unsure[:20].flip(-1)  # the same answers, with doubt enough
    assert not answers(sure).parted_beyond_doubt(answers(unsure), 2.0)
    assert not answers(sure).parted_beyond_doubt(answers(sure), 2.0)


def test_a_task_without_confidence_never_parts_beyond_doubt():
    first, second = (Answers(Embedding(), value, value) for value in torch.eye(6).view(2, 3, 6))
    assert not first.parted_beyond_doubt(second, 2.0)


def test_the_user_is_told_classes_agreement_and_warned():
    original = logits((0.97, 0.02, 0.01)).repeat(50, 1)
    adapted = original.clone()
    adapted[:15] = adapted[:15].roll(1, -1)
    told = parting(original, adapted, TASK)
    assert told.facts == pytest.approx({"agreement_with_original": 0.7, "parted_where_sure": 0.3})
    assert "classes predicted most: 0 (70%), 1 (30%)" in told.note and "2 (" not in told.note
    assert "agrees with the original on 70%" in told.note
    assert "WARNING: answers otherwise on 30%" in told.note
    assert "WARNING" not in parting(original, original, TASK).note
    # Where the original was not sure, nobody need be warned.
    unsure = logits((0.6, 0.3, 0.1)).repeat(50, 1)
    assert parting(unsure, unsure.roll(1, -1), TASK).facts == {"agreement_with_original": 0.0}
