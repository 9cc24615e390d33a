"""Tent, and what it shares with its successors: steps, reset, the guard, models without batch statistics."""

import pytest
import torch
from torch import nn

from ttmpd.adapt._learner import collapse
from ttmpd.adapt.norm import Norm
from ttmpd.adapt.tent import Tent
from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import clone
from ttmpd.models.norms import learning, norm_parameters, using_batch_statistics
from ttmpd.models.run import predictions_of
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples
from ttmpd.training.losses import entropy, entropy_of
from ttmpd.training.test_time import Adaptation, ReliableSampleFilter

HALF = Norm(weights=(0.5,))


def mean_entropy(before, again, step):
    return entropy(again()).mean()


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    state = other.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


class Normed(nn.Module):
    """A perceptron with a norm layer of choice between its matrices."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.flatten, self.stem, self.norm, self.head = nn.Flatten(1), nn.Linear(192, 8), norm, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.stem(self.flatten(x))).relu())


def normed(norm: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Normed(norm).eval()


# --- the adapter


def test_answers_become_surer_and_only_scale_and_shift_learn(unguarded):
    model, samples = tiny_model(), tiny_samples(40)
    mixed = HALF.adapt(model, samples).model
    adapted = Tent(batch_size=10).adapt(model, samples)
    before, after = (entropy(predictions_of(m, samples, 40)).mean() for m in (mixed, adapted.model))
    assert after < before - 1e-3
    names = changed(adapted.model, mixed)
    assert names and all(name.rpartition(".")[2] in ("weight", "bias") and "conv" not in name for name in names)
    assert names.isdisjoint({"stem.0.weight", "stem.0.bias", "head.weight", "head.bias"})
    assert "epochs: 5" in adapted.note and "statistics" in adapted.note


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.RMSNorm(8)])
def test_every_kind_of_norm_layer_learns(unguarded, norm):
    model, samples = normed(norm), tiny_samples(30)
    with assert_untouched(model, samples):
        adapted = Tent(batch_size=10).adapt(model, samples).model
    learned = {name for name in changed(adapted, model) if "running" not in name and "num_" not in name}
    assert learned == {name for name, _ in model.named_parameters() if name.startswith("norm.")}


def test_nothing_to_do_is_said():
    samples, plain = tiny_samples(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    without = normed(nn.LayerNorm(8, elementwise_affine=False))
    for model in (plain, without):
        adapted = Tent().adapt(model, samples)
        assert adapted.model is model and "nothing to do" in adapted.note and adapted.facts == {}
    for n in (0, 1):
        model = tiny_model()
        adapted = Tent().adapt(model, tiny_samples(n))
        assert adapted.model is model and "one sample" in adapted.note


def test_passes_are_counted(unguarded):
    facts = Tent(epochs=3, batch_size=10).adapt(tiny_model(), tiny_samples(30)).facts
    assert facts["backward_per_sample"] == 3.0
    assert facts["forward_per_sample"] == 3.0 + 1 + 3  # steps, a look at the start, one after each epoch
    assert facts["selected_share"] == 1.0
    assert (facts["epochs"], facts["rolled_back"]) == (3.0, 0.0)
    assert "weight" in facts


def test_the_facts_of_mixing_are_those_before_anything_was_learned(unguarded):
    model, samples = tiny_model(), tiny_samples(30)
    facts = Tent(batch_size=10).adapt(model, samples).facts
    before = HALF.adapt(model, samples).facts
    told = {"agreement_with_original", "parted_where_sure"}
    assert {name: facts[name] for name in before.keys() - told} == {name: before[name] for name in before.keys() - told}


def test_only_as_many_samples_as_the_limit(unguarded):
    samples = tiny_samples(30)
    limited, first, all_of_them = (
        Tent(max_samples=most).adapt(tiny_model(), given).model
        for most, given in ((10, samples), (30, samples.subset(range(10))), (30, samples))
    )
    assert not changed(limited, first)
    assert changed(limited, all_of_them)


def test_a_ruinous_rate_is_rolled_back_to_the_mixed_statistics():
    model, samples = tiny_model(), tiny_samples(40)
    adapted = Tent(lr=10.0, batch_size=10).adapt(model, samples)
    assert not changed(adapted.model, HALF.adapt(model, samples).model)
    assert adapted.facts["rolled_back"] == 1.0 and adapted.facts["epochs"] == 0.0
    assert "left alone; rolled back after epoch 1: answers" in adapted.note


def test_the_last_good_epoch_is_kept(monkeypatch):
    reasons = iter(["", "", "answers gathered in few classes"])
    monkeypatch.setattr("ttmpd.adapt._learner.collapse", lambda *_: next(reasons))
    model, samples = tiny_model(), tiny_samples(30)
    adapted = Tent(epochs=5, batch_size=10).adapt(model, samples)
    monkeypatch.setattr("ttmpd.adapt._learner.collapse", lambda *_: "")
    assert not changed(adapted.model, Tent(epochs=2, batch_size=10).adapt(model, samples).model)
    assert adapted.facts["epochs"] == 2.0 and "epochs: 2; rolled back after epoch 3" in adapted.note


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"optimizer": "adagrad"}, {"epochs": 0}, {"batch_size": 1}, {"max_samples": 1}],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InvalidValueError, match=rf"tent\.{next(iter(settings))}"):
        Tent(**settings)


# --- the guard


def test_where_norm_sees_no_shift_nothing_is_learned(monkeypatch):
    monkeypatch.setattr("ttmpd.adapt._learner.Norm", Norm)
    model, samples = tiny_model(), tiny_samples(40)
    assert Norm().adapt(model, samples).model is model
    adapted = Tent(lr=10.0).adapt(model, samples)
    assert adapted.model is model and "kept" in adapted.note
    assert (adapted.facts["epochs"], adapted.facts["backward_per_sample"]) == (0.0, 0.0)


def test_collapse_is_seen_in_the_answers_alone():
    varied = 5 * torch.eye(4).repeat(5, 1)
    assert collapse(varied, varied) == ""
    assert collapse(varied, 2 * varied) == ""  # surer, as varied
    assert "few classes" in collapse(varied, 5 * torch.eye(4)[:2].repeat(10, 1))
    assert "less" in collapse(varied, 0.1 * varied)
    assert "finite" in collapse(varied, varied * float("nan"))


# --- one step after another


def test_the_first_step_of_sgd_goes_down_the_gradient():
    model, batch = tiny_model(), tiny_samples(8).batch(slice(None))
    copy = clone(model)
    copy.zero_grad()
    entropy(copy(batch)).mean().backward()
    Adaptation(model, mean_entropy, lr=0.1, optimizer="sgd").step(batch)
    for new, old in zip(norm_parameters(model), norm_parameters(copy), strict=True):
        assert torch.allclose(new, old - 0.1 * old.grad, atol=1e-6)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_answers_are_those_from_before_the_step(batch_statistics):
    model, batch = tiny_model(), tiny_samples(8).batch(slice(None))
    with torch.no_grad():
        before = model.train(batch_statistics)(batch) if batch_statistics else model(batch)
    service = Adaptation(tiny_model(), mean_entropy, lr=0.01, batch_statistics=batch_statistics)
    first, second = service.step(batch), service.step(batch)
    assert torch.allclose(first, before, atol=1e-5) and not first.requires_grad
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_between_steps_the_model_is_as_it_came(batch_statistics):
    model, batch = tiny_model(), tiny_samples(8).batch(slice(None))
    service = Adaptation(model, mean_entropy, lr=0.0, batch_statistics=batch_statistics)
    with assert_untouched(model):
        service.step(batch)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_reset_restores_weights_optimizer_and_what_was_selected(optimizer):
    model, batch = tiny_model(), tiny_samples(12).batch(slice(None))
    service = Adaptation(model, mean_entropy, lr=0.05, optimizer=optimizer, selection=ReliableSampleFilter(10.0, 2.0))
    first = [service.step(batch) for _ in range(3)]
    assert service.selection.mean is not None and service.n_selected == 36 and changed(model, tiny_model())
    service.reset()
    assert service.selection.mean is None and not service.optimizer.state
    assert (service.steps, service.n_seen, service.n_selected, service.n_forward, service.n_backward) == (0,) * 5
    assert not changed(model, tiny_model())
    assert all(torch.equal(a, b) for a, b in zip(first, [service.step(batch) for _ in range(3)], strict=True))


def test_a_step_that_is_not_finite_is_left_out():
    model, batch = tiny_model(), tiny_samples(4).batch(slice(None))
    service = Adaptation(model, lambda before, again, step: again().sum() * float("nan"))
    service.step(batch)
    assert not changed(model, tiny_model()) and service.n_backward == 0


def test_a_lone_sample_is_answered_with_the_statistics_held():
    batch = tiny_samples(1).batch(slice(None))
    service = Adaptation(tiny_model(), mean_entropy, batch_statistics=True)
    assert torch.allclose(service.step(batch), tiny_model()(batch), atol=1e-6)
    assert service.steps == 0 and service.n_seen == 1
    assert Adaptation(tiny_model(), mean_entropy, batch_statistics=False).step(batch).shape == (1, 4)


def test_a_model_without_norm_layers_is_refused():
    with pytest.raises(InvalidValueError, match="normalisation layer"):
        Adaptation(nn.Sequential(nn.Linear(3, 3)), mean_entropy)
    with pytest.raises(InvalidValueError, match="optimizer"):
        Adaptation(tiny_model(), mean_entropy, optimizer="adagrad")


# --- normalisation layers


def test_batch_statistics_are_used_and_those_held_stay():
    model, batch = tiny_model().double(), 3 * tiny_samples(8).batch(slice(None)).double() + 1
    with assert_untouched(model), torch.no_grad(), learning(model), using_batch_statistics(model):
        answers = model(batch)
    trained = clone(model).train()
    assert torch.allclose(answers, trained(batch), atol=1e-8)
    assert not torch.allclose(answers, model.eval()(batch), atol=1e-2)


def test_shared_layers_are_counted_once():
    norm = nn.LayerNorm(3)
    assert len(norm_parameters(nn.Sequential(norm, nn.Linear(3, 3), norm))) == 2


def test_entropy_of_probabilities_takes_zeros():
    found = entropy_of(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert torch.allclose(found, torch.tensor([0.0, 0.693147]))
