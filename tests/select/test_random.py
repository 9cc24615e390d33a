from ttmpd.select.random import Random
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def test_every_sample_is_drawn_about_equally_often():
    net, pool = tiny_model(), tiny_samples(10)
    drawn = [place for seed in range(300) for place in Random().select(net, pool, 3, seed=seed)]
    counts = [drawn.count(place) for place in range(10)]
    assert sum(counts) == 900
    assert min(counts) > 60
    assert max(counts) < 120


def test_it_does_not_look(samples):
    assert Random.uses_teacher is False
    assert len(Random().select(None, samples, 4)) == 4
