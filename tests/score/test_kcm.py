"""KCM: the multiplicative update, the two factors, and that nothing but forward passes and weights is used."""

import itertools

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.score.base import ScoringInputs
from ttmpd.score.kcm import KCM, activity, representative, scaled
from ttmpd.surgery.find import find_units
from ttmpd.testing.tiny_models import tiny_token_samples, tiny_tokens, tiny_transformer


def clustered() -> torch.Tensor:
    """40 + 15 points in two tight clusters and 5 that stand alone."""
    draw = torch.Generator().manual_seed(0)
    first = 0.05 * torch.randn(40, 3, generator=draw)
    second = 4 + 0.05 * torch.randn(15, 3, generator=draw)
    alone = torch.tensor([[10.0 * (i + 1), -9.0, 3.0] for i in range(5)])
    return torch.cat([first, second, alone])


def test_points_count_by_the_number_of_their_duplicates():
    found = representative(clustered(), sigma=1.0, alpha=0.01, max_iterations=200)
    first, second, alone = found[:40].mean(), found[40:55].mean(), found[55:].mean()
    assert float(first) == pytest.approx(1 / 40, rel=0.3)
    assert float(second) == pytest.approx(1 / 15, rel=0.3)
    assert float(alone) == pytest.approx(1.0, abs=0.05)


def test_a_copy_of_every_neuron_halves_what_each_is_needed_for():
    points = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    alone = representative(points, 1.0, 0.01, 200)
    both = representative(torch.cat([points, points]), 1.0, 0.01, 200)
    assert torch.allclose(both[:20], both[20:], atol=1e-6)
    assert torch.allclose(both[:20], alone / 2, rtol=0.05)


@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e6, 0.0])
def test_no_kernel_ends_in_values_that_are_no_numbers(sigma):
    found = representative(1e3 * clustered(), sigma=sigma, alpha=1e-12, max_iterations=50)
    assert bool(torch.isfinite(found).all())
    assert float(found.min()) >= 0


def test_a_single_point_and_equal_points_are_no_trouble():
    for points in (torch.ones(1, 3), torch.ones(4, 3)):
        assert bool(torch.isfinite(representative(points, 0.0, 0.01, 10)).all())
    assert torch.equal(scaled(torch.ones(4)), torch.ones(4))
    assert torch.equal(scaled(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([0.0, 0.5, 1.0]))


def job(samples: Samples, kinds=("neuron",)) -> ScoringInputs:
    model = tiny_transformer()
    return ScoringInputs(model, find_units(model, tiny_tokens(), kinds).units, samples, ("narrow",), 4, 0)


def test_activity_is_the_norm_over_tokens_averaged_over_batches():
    samples = tiny_token_samples(8)
    asked = job(samples)
    unit = asked.units[0]
    seen = []
    layer = asked.teacher.get_submodule(unit.path)
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in samples.batches(4):
            asked.teacher(batch)
    handle.remove()
    wanted = torch.stack([h.flatten(0, 1).square().sum(0).sqrt() for h in seen]).mean(0)
    assert torch.allclose(activity(asked)[unit.id], wanted, rtol=1e-5)


def test_gradients_are_neither_needed_nor_looked_at():
    asked = job(tiny_token_samples(8), ("head", "neuron"))
    plain = list(KCM().scores(asked))
    with torch.no_grad():
        assert list(KCM().scores(asked)) == plain
    for parameter in asked.teacher.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert list(KCM().scores(asked)) == plain


def test_padding_says_nothing():
    class Net(nn.Module):
        """Tokens that see nothing but themselves."""

        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 32), nn.Linear(32, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids):
            x = self.embed(ids)
            return self.head((x + self.down(self.up(x).relu()))[:, 0])

    torch.manual_seed(0)
    net = Net().eval()
    short = torch.tensor([[1, 2, 3], [4, 5, 6]])
    long = torch.cat([short, torch.zeros(2, 5, dtype=torch.int64)], 1)
    found = []
    for ids in (short, long):
        samples = Samples(ids, ("a", "b"), padding=0)
        units = find_units(net, ids, ["neuron"]).units
        found.append(list(KCM().scores(ScoringInputs(net, units, samples, ("narrow",), 2, 0))))
    assert [score.kept for score in found[0]] == [score.kept for score in found[1]]
    assert [score.harm for score in found[0]] == pytest.approx([score.harm for score in found[1]], rel=1e-5)


def test_the_factors_alone_and_together_differ():
    asked = job(tiny_token_samples(8))
    harms = {parts: [score.harm for score in KCM(parts=parts).scores(asked)] for parts in ("r2d2", "r2", "d2")}
    assert len({tuple(values) for values in harms.values()}) == 3
    with pytest.raises(InvalidValueError, match="r2d2, r2 or d2"):
        KCM(parts="r3")


def test_narrower_hurts_more_and_keeps_a_part_of_what_wider_keeps():
    scores = [s for s in KCM().scores(job(tiny_token_samples(8))) if s.unit_id == "neuron:blocks.0.down"]
    for wide, narrow in itertools.pairwise(scores):
        assert narrow.harm >= wide.harm
        assert set(narrow.kept) < set(wide.kept)
