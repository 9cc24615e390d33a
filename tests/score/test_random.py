from ttmpd.score.random import Random
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units


def test_seeds_draw_different_harms_between_0_and_1():
    model = tiny_model()
    units = tiny_units(model)
    drawn = [tuple(s.harm for s in Random().score(model, units, tiny_samples(), seed=seed)) for seed in range(30)]
    assert len(set(drawn)) == 30
    assert all(0 <= harm <= 1 for harms in drawn for harm in harms)
    assert min(min(harms) for harms in drawn) < 0.1
    assert max(max(harms) for harms in drawn) > 0.9
