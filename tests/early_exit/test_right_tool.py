"""What exits learn, what they are calibrated to, and what they never saw."""

import pytest
import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.early_exit._heads import Features, exit_targets, train_heads
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import InvalidValueError
from ttmpd.models.run import evaluating, predictions_of
from ttmpd.quality.calibration import calibration_error
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def linear(n: int, *, seed: int = 0, noise: float = 0.0, views: int = 1) -> tuple[Features, Tensor]:
    """Features of two blocks, of which only the first knows the classes; and the true map (4, 3)."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(4, 3, generator=generator)
    knows, random = torch.randn(2, views, n, 4, generator=generator)
    logits = 3 * (knows @ true) + noise * torch.randn(views, n, 3, generator=generator)
    return Features((torch.stack([knows, random], 2),), logits), true


def varied(n: int, seed: int = 1) -> Samples:
    """Images of different colors, to which the model of the tests gives different answers."""
    generator = torch.Generator().manual_seed(seed)
    colors, pixels = torch.randn(n, 3, 1, 1, generator=generator), torch.randn(n, 3, 8, 8, generator=generator)
    return Samples(2 * colors + pixels, tuple(f"{seed}-{i}" for i in range(n)))


def even() -> nn.Module:
    """The model of the tests, made to give every answer about as often."""
    net = tiny_model()
    net.head.bias.data -= predictions_of(net, varied(200), 200).mean(0)
    return net


def agreement(logits: Tensor, other: Tensor) -> float:
    return float((logits.argmax(-1) == other.argmax(-1)).float().mean())


# ---------------------------------------------------------------------------------------------------------------- heads


def test_a_head_learns_what_is_linear():
    features, _ = linear(300)
    read = features.read[0][:, :, :1]  # the block that knows
    head = train_heads(Features((read,), features.logits), features.logits.softmax(-1), (1e-3,), 60, 0)[0]
    answers = read[0].flatten(1) @ head.weight.T + head.bias
    assert agreement(answers, features.logits[0]) > 0.98
    assert torch.equal(head.mix, torch.ones(1))


def test_mixing_finds_the_block_that_knows_and_keeps_unit_length():
    features, _ = linear(300)
    head = train_heads(features, features.logits.softmax(-1), (1e-3,), 200, 0)[0]
    assert float(head.mix.norm()) == pytest.approx(1, abs=1e-5)
    assert abs(float(head.mix[0])) > 0.97  # it began at 0 and 1: the mix was trained
    answers = features.read[0][0].flatten(1) @ head.weight.T + head.bias
    assert agreement(answers, features.logits[0]) > 0.95
    # What is folded together is the mix, times the standardised features, times one matrix for all blocks.
    first, second = head.weight[:, :4], head.weight[:, 4:]
    scale = features.read[0][0].std(0, correction=0)
    assert torch.allclose(first * scale[0] / head.mix[0], second * scale[1] / head.mix[1], atol=1e-4)


def test_answers_out_of_fold_know_nothing_of_their_sample():
    generator = torch.Generator().manual_seed(0)
    read, labels = torch.randn(1, 60, 1, 80, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    features = Features((read,), torch.zeros(1, 60, 3))
    head = train_heads(features, exit_targets(features.logits, labels, 1.0), (1e-4,), 60, 0)[0]
    learned = read[0].flatten(1) @ head.weight.T + head.bias
    assert float((learned.argmax(-1) == labels).float().mean()) == 1.0  # learned by heart
    assert float((head.out_of_fold.argmax(-1) == labels).float().mean()) < 0.55  # and of no use for others


def test_weight_decay_is_chosen_by_samples_that_were_held_back():
    knows, _ = linear(40)
    guesses = Features((torch.randn(1, 40, 1, 80, generator=torch.Generator().manual_seed(0)),), knows.logits)
    decays = (1.0, 1e-4)
    chosen = [
        train_heads(Features((f.read[0][:, :, :1],), f.logits), f.logits.softmax(-1), decays, 60, 0)[0].decay
        for f in (knows, guesses)
    ]
    assert chosen == [1e-4, 1.0]


def test_labels_are_mixed_in_by_their_share():
    logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    assert exit_targets(logits, None, 0.5).tolist() == [[0.5, 0.5]]
    assert exit_targets(logits, labels, 0.5).tolist() == [[0.25, 0.75]]
    assert exit_targets(logits, labels, 1.0).tolist() == [[0.0, 1.0]]


# --------------------------------------------------------------------------------------------------------------- method


@pytest.fixture(scope="module")
def found():
    return RightTool(views=2).equip(even(), varied(200))


def test_exits_learn_the_answers_of_the_model(found):
    fresh = varied(300, seed=9)
    with evaluating(found.model):
        read, logits = found.model.features(fresh.batch(slice(None)))
        answers = found.model.exit_logits(read)
    usual = float(logits.argmax(-1).bincount().max()) / len(logits)
    assert usual < 0.8
    assert all(agreement(one, logits) > usual + 0.1 for one in answers)
    assert torch.allclose(logits, predictions_of(even(), fresh, 300), atol=1e-6)


def test_calibration_makes_the_error_smaller_on_new_samples(found):
    fresh = varied(600, seed=9)
    with evaluating(found.model):
        read, logits = found.model.features(fresh.batch(slice(None)))
        calibrated = found.model.exit_logits(read)
    for head, answers in zip(found.model.heads, calibrated, strict=True):
        assert float(head.temperature) != 1.0
        before = calibration_error(answers * head.temperature, logits.argmax(-1))
        assert calibration_error(answers, logits.argmax(-1)) < before
    assert all(row["calibration_error"] < row["calibration_error_before"] for row in found.facts)


def test_without_calibration_temperatures_are_one_and_answers_the_same(found):
    plain = RightTool(views=2, calibrate=False).equip(even(), varied(200))
    assert [float(head.temperature) for head in plain.model.heads] == [1.0, 1.0]
    assert torch.equal(plain.exit_logits.argmax(-1), found.exit_logits.argmax(-1))
    assert not torch.allclose(plain.exit_logits, found.exit_logits)


def test_labels_are_learned_and_calibrated_to():
    samples, model = varied(80), even()
    own = predictions_of(model, samples, 80).argmax(-1)
    other = (own + 1) % 4
    taught = RightTool(views=1, label_weight=1.0).equip(model, samples, labels=other)
    assert torch.equal(taught.classes, other)
    assert float((taught.exit_logits[0].argmax(-1) == other).float().mean()) > 0.5
    assert taught.facts[0]["agreement"] < 0.3
    assert "labels" in taught.note


def test_views_are_learned_from():
    one, three = (RightTool(views=n).equip(tiny_model(), tiny_samples(20)).model for n in (1, 3))
    assert not torch.allclose(one.heads[0].weight, three.heads[0].weight)


def test_exits_stand_where_they_are_asked_to():
    method = RightTool(steps=3).with_settings(at="3,1", views=1)
    assert method.at == (3, 1)
    assert [p.path for p in method.equip(tiny_model(), tiny_samples(8)).model.spec.exits] == ["blocks.0", "blocks.2"]
    with pytest.raises(InvalidValueError, match="from 1 to 3"):
        RightTool(at=(4,)).equip(tiny_model(), tiny_samples(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at": ("x",)}, "right_tool.at"), ({"at": (0,)}, "right_tool.at"), ({"n_exits": 0}, "right_tool.n_exits"),
        ({"decays": ()}, "right_tool.decays"), ({"decays": (-1.0,)}, "right_tool.decays"),
        ({"label_weight": 1.5}, "right_tool.label_weight"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InvalidValueError, match=message):
        RightTool(**settings)


@pytest.mark.parametrize("labels", [torch.zeros(3).long(), torch.full((8,), 4), torch.full((8,), -1)])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(InvalidValueError, match="labels must be"):
        RightTool(steps=1).equip(tiny_model(), tiny_samples(8), labels=labels)
