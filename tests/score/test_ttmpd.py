"""The two variables: against cases that can be worked out, and with the shortcuts of the computation switched off."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.models.taps import Tap, read_taps
from ttmpd.records import ACTIONS, Removal
from ttmpd.repair.positions import squared_gradients
from ttmpd.score.base import ScoringInputs
from ttmpd.score.ttmpd import TTMPD, fit_replacements
from ttmpd.surgery.cut import cut
from ttmpd.surgery.units.block import Block
from ttmpd.surgery.units.channel import Channel
from ttmpd.surgery.units.neuron import Neuron
from ttmpd.testing.tiny_models import example_of_kind, tiny_model, tiny_samples, tiny_units


class Res(nn.Module):
    def __init__(self, width: int = 6, linear: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.Identity() if linear else nn.Tanh()

    def forward(self, x):
        return x + 2 * self.b(self.act(self.a(x)))


class Tokens(nn.Module):
    """Only token 0 reaches the output; the blocks treat every token alone."""

    def __init__(self, ids: bool = False) -> None:
        super().__init__()
        self.stem = nn.Embedding(9, 6) if ids else nn.Linear(5, 6)
        self.blocks, self.head, self.ids = nn.Sequential(Res(), Res()), nn.Linear(6, 3), ids

    def forward(self, x):
        return self.head(self.blocks(self.stem(x.long() if self.ids else x))[:, 0])


def samples_of(inputs: torch.Tensor) -> Samples:
    return Samples(inputs, tuple(map(str, range(len(inputs)))))


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    model, samples = Tokens().eval(), samples_of(torch.randn(30, 4, 5))
    return model, samples, Block().find(model, samples.batch(slice(0, 2))).units


def by_key(scores):
    return {(score.unit_id, score.action): score for score in scores}


def test_a_linear_unit_is_repaired_and_its_loss_without_repair_is_damage():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Sequential(Res(linear=True), Res()), nn.Linear(6, 3)).eval()
    samples = samples_of(torch.randn(60, 5))
    units = Block().find(model, samples.batch(slice(0, 2))).units
    scores = by_key(TTMPD(ridge=0.0).score(model, units, samples))
    linear, curved = units[0].id, units[1].id
    assert abs(scores[linear, "linear"].harm) < 1e-5
    assert scores[linear, "drop"].parts["damage"] > 0.1
    assert scores[curved, "linear"].harm > 1e-3


def test_harm_is_made_of_the_two_variables():
    model, samples = tiny_model(), tiny_samples(30)
    scores = by_key(TTMPD(drop_share=0.25).score(model, tiny_units(model), samples))
    for (unit, _), score in scores.items():
        damage, repaired = score.parts["damage"], score.parts["repaired_damage"]
        assert scores[unit, "linear"].harm == pytest.approx(repaired)
        assert scores[unit, "drop"].harm == pytest.approx(repaired + 0.25 * max(0.0, damage - repaired))


def test_a_layer_whose_own_outputs_were_narrowed_is_scored_as_it_is_now():
    """On the way through a plan: the reader of this layer was narrowed before, and it answers with fewer channels."""
    torch.manual_seed(0)
    chain = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in ((3, 16), (16, 24), (24, 4))]
    model = nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    samples = tiny_samples(8)
    first, second = Channel().find(model, samples.batch(slice(0, 2))).units
    assert second.producers == (first.path,)
    student = cut(model, [Removal(second, "narrow", tuple(range(8, 16)))])
    fresh = Channel().find(student, samples.batch(slice(0, 2))).units[0]
    assert (fresh.path, fresh.shape[0], first.shape[0]) == (first.path, 8, 24)
    found, wanted = (TTMPD().score(student, [unit], samples, actions=("narrow",)) for unit in (first, fresh))
    assert [(s.kept, s.harm) for s in found] == [(s.kept, s.harm) for s in wanted]


def convolutions_of_neurons(norm=nn.BatchNorm2d):
    """Two 1x1 convolutions with a GELU between: a layer of neurons at every place."""
    torch.manual_seed(0)
    pair = [nn.Conv2d(6, 24, 1), nn.GELU(), nn.Conv2d(24, 6, 1)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), *pair, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return model.eval(), tiny_samples(12)


@pytest.mark.parametrize(
    ("kind", "given", "times"),
    [
        (Channel(), lambda: example_of_kind("channel"), 3),
        (Neuron(), convolutions_of_neurons, 3),
        (Neuron(), lambda: convolutions_of_neurons(nn.Identity), 1),
        (Neuron(), lambda: example_of_kind("neuron"), 1),
    ],
    ids=["channels", "neurons of convolutions", "the same without batch norm", "neurons"],
)
def test_narrowed_convolutions_of_networks_that_train_well_count_more_than_they_lose(kind, given, times):
    model, samples = given()
    units = kind.find(model, samples.batch(slice(0, 2))).units
    found = [TTMPD(channels=factor).score(model, units, samples, actions=("narrow",)) for factor in (1.0, 3.0)]
    assert [score.harm for score in found[1]] == pytest.approx([times * score.harm for score in found[0]])
    assert max(score.harm for score in found[0]) > 0


def test_a_stand_in_is_closer_to_its_unit_than_its_input_is():
    model, samples = tiny_model(), tiny_samples(40)
    units = tiny_units(model)
    fits = fit_replacements(ScoringInputs(model, units, samples, ACTIONS, 16, 0), samples, 1e-3, 0.0)
    for unit in units:
        taps = {side: Tap(unit.path, side) for side in ("input", "output")}
        with torch.no_grad():
            seen = read_taps(model, samples.batch(slice(None)), taps)
        x, y = seen["input"], seen["output"]
        assert float((fits[unit.id](unit, x) - y).square().mean().detach()) < float((x - y).square().mean())


def test_the_share_of_samples_in_a_batch_does_not_matter():
    model, samples = tiny_model(), tiny_samples(11)
    units = tiny_units(model)
    first, second = (TTMPD(sensitivity=0.0).score(model, units, samples, batch_size=n) for n in (3, 11))
    for a, b in zip(first, second, strict=True):
        assert a.harm == pytest.approx(b.harm, rel=1e-3, abs=1e-6)


def test_weighting_improves_the_fit_where_it_counts(tokens):
    """The tokens follow different maps, and only token 0 is read: the fit shall serve token 0."""
    model, samples, units = tokens
    shifted = samples_of(samples.inputs + torch.tensor([0.0, 4.0, -4.0, 8.0])[None, :, None])
    gaps = {}
    for sensitivity in (0.0, 1.0):
        fit = fit_replacements(ScoringInputs(model, units, shifted, ACTIONS, 10, 0), shifted, 0.0, sensitivity)[
            units[1].id
        ]
        with torch.no_grad():
            x = model.blocks[0](model.stem(shifted.inputs))[:, 0]
            gaps[sensitivity] = float((fit(units[1], x) - model.blocks[1](x)).square().mean())
    assert gaps[1.0] < 0.5 * gaps[0.0]


def test_inputs_that_are_no_numbers_to_differentiate_by():
    torch.manual_seed(0)
    model = Tokens(ids=True).eval()
    samples = samples_of(torch.randint(0, 9, (12, 4)).float())
    units = Block().find(model, samples.batch(slice(0, 2))).units
    pattern = squared_gradients(model, units, samples.first(4))
    assert pattern[units[0].id].tolist() == pytest.approx([4.0, 0.0, 0.0, 0.0])
    assert len(TTMPD().score(model, units, samples)) == 4


def test_only_as_many_samples_are_run_as_the_settings_say():
    model, seen = tiny_model(), []
    units = tiny_units(model)
    model.head.register_forward_hook(lambda _m, x, _o: seen.append(len(x[0])))
    TTMPD(max_samples=6, tail_samples=4).score(model, units, tiny_samples(50), batch_size=3)
    assert seen.count(6) == 1  # the one batch with gradients
    assert max(seen) == 6
    small, probes = sum(n for n in seen if n == 3), sum(n for n in seen if n <= 2)
    TTMPD(max_samples=6, tail_samples=4).score(model, units, tiny_samples(500), batch_size=3)
    assert sum(n for n in seen if n == 3) == 2 * small
    assert sum(n for n in seen if n <= 2) == 2 * probes


@pytest.mark.parametrize(
    "wrong", [{"ridge": -1.0}, {"max_samples": 0}, {"tail_samples": 0}, {"drop_share": 1.5}, {"sensitivity": 2.0}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        TTMPD(**wrong)
