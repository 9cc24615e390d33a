import pytest

from ttmpd.score.damage import Damage
from ttmpd.score.ttmpd import TTMPD
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units


def test_it_is_the_first_variable_of_ttmpd():
    model, samples = tiny_model(), tiny_samples(20)
    units = tiny_units(model)
    wanted = {s.unit_id: s.parts["damage"] for s in TTMPD(tail_samples=20).score(model, units, samples)}
    for score in Damage(max_samples=20).score(model, units, samples):
        assert score.harm == pytest.approx(wanted[score.unit_id])


def test_a_larger_branch_does_more_damage():
    model, samples = tiny_model(), tiny_samples()
    units = tiny_units(model)
    before = Damage().score(model, units, samples)[1].harm
    model.blocks[1].norm2.weight.data.mul_(4)
    model.blocks[1].norm2.bias.data.mul_(4)
    assert Damage().score(model, units, samples)[1].harm > before


def test_samples_beyond_the_limit_are_not_run():
    model = tiny_model()
    units = tiny_units(model)
    few = Damage(max_samples=6).score(model, units, tiny_samples(6))
    many = Damage(max_samples=6).score(model, units, tiny_samples(6).subset([*range(6), 0, 1, 2]))
    assert few == many
