"""Normalisation statistics: what they become, and which weight the data choose."""

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from ttmpd.adapt.norm import Norm, _Trials
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import clone
from ttmpd.quality.evidence import Answers
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def samples_of(inputs: torch.Tensor) -> Samples:
    return Samples(inputs, tuple(map(str, range(len(inputs)))))


class Normed(nn.Module):
    """Statistics of the input itself, so that the true ones are known."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, width, bias=False)
        self.head.weight.data = 3 * torch.eye(width)

    def forward(self, x):
        return self.head(self.norm(x))


def shifted(n: int = 400) -> torch.Tensor:
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([5.0, -3.0, 0.0])


@pytest.mark.parametrize("batch_size", [50, 64, 400])
def test_all_of_the_data_gives_the_statistics_of_the_data(batch_size):
    inputs = shifted()
    adapted = Norm(weights=(1.0,)).adapt(Normed().eval(), samples_of(inputs), batch_size=batch_size)
    assert torch.allclose(adapted.model.norm.running_mean, inputs.mean(0), atol=0.05)
    assert torch.allclose(adapted.model.norm.running_var, inputs.var(0), rtol=0.05)
    assert adapted.facts["weight"] == 1.0
    assert "100%" in adapted.note


def test_layers_behind_see_what_adapted_layers_before_give():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    adapted = Norm(weights=(1.0,)).adapt(model, samples_of(shifted()), batch_size=400).model
    assert torch.allclose(adapted[1].running_mean, torch.zeros(3), atol=1e-3)
    assert torch.allclose(adapted[1].running_var, torch.ones(3), atol=1e-2)


def test_none_of_the_data_is_the_source_to_the_bit():
    model, samples = tiny_model(), tiny_samples()
    adapted = Norm(weights=(0.0,)).adapt(model, samples, batch_size=5).model
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in adapted.state_dict().items())


def test_half_and_half_lies_in_between():
    inputs = shifted()
    model = Normed().eval()
    mixed = Norm(weights=(0.5,)).adapt(model, samples_of(inputs), batch_size=400).model
    assert torch.allclose(mixed.norm.running_mean, inputs.mean(0) / 2, atol=1e-3)
    assert torch.allclose(mixed.norm.running_var, (inputs.var(0) + 1) / 2, rtol=1e-2)


def test_the_weight_that_explains_most_is_chosen():
    # Source statistics put everything into class 0; the data's own spread it over three classes.
    model, inputs = Normed().eval(), torch.randn(300, 3, generator=torch.Generator().manual_seed(1))
    far = samples_of(inputs + torch.tensor([50.0, 0.0, 0.0]))
    adapted = Norm().adapt(model, far, batch_size=300)
    assert adapted.facts["weight"] == 1.0
    assert adapted.facts["explained"] > 0.5
    assert adapted.facts["explained_source"] < 0.01


def test_the_source_is_kept_where_nothing_is_clearly_better():
    model = Normed().eval()
    model.head.weight.data.zero_()  # all weights are alike: nothing is known
    adapted = Norm().adapt(model, samples_of(shifted()), batch_size=100)
    assert adapted.model is model and adapted.facts["weight"] == 0.0
    assert "statistics kept" in adapted.note


# --- classes and shifts: a small trained network that tells five classes apart


N_CLASSES, WIDTH = 5, 12


@functools.cache
def trained() -> nn.Module:
    """Four layers, the last of which hold what the classes are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (WIDTH, 24, 24, 24, 24)
        parts = [
            part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
        ]
        model = nn.Sequential(*parts, nn.Linear(widths[-1], N_CLASSES))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(200):
            x, y = drawn(128, range(N_CLASSES), seed=1000 + step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def drawn(n: int, classes: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around a center for each class, the classes in equal parts."""
    generator = torch.Generator().manual_seed(seed)
    centers = 1.6 * torch.randn(N_CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.tensor(classes)[torch.arange(n) % len(classes)]
    return centers[y] + torch.randn(n, WIDTH, generator=generator), y


def moved(x: torch.Tensor) -> torch.Tensor:
    """As another sensor would deliver it: offset and gain of each value differ."""
    generator = torch.Generator().manual_seed(5)
    return x * torch.empty(WIDTH).uniform_(0.5, 3.0, generator=generator) + 8 * torch.randn(WIDTH, generator=generator)


def accuracies(
    norm: Norm, classes: Sequence[int], shift: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, float]:
    """Of the model as it came and of the adapted one, on other samples of the same mixture."""
    adapted = norm.adapt(trained(), samples_of(shift(drawn(300, classes, 1)[0]))).model
    x, y = drawn(1000, classes, 2)
    first, second = (float((model(shift(x)).argmax(-1) == y).float().mean()) for model in (trained(), adapted))
    return first, second


@pytest.mark.parametrize("classes", [(1, 2), (0, 3), (1, 4), (2, 3, 4), range(N_CLASSES)])
def test_no_mixture_of_classes_harms_where_nothing_shifted(classes):
    before, after = accuracies(Norm(), classes, lambda x: x)
    assert after >= before - 0.005
    if len(classes) < 3:  # the statistics of few classes do ruin this model
        assert accuracies(Norm(weights=(1.0,)), classes, lambda x: x)[1] < before - 0.1


@pytest.mark.parametrize("label", range(N_CLASSES))
def test_a_user_is_warned_where_a_single_class_cannot_be_told_from_a_fault(label):
    # A model that is sure of one class for all samples may be right or broken: its answers do not tell which.
    adapted = Norm().adapt(trained(), samples_of(drawn(300, (label,), 1)[0]))
    assert adapted.model is trained() or "WARNING" in adapted.note


def test_a_shift_is_gained_back():
    before, after = accuracies(Norm(), range(N_CLASSES), moved)
    all_new = accuracies(Norm(weights=(1.0,)), range(N_CLASSES), moved)[1]
    assert after - before > 0.95 * (all_new - before) > 0.2


def test_a_shift_of_few_classes_does_no_harm_either():
    before, after = accuracies(Norm(), (0, 3), moved)
    assert after >= before


def test_late_layers_follow_only_where_answers_become_surer():
    few, many = (
        Norm().adapt(trained(), samples_of(moved(drawn(300, classes, 1)[0]))).facts
        for classes in ((0, 3), range(N_CLASSES))
    )
    assert few["weight_late"] == 0.0
    assert many["weight_late"] == many["weight"] > 0.0


def test_a_shift_is_plain_by_the_gentlest_move_alone(monkeypatch):
    # All candidates explain as much as the source; those that move far part from it beyond doubt, which proves nothing.
    asked = []
    monkeypatch.setattr(Answers, "gain", lambda *_: (-1e-6, 1.0))

    def parted(self, other, certainty):
        asked.append(self)
        return False

    monkeypatch.setattr(Answers, "parted_beyond_doubt", parted)
    samples = samples_of(moved(drawn(300, range(N_CLASSES), 1)[0]))
    assert Norm(weights=(1.0, 0.5, 0.25)).adapt(trained(), samples).model is trained()
    gentle = trials_of(samples).candidate(0.25, 0.0)
    assert len(asked) == 1 and torch.allclose(asked[0].outputs, gentle.answers.outputs, atol=1e-5)
    monkeypatch.setattr(Answers, "parted_beyond_doubt", lambda *_: True)
    assert Norm().adapt(trained(), samples).facts["weight"] > 0


def trials_of(samples: Samples) -> _Trials:
    return _Trials(clone(trained()), samples, 64, 2 / 3)


def test_of_very_many_predictions_every_so_many_th_is_compared(monkeypatch):
    samples = samples_of(moved(drawn(300, range(N_CLASSES), 1)[0]))
    everything = Norm().mixed(trained(), samples, 64)[1]
    monkeypatch.setattr("ttmpd.adapt.norm.MOST_ROWS", 100)
    adapted, compared = Norm().mixed(trained(), samples, 64)
    assert torch.equal(compared, everything[::3])
    assert adapted.facts["weight"] > 0


def test_passes_are_counted():
    model, samples, n_seen = clone(trained()), samples_of(drawn(60, (0, 1), 1)[0]), []
    model.register_forward_pre_hook(lambda _model, args: n_seen.append(len(args[0])))
    Norm().adapt(model, samples, batch_size=20)
    assert sum(n_seen) == 60 * (1 + 2 * 4 + 2)


def test_only_as_many_samples_as_the_limit():
    model, inputs = Normed().eval(), shifted()
    many = Norm(weights=(1.0,), max_samples=40).adapt(model, samples_of(inputs), batch_size=40).model
    assert torch.allclose(many.norm.running_mean, inputs[:40].mean(0), atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_momentum_and_counter_of_the_layers_come_back(momentum):
    model = Normed().eval()
    model.norm.momentum = momentum
    adapted = Norm(weights=(1.0,)).adapt(model, samples_of(shifted()), batch_size=100).model
    assert adapted.norm.momentum == momentum
    assert int(adapted.norm.num_batches_tracked) == 0
    assert not adapted.norm.training


@pytest.mark.parametrize(("n", "batch_size"), [(2, 1), (3, 2), (4, 3), (5, 2), (65, 64)])
def test_no_batch_of_one_is_left_over(n, batch_size):
    adapted = Norm(weights=(1.0,)).adapt(Normed().eval(), samples_of(shifted(n)), batch_size=batch_size).model
    assert bool(torch.isfinite(adapted.norm.running_var).all())
    assert not torch.equal(adapted.norm.running_mean, torch.zeros(3))


def test_one_sample_or_no_statistics_hand_the_teacher_on():
    model = Normed().eval()
    assert Norm().adapt(model, samples_of(shifted(1))).model is model
    plain = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert Norm().adapt(plain, samples_of(shifted())).model is plain
    untracked = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    assert Norm().adapt(untracked, samples_of(shifted())).model is untracked


def test_facts_are_plain_numbers():
    facts = Norm().adapt(Normed().eval(), samples_of(shifted())).facts
    told = {"agreement_with_original", "parted_where_sure"}
    assert facts.keys() - told == {"weight", "weight_late", "explained", "explained_source"}
    assert all(value == value for value in facts.values())


def test_weights_lie_between_0_and_1():
    with pytest.raises(InvalidValueError, match=r"norm\.weights"):
        Norm(weights=(0.0, 1.5))
    with pytest.raises(InvalidValueError, match=r"norm\.weights"):
        Norm(weights=())
