"""How many passes finding takes, and which units are offered together."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ttmpd.errors import ModelError
from ttmpd.surgery.find import default_kinds, find_units, holders_of
from ttmpd.surgery.reasons import Reason
from ttmpd.surgery.units.base import UnitSearch
from ttmpd.surgery.units.block import Block
from ttmpd.surgery.units.channel import Channel
from ttmpd.testing.tiny_models import tiny_model, tiny_tokens, tiny_transformer

IMAGES, TOKENS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), tiny_tokens(2)
SHARED = {"calls", "operations", "a single sample"}
"""What all kinds look at: one pass each."""
PROOF = 2
"""Passes that prove a kind's units together: of the cut model and of the masked one."""


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Class names of the models of which a forward pass was run."""
    ran: list[str] = []
    for model in (tiny_model(), tiny_transformer()):
        forward = type(model).forward

        def counted(self: nn.Module, x: Tensor, forward=forward) -> Tensor:
            ran.append(type(self).__name__)
            return forward(self, x)

        monkeypatch.setattr(type(model), "forward", counted)
    return ran


def test_a_small_resnet_is_run_as_often_as_its_units_must_be_proven(passes):
    model = tiny_model(hidden=24)
    passes.clear()
    units = find_units(model, IMAGES, ["block", "channel"]).units
    blocks = [unit for unit in units if unit.kind == "block"]
    assert len(blocks) == 3
    assert len(passes) == len(SHARED) + len(blocks) + PROOF


@pytest.mark.parametrize(
    ("kinds", "n_proofs"),
    [
        (["attention"], 1),
        (["attention", "mlp"], 2),
        (["attention", "mlp", "head"], 3),
    ],
)
def test_each_kind_adds_the_passes_of_its_own_proof_alone(passes, kinds, n_proofs):
    assert len(find_units(tiny_transformer(), TOKENS, kinds).units) == 2 * len(kinds)
    assert len(passes) == len(SHARED) + PROOF * n_proofs


def test_all_kinds_together_share_one_look(passes):
    units = find_units(tiny_transformer(), TOKENS).units
    found = {unit.kind for unit in units}
    assert found == {"block", "attention", "mlp", "head", "neuron"} <= set(default_kinds())
    n_blocks, output_layer = 2, 1
    assert len(passes) == len(SHARED) + output_layer + n_blocks + PROOF * len(found - {"block"})


def test_kinds_alone_find_what_they_find_together():
    model = tiny_transformer()
    together = find_units(model, TOKENS).units
    for kind in default_kinds():
        assert find_units(model, TOKENS, [kind]).units == tuple(unit for unit in together if unit.kind == kind)


def test_a_model_that_cannot_be_run_is_said_so_by_whatever_kind_comes_first():
    for kind in default_kinds():
        with pytest.raises(ModelError, match="must run on a batch of shape"):
            find_units(tiny_model(), TOKENS, [kind])


def test_holders_are_named_outermost_first():
    chains = holders_of(find_units(tiny_transformer(), TOKENS).units)
    assert chains["blocks.1"] == ()
    assert chains["head:blocks.1.attention.proj"] == ("blocks.1", "attention:blocks.1.attention")
    assert chains["neuron:blocks.1.down"] == ("blocks.1", "mlp:blocks.1.down")


def test_a_width_unit_that_crosses_the_border_of_a_block_is_not_offered_beside_it(monkeypatch):
    model = tiny_model(hidden=24)
    true = Channel.search

    def crossing(self, observation) -> UnitSearch:
        """The hidden channels of the first block, as if the second one read them."""
        first, second, _ = true(self, observation).units
        moved = dataclasses.replace(first, path=second.path, consumers=second.consumers)
        return UnitSearch((moved,), {})

    monkeypatch.setattr(Channel, "search", crossing)
    search = find_units(model, IMAGES, ["block", "channel"])
    assert search.units == Block().find(model, IMAGES).units
    assert search.not_removable["blocks.1.conv2"].reason is Reason.OVERLAPS
    assert len(find_units(model, IMAGES, ["channel"]).units) == 1
