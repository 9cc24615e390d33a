"""Heads and neurons found, masked and narrowed in real architectures with random weights, and in corner cases."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import families
from families import FAMILIES_OF_TEXT, example, family, text_model, vision_model
from reports import small_report
from ttmpd.artifact.write import Result
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import count_parameters
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import first_tensor, predict
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.cut import check_units, cut
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.surgery.masks import mask_of, masked
from ttmpd.surgery.reasons import Reason, Refusal
from ttmpd.surgery.units.block import Block
from ttmpd.surgery.units.head import Head
from ttmpd.surgery.units.neuron import Neuron
from ttmpd.testing.tiny_models import tiny_tokens, tiny_transformer

pytest.importorskip("timm")
pytest.importorskip("transformers")

# name -> (attentions whose heads go, layers whose neurons go)
FAMILIES = {
    **dict.fromkeys(FAMILIES_OF_TEXT, (2, 2)),
    "vit": (2, 2), "deit": (2, 2), "swin": (2, 2), "hf vit": (2, 2), "mixer": (0, 16), "convnext": (0, 4),
    # Their attention computes with the weights of its layers, and with all heads at once.
    "beit": (0, 2), "eva": (0, 2), "torchvision swin": (0, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_cut(name):
    model = family(name)
    batch = example(model, name)
    found = [kind.find(model, batch).units for kind in (Head(), Neuron(least=8))]
    assert tuple(map(len, found)) == FAMILIES[name]
    units = [unit for some in found for unit in some]
    with torch.no_grad():
        whole = predict(model, batch)
    for choose in (lambda n: range(0, n, 2), lambda n: range(n // 2, n), lambda n: [n - 1]):
        removals = [Removal(u, "narrow", tuple(choose(u.n_members))) for u in units]
        student = cut(model, removals)
        with torch.no_grad(), masked(model, {r.unit: mask_of(r.unit, r.kept) for r in removals}):
            wanted = predict(model, batch)
        with torch.no_grad():
            assert torch.allclose(predict(student, batch), wanted, atol=1e-5)
        gone = sum(r.unit.n_params * (1 - len(r.kept) / r.unit.n_members) for r in removals)
        assert count_parameters(model) - count_parameters(student) == pytest.approx(gone)
        assert not torch.allclose(wanted, whole, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(predict(model, batch), whole)


def narrowed_by_half(name: str) -> tuple[nn.Module, tuple[Removal, ...]]:
    """A family's model, and removals that leave it half of its heads and neurons and no second block."""
    model = family(name)
    units = [kind.find(model, example(model, name)).units for kind in (Block(), Head(), Neuron(least=8))]
    gone = units[0][-1]
    removals = [Removal(u, "narrow", tuple(range(u.n_members // 2))) for some in units[1:] for u in some]
    removals = [r for r in removals if not r.unit.path.startswith(f"{gone.path}.")]
    return model, (*removals, Removal(gone, "linear"))


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_models_export(name):
    model, removals = narrowed_by_half(name)
    batch = example(model, name)
    student = repaired(model, removals, Samples(batch, ("a", "b")))
    program = torch.export.export(student, (batch,)).module()
    with torch.no_grad():
        answer = first_tensor(program(batch))
        assert torch.allclose(answer, predict(student, batch), atol=1e-5)


FRESH = """
import importlib.util, sys, torch, ttmpd
from ttmpd.models.run import predict
from pathlib import Path
from safetensors.torch import save_file
spec = importlib.util.spec_from_file_location("families", sys.argv[1])
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)
answers = {}
for folder in Path(sys.argv[2]).iterdir():
    with torch.no_grad():
        net = families.family(folder.name)
        answers[folder.name] = predict(ttmpd.load(folder, model=net), families.example(net, folder.name))
save_file(answers, sys.argv[3])
"""


def test_artifacts_of_all_families_load_in_a_fresh_process(tmp_path):
    wanted = {}
    for name in FAMILIES:
        model, removals = narrowed_by_half(name)
        samples = Samples(example(model, name), ("a", "b"), padding=0 if name in FAMILIES_OF_TEXT else None)
        student = repaired(model, removals, samples)
        Result(model=student, plan=Plan(removals, 0.0, 2.0, 1.0, 1.0),
            opened=OpenedModel(model, "", False), sample_ids=samples.ids, report=small_report(),
        ).save(tmp_path / "made" / name)  # fmt: skip
        with torch.no_grad():
            wanted[name] = predict(student, samples.inputs)
    command = [
        sys.executable,
        "-c",
        FRESH,
        families.__file__,
        str(tmp_path / "made"),
        str(tmp_path / "answers.safetensors"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    found = load_file(tmp_path / "answers.safetensors")
    assert found.keys() == wanted.keys()
    for name, answer in wanted.items():
        torch.testing.assert_close(found[name], answer, atol=1e-5, rtol=1e-5)


def test_a_group_of_queries_goes_with_its_key_and_value():
    unit = Head().find(text_model("llama, grouped queries"), torch.tensor([[3, 4, 5]])).units[0]
    assert unit.n_members == 2
    assert len(unit.producers) == 3


def test_attention_that_hides_its_layers_is_refused_with_the_reason():
    found = Head().find(vision_model("beit"), torch.randn(2, 3, 32, 32))
    assert found.units == ()
    assert found.not_removable["blocks.0.attn"].reason is Reason.HIDDEN_LAYERS


def test_attention_of_torch_is_refused_with_the_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    found = Head().find(Net().eval(), torch.randn(2, 4, 8))
    assert found.units == ()
    assert found.not_removable["attention"].reason is Reason.FUSED_HEADS


class Mlp(nn.Module):
    """An MLP between a stem and a head; ``between`` stands before the second layer."""

    def __init__(self, between: nn.Module, hidden: int = 32):
        super().__init__()
        self.stem, self.up, self.between = nn.Linear(4, 8), nn.Linear(8, hidden), between
        self.down, self.head = nn.Linear(hidden, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(self.between(self.up(x))))


@pytest.mark.parametrize("between", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.Identity(), nn.Dropout(0.1)])
def test_element_wise_functions_are_looked_through(between):
    units = Neuron().find(Mlp(between).eval(), torch.randn(3, 4)).units
    assert [(unit.path, unit.n_members, unit.producers) for unit in units] == [("down", 32, ("up",))]


@pytest.mark.parametrize(
    "between", [nn.LayerNorm(32), nn.Softmax(-1), nn.Sequential(nn.Linear(32, 32), nn.Softmax(-1))]
)
def test_what_mixes_neurons_is_no_unit(between):
    units = Neuron().find(Mlp(between).eval(), torch.randn(3, 4)).units
    assert "down" not in [unit.path for unit in units]


def test_a_layer_that_feeds_two_is_no_unit():
    class Net(Mlp):
        def forward(self, x):
            x = self.stem(x)
            h = self.up(x).relu()
            return self.head(x + self.down(h) + h.sum(-1, keepdim=True))

    found = Neuron().find(Net(nn.Identity()).eval(), torch.randn(3, 4))
    assert found.units == ()
    assert found.not_removable == {"down": Refusal(Reason.DEPENDENT)}


def test_the_layer_that_gives_the_logits_keeps_its_inputs():
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    assert Neuron().find(net, torch.randn(3, 4)).units == ()


def test_few_neurons_are_left_alone():
    assert Neuron().find(Mlp(nn.GELU(), hidden=15).eval(), torch.randn(3, 4)).units == ()


def test_widths_are_multiples_of_eight_and_never_none():
    unit = Neuron().find(Mlp(nn.GELU(), hidden=100).eval(), torch.randn(3, 4)).units[0]
    assert unit.widths == (96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8)
    halves = Neuron(parts=2).find(Mlp(nn.GELU(), hidden=100).eval(), torch.randn(3, 4)).units[0]
    assert halves.widths == (48,)
    assert Head().find(tiny_transformer(), tiny_tokens()).units[0].widths == (3, 2, 1)


def test_members_of_earlier_artifacts_that_are_all_gone_leave_the_bias():
    model, x = tiny_transformer(), tiny_tokens()
    heads, neurons = (kind.find(model, x).units[0] for kind in (Head(), Neuron()))
    student = cut(model, [Removal(heads, "narrow", ()), Removal(neurons, "narrow", ())])
    block = model.blocks[0]
    block.attention.forward = lambda x: block.attention.proj.bias.expand_as(x)
    block.down.forward = lambda x: block.down.bias.expand(*x.shape[:-1], -1)
    assert torch.allclose(student(x), model(x), atol=1e-6)


def test_all_kinds_stand_in_the_order_of_the_network_and_parts_know_their_whole():
    found = find_units(tiny_transformer(), tiny_tokens(), ["block", "head", "neuron"])
    assert [unit.id for unit in found.units[:3]] == [
        "blocks.0", "head:blocks.0.attention.proj", "neuron:blocks.0.down",
    ]  # fmt: skip
    assert list(holders_of(found.units).values())[:3] == [(), ("blocks.0",), ("blocks.0",)]


def test_a_narrowed_model_can_be_narrowed_again():
    model = tiny_transformer()
    first = find_units(model, tiny_tokens(), ["head", "neuron"]).units
    student = cut(model, [Removal(unit, "narrow", tuple(range(unit.n_members // 2))) for unit in first])
    second = find_units(student, tiny_tokens(), ["head", "neuron"]).units
    assert [unit.n_members for unit in second] == [unit.n_members // 2 for unit in first]
    smaller = cut(student, [Removal(unit, "narrow", (0,)) for unit in second])
    assert predict(smaller, tiny_tokens()).shape == (4, 4)


def test_units_of_another_model_are_refused():
    unit = find_units(tiny_transformer(), tiny_tokens(), ["neuron"]).units[0]
    other = tiny_transformer()
    other.blocks[0].down = nn.Linear(8, 16)
    with pytest.raises(InvalidValueError, match="must have 32 members"):
        check_units(other, [unit])


@pytest.mark.parametrize("kept", [(32,), (-1,), (3, 2), (1, 1)])
def test_kept_members_rise_and_belong_to_the_unit(kept):
    unit = find_units(tiny_transformer(), tiny_tokens(), ["neuron"]).units[0]
    with pytest.raises(InvalidValueError, match="must rise and lie below 32"):
        Removal(unit, "narrow", kept)


def test_whole_units_are_not_narrowed_nor_members_dropped():
    block, head = find_units(tiny_transformer(), tiny_tokens(), ["block", "head"]).units[:2]
    for unit, action in ((block, "narrow"), (head, "drop")):
        with pytest.raises(InvalidValueError, match=r"must be narrowed|cannot be narrowed"):
            Removal(unit, action)


def test_the_model_keeps_its_own_numbers_when_a_copy_is_narrowed():
    model = tiny_transformer()
    before = copy.deepcopy(model.state_dict())
    unit = Head().find(model, tiny_tokens()).units[0]
    student = cut(model, [Removal(unit, "narrow", (1,))])
    assert (student.blocks[0].attention.num_heads, model.blocks[0].attention.num_heads) == (1, 4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
