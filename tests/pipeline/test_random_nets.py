"""For every network drawn at random: the artifact in a fresh one is the result, or one error of ours; nothing else."""

import pytest
import torch

import ttmpd
from ttmpd.testing.random_nets import check_random_net

pytestmark = pytest.mark.usefixtures("quick_timing")
N = 40


@pytest.mark.parametrize("seed", range(N))
def test_a_random_network_is_compressed_exactly_or_refused(seed, tmp_path):
    check_random_net(seed, tmp_path / "out", ttmpd.compress, ttmpd.load)


def test_most_of_them_are_compressed(tmp_path):
    outcomes = [check_random_net(seed, tmp_path / str(seed), ttmpd.compress, ttmpd.load) for seed in range(4)]
    assert sum(outcome == "compressed" for outcome in outcomes) >= 2, outcomes


def test_a_difference_is_seen(tmp_path, monkeypatch):
    honest = ttmpd.load

    def broken(*arguments, **settings):
        model = honest(*arguments, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        return model

    monkeypatch.setattr(ttmpd, "load", broken)
    answers = []
    for seed in range(4):
        try:
            answers.append(check_random_net(seed, tmp_path / str(seed), ttmpd.compress, ttmpd.load))
        except AssertionError as error:
            answers.append(str(error))
    assert "compressed" not in answers
    assert any("the artifact answers otherwise" in answer for answer in answers)
