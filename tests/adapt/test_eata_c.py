"""EATA-C: joint answers, signed entropy, parts of the network."""

import math
import statistics

import pytest
import torch
from torch import nn

from ttmpd.adapt._learner import answers_by_batch
from ttmpd.adapt.eata_c import EATAC, HOTTEST, _temperature, drawn
from ttmpd.adapt.norm import Norm
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.quality.calibration import fit_temperature
from ttmpd.surgery.masks import skipped
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples, tiny_units
from ttmpd.training.losses import fused, signed_entropy

LN2 = math.log(2)


def logits(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def loss_of(method: EATAC, whole: torch.Tensor, part: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    return method._loss(whole, part, margin)


# --- by hand, on two classes


def test_the_joint_answer_by_hand():
    full, sub = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.2, 0.8]])
    assert torch.allclose(fused(full, sub, 0.5), torch.tensor([[0.6, 0.4]]))  # (0.8 + 0.1) / 1.5
    assert torch.allclose(fused(full, sub, 0.0), torch.tensor([[0.5, 0.5]]))
    assert torch.allclose(fused(full, sub, 1.0), full)


def test_entropy_is_negative_where_the_answers_differ():
    found = signed_entropy(logits((0.8, 0.2), (0.8, 0.2)), logits((0.75, 0.25), (0.25, 0.75)))
    quarter = 2 * LN2 - 0.75 * math.log(3)
    assert torch.allclose(found, torch.tensor([quarter, -quarter]))


def test_the_loss_by_hand():
    whole, part = logits((0.8, 0.2)), logits((0.2, 0.8))
    apart = 0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8)
    unsure = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert float(loss_of(EATAC(alpha=0.0), whole, part)) == pytest.approx(apart, rel=1e-5)
    assert float(loss_of(EATAC(alpha=0.5), whole, part)) == pytest.approx(apart - 0.5 * unsure, rel=1e-5)
    weighted = EATAC(alpha=0.0, weighted=True)
    assert float(loss_of(weighted, whole, part, 0.9)) == pytest.approx(apart * math.exp(0.9 - unsure), rel=1e-5)


def test_where_whole_and_part_agree_fully_only_entropy_is_left():
    same = logits((0.9, 0.1))
    assert float(loss_of(EATAC(alpha=0.0), same, same)) == pytest.approx(0.0, abs=1e-6)


def test_gradients_go_through_the_joint_answer_only_on_request():
    found = []
    for detach in (True, False):
        part = logits((0.2, 0.8)).requires_grad_()
        loss_of(EATAC(alpha=0.0, detach_fused=detach), logits((0.8, 0.2)), part).backward()
        found.append(part.grad)
    # With a fixed target the gradient is part - joint.
    assert torch.allclose(found[0], torch.tensor([[0.2 - 0.6, 0.8 - 0.4]]), atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


# --- parts of the network


def test_parts_are_drawn_by_seed_and_step():
    units = tiny_units(tiny_model(n_blocks=6))
    draws = [drawn(units, 0.5, 0, step) for step in range(40)]
    assert draws == [drawn(units, 0.5, 0, step) for step in range(40)]
    assert draws != [drawn(units, 0.5, 1, step) for step in range(40)]
    assert 0.35 < sum(map(len, draws)) / (40 * len(units)) < 0.65
    assert drawn(units, 0.0, 0, 0) == () and drawn(units, 1.0, 0, 0) == units


def test_it_learns_and_leaves_no_mask(unguarded):
    model, samples = tiny_model(), tiny_samples(40)
    with assert_untouched(model, samples):
        adapted = EATAC(e0=0.9, redundancy=9.0, batch_size=10, skip=0.5).adapt(model, samples)
    mixed = Norm(weights=(0.5,)).adapt(model, samples).model
    changed = {k for k, v in adapted.model.state_dict().items() if not torch.equal(v, mixed.state_dict()[k])}
    assert changed and not any("conv" in name or "head" in name for name in changed)
    assert not any("forward" in module.__dict__ for module in adapted.model.modules())


def test_backward_passes_are_those_of_the_selected(unguarded):
    facts = EATAC(e0=0.9, beta=0.0, batch_size=10, epochs=2, parts=2).adapt(tiny_model(), tiny_samples(40)).facts
    assert 0.0 < facts["selected_share"] < 1.0
    assert facts["backward_per_sample"] == pytest.approx(2 * facts["selected_share"])
    assert facts["forward_per_sample"] == pytest.approx(
        2 * 2 * facts["selected_share"] + 1 + 2 + 3
    )  # whole and part; at the end the whole and two parts


def settings_without_steps(**more: object) -> EATAC:
    return EATAC(e0=0.0, beta=0.0, batch_size=10, **more)  # nothing is sure enough to learn from


def sure_model(factor: float) -> nn.Module:
    """A model whose logits are so many times what they would be."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(factor)
    return model


def test_a_network_surer_than_its_parts_agree_is_cooled():
    model, samples = sure_model(50.0), tiny_samples(40)
    with assert_untouched(model, samples):
        cooled = settings_without_steps().adapt(model, samples)
    plain = settings_without_steps(parts=0).adapt(model, samples)
    temperature = cooled.facts["temperature"]
    assert temperature > 1.0 and f"divided by {temperature:.2f}" in cooled.note and "temperature" not in plain.facts
    batch = samples.batch(slice(None))
    assert torch.allclose(cooled.model(batch) * temperature, plain.model(batch), rtol=1e-3, atol=1e-3)


def test_the_temperature_is_the_median_over_parts_by_hand():
    model, samples, units = sure_model(5.0), tiny_samples(40), tiny_units(sure_model(5.0))
    batch, found = samples.batch(slice(None)), []
    with torch.no_grad():
        for unit in units:
            with skipped(model, (unit,)):
                answers = answers_by_batch(model, samples, 64).argmax(-1)
            found.append(fit_temperature(model(batch), answers))
    assert 1.0 < statistics.median(found) < HOTTEST
    assert _temperature(model, samples, units, 64) == pytest.approx(statistics.median(found), rel=1e-4)


def test_no_network_is_made_surer_and_none_is_cooled_without_end():
    unsure = settings_without_steps().adapt(sure_model(1e-3), tiny_samples(40))
    assert unsure.facts["temperature"] == 1.0 and "divided" not in unsure.note
    assert settings_without_steps().adapt(sure_model(1e4), tiny_samples(40)).facts["temperature"] == HOTTEST


def test_logits_that_no_layer_gives_alone_are_left():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sure_model(50.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    adapted = settings_without_steps().adapt(Doubled().eval(), tiny_samples(40))
    assert adapted.facts["temperature"] == 1.0 and "divided" not in adapted.note


def test_a_model_without_blocks_is_handed_on():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    adapted = EATAC().adapt(model, tiny_samples())
    assert adapted.model is model and "no blocks" in adapted.note


def test_one_sample_hands_the_teacher_on():
    model = tiny_model()
    adapted = EATAC().adapt(model, Samples(torch.zeros(1, 3, 8, 8), ("0",)))
    assert adapted.model is model and "one sample" in adapted.note


@pytest.mark.parametrize(
    "settings", [{"skip": 1.5}, {"parts": -1}, {"share": -0.1}, {"alpha": -1.0}, {"beta": -1.0}, {"batch_size": 1}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InvalidValueError, match=rf"eata_c\.{next(iter(settings))}"):
        EATAC(**settings)
