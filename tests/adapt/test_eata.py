"""EATA: what it selects, what holds it, and that without both it is Tent."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ttmpd.adapt.eata import EATA
from ttmpd.adapt.norm import Norm
from ttmpd.adapt.tent import Tent
from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import clone
from ttmpd.models.norms import norm_parameters
from ttmpd.testing.tiny_models import tiny_model, tiny_samples
from ttmpd.training.test_time import Adaptation, ReliableSampleFilter, fisher_penalty, n_classes, redundancy_for

INF = float("inf")


def probabilities(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows)


def furthest(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(norm_parameters(first), norm_parameters(second), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# --- selection


def test_unsure_answers_are_left_out():
    given = probabilities((0.9, 0.1), (0.5, 0.5), (0.2, 0.8))  # 0.325, 0.693 and 0.500 nats
    assert ReliableSampleFilter(0.4).choose(given).tolist() == [0]
    assert ReliableSampleFilter(0.6).choose(given).tolist() == [0, 2]
    assert ReliableSampleFilter(0.1).choose(given).tolist() == []


def test_the_moving_average_is_that_of_the_selected():
    selection = ReliableSampleFilter(0.6, 2.0)
    selection.choose(probabilities((0.9, 0.1), (0.5, 0.5), (0.8, 0.2)))
    assert torch.allclose(selection.mean, torch.tensor([0.85, 0.15]))
    selection.choose(probabilities((0.5, 0.5)))  # nothing selected: unchanged
    assert torch.allclose(selection.mean, torch.tensor([0.85, 0.15]))
    selection.choose(probabilities((0.1, 0.9)))
    assert torch.allclose(selection.mean, torch.tensor([0.9 * 0.85 + 0.01, 0.9 * 0.15 + 0.09]))


def test_answers_like_the_average_are_left_out_once_there_is_one():
    selection = ReliableSampleFilter(INF, 0.5)
    assert selection.choose(probabilities((1.0, 0.0), (1.0, 0.0))).tolist() == [0, 1]
    given = probabilities((1.0, 0.0), (0.6, 0.4), (0.0, 1.0), (0.2, 0.8))  # cosines 1, 0.83, 0, 0.24
    assert selection.choose(given).tolist() == [2, 3]
    selection.reset()
    assert selection.choose(given).tolist() == [0, 1, 2, 3]


def test_redundancy_follows_the_number_of_classes():
    known = {10: 0.4, 100: 0.1, 1000: 0.05}
    assert all(redundancy_for(n) == pytest.approx(value) for n, value in known.items())
    values = [redundancy_for(n) for n in (1, 2, 3, 10, 30, 100, 300, 1000, 20000)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    # A sure answer is never redundant against an even mean.
    assert all(redundancy_for(n) > 0.99 / math.sqrt(n) for n in (2, 3, 10, 100, 300, 1000, 20000))
    assert redundancy_for(1) == 1.0


def test_the_classes_are_counted():
    assert n_classes(tiny_model(), tiny_samples(3)) == 4


# --- Fisher information


def test_importance_is_the_squared_gradient_of_the_batch_divided_by_its_mean():
    model, samples = tiny_model(), tiny_samples(8)
    copy = clone(model)
    expected = [torch.zeros_like(p) for p in norm_parameters(copy)]
    for batch in samples.batches(4):
        copy.zero_grad()
        logits = copy(batch)
        F.cross_entropy(logits, logits.argmax(-1)).backward()
        for total, parameter in zip(expected, norm_parameters(copy), strict=True):
            total += parameter.grad.square() / 2
    mean = torch.cat([e.flatten() for e in expected]).mean()
    found = fisher_penalty(model, samples, 4)
    assert torch.cat([i.flatten() for i in found.importance]).mean() == pytest.approx(1.0, rel=1e-5)
    assert all(torch.allclose(i, e / mean, rtol=1e-3) for i, e in zip(found.importance, expected, strict=True))


def test_the_penalty_grows_with_the_squared_distance():
    model = tiny_model()
    held = fisher_penalty(model, tiny_samples(8), 4)
    assert held.value().item() == 0.0
    number = sum(p.numel() for p in held.parameters)
    with torch.no_grad():
        for parameter in held.parameters:
            parameter += 0.5
    assert held.value().item() == pytest.approx(0.25 * number, rel=1e-4)


# --- the adapter


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_without_selection_weights_and_anchor_it_is_tent(unguarded, optimizer):
    common = {"lr": 1e-3, "batch_size": 10, "epochs": 3, "optimizer": optimizer}
    eata = EATA(e0=INF, redundancy=INF, weighted=False, beta=0.0, **common)
    first, second = (m.adapt(tiny_model(), tiny_samples(40)) for m in (eata, Tent(**common)))
    assert furthest(first.model, tiny_model()) > 1e-4
    assert furthest(first.model, second.model) < 1e-6
    assert first.facts["selected_share"] == 1.0


def test_a_heavy_anchor_holds(unguarded):
    model, samples = tiny_model(), tiny_samples(40)
    loose, tight = (
        EATA(lr=1e-3, batch_size=10, beta=beta, e0=1.0, redundancy=INF).adapt(model, samples).model
        for beta in (0.0, 1e9)
    )
    assert furthest(loose, model) > 5e-3
    assert furthest(tight, model) < 2e-3  # Adam's first step, which comes before there is a distance


def test_only_selected_samples_are_passed_backwards(unguarded):
    samples = tiny_samples(40)
    common = {"beta": 0.0, "redundancy": INF, "batch_size": 10, "epochs": 2}
    facts = EATA(e0=0.0, **common).adapt(tiny_model(), samples).facts
    assert facts["backward_per_sample"] == 0.0 and facts["selected_share"] == 0.0
    assert facts["forward_per_sample"] == 1 + 2  # the guard looks at the start and after every pass
    facts = EATA(e0=0.5, **common).adapt(tiny_model(), samples).facts
    assert 0.0 < facts["selected_share"] < 1.0
    assert facts["backward_per_sample"] == pytest.approx(2 * facts["selected_share"])
    assert facts["forward_per_sample"] == pytest.approx(2 * facts["selected_share"] + 1 + 2)


def test_the_fisher_information_is_counted(unguarded):
    samples, common = tiny_samples(40), {"e0": 0.5, "redundancy": INF, "batch_size": 10, "epochs": 2}
    without, with_fisher = (EATA(beta=beta, **common).adapt(tiny_model(), samples).facts for beta in (0.0, 1e-9))
    assert with_fisher["backward_per_sample"] == pytest.approx(without["backward_per_sample"] + 1)


def test_a_single_selected_sample_has_no_statistics_of_its_own():
    model, batch = tiny_model(), tiny_samples(6).batch(slice(None))
    for batch_statistics, steps in ((False, 1), (True, 0)):
        selection = ReliableSampleFilter()
        selection.choose = lambda probabilities: torch.tensor([2])
        service = Adaptation(
            model, lambda before, again, step: again().sum(), selection=selection, batch_statistics=batch_statistics
        )
        service.step(batch)
        assert service.steps == steps and service.n_selected == 1


def test_with_nothing_selected_it_is_norm():
    samples = tiny_samples(40)
    adapted = EATA(e0=0.0, beta=0.0).adapt(tiny_model(), samples).model
    mixed = Norm(weights=(0.5,)).adapt(tiny_model(), samples).model
    assert all(torch.equal(v, mixed.state_dict()[k]) for k, v in adapted.state_dict().items())


@pytest.mark.parametrize("settings", [{"e0": -1.0}, {"redundancy": -1.0}, {"beta": -1.0}, {"epochs": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InvalidValueError, match=rf"eata\.{next(iter(settings))}"):
        EATA(**settings)
