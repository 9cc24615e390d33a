"""Units that lie in one another, on the way to a plan and through a whole run."""

import pytest
import torch

import ttmpd
from ttmpd.distill.one_time import OneTime
from ttmpd.models.macs import count_macs
from ttmpd.pipeline.candidates import _left
from ttmpd.pipeline.compress import compress
from ttmpd.records import DepthUnit, Option
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.testing.tiny_models import tiny_token_samples, tiny_tokens, tiny_transformer

QUICK = {"distill": OneTime(steps=2, views=1), "batch_size": 8, "num_samples": 24, "device": "cpu", "adapt": "none"}


def test_units_that_hold_a_chosen_one_or_lie_in_it_are_not_scored_again():
    units = find_units(tiny_transformer(), tiny_tokens()).units
    holders = holders_of(units)

    def left(*chosen: str) -> set[str]:
        options = [Option(name, "drop", 1.0, 1.0, holders=holders[name]) for name in chosen]
        return {unit.id.replace(".0", "") for unit in _left(units, options) if ".0" in unit.id}

    assert left("blocks.0") == set()
    assert left("attention:blocks.0.attention") == {"mlp:blocks.down", "neuron:blocks.down"}
    assert left("head:blocks.0.attention.proj") == {"mlp:blocks.down", "neuron:blocks.down"}
    assert len(left("blocks.1")) == 5


@pytest.mark.usefixtures("quick_timing")
@pytest.mark.parametrize("score", ["ttmpd", "damage", "magnitude", "random"])
def test_attentions_and_mlps_go_and_the_artifact_comes_back(tmp_path, score):
    model, samples = tiny_transformer(), tiny_token_samples(32)
    result = compress(
        model, samples, macs=0.7, score=score, units=("attention", "mlp"), output=tmp_path / "out", **QUICK
    )
    gone = [removal.unit for removal in result.plan.removals]
    assert gone
    assert all(isinstance(unit, DepthUnit) and unit.branch for unit in gone)
    batch = tiny_tokens(3, seed=5)
    assert count_macs(result.model, batch)[""] <= 0.71 * count_macs(model, batch)[""]
    with torch.no_grad():
        assert torch.equal(ttmpd.load(tmp_path / "out", tiny_transformer())(batch), result.model(batch))


@pytest.mark.usefixtures("quick_timing")
def test_all_kinds_stand_in_one_plan():
    result = compress(tiny_transformer(), tiny_token_samples(32), macs=0.4, **QUICK)
    ids = {removal.unit.id for removal in result.plan.removals}
    holders = holders_of([*find_units(tiny_transformer(), tiny_tokens()).units])
    assert ids
    assert not any(ids.intersection(holders[unit]) for unit in ids)
