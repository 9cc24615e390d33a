"""Heads and neurons found, masked and narrowed in real architectures with random weights, and in corner cases."""

import copy
import subprocess
import sys

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

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

timm = pytest.importorskip("timm")
hf = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "use_cache": False,
}


def text_model(name: str) -> nn.Module:
    configs = {
        "bert": lambda: hf.BertConfig(**TEXT, num_attention_heads=4),
        "roberta": lambda: hf.RobertaConfig(**TEXT, num_attention_heads=4),
        "distilbert": lambda: hf.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=2, n_heads=4),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        ),
        "llama": lambda: hf.LlamaConfig(**TEXT, num_attention_heads=4),
        "llama, grouped queries": lambda: hf.LlamaConfig(**TEXT, num_attention_heads=4, num_key_value_heads=2),
    }
    torch.manual_seed(0)
    return hf.AutoModelForSequenceClassification.from_config(configs[name]()).eval()


def lively(model: nn.Module) -> nn.Module:
    """The model with weights large enough, layer scales included, for every part to show in the answer."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        elif float(parameter.detach().abs().max()) < 0.1:
            nn.init.normal_(parameter)
    return model


def vision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(built(name))


def built(name: str) -> nn.Module:
    if name == "hf vit":
        config = hf.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        return hf.AutoModelForImageClassification.from_config(config).eval()
    if name == "torchvision swin":
        return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5).eval()
    small = {
        "vit": ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32}),
        "deit": ("deit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32}),
        "beit": ("beit_base_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32}),
        "eva": ("eva02_tiny_patch14_224", {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 28}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "img_size": 32, "window_size": 4},
        ),
        "mixer": ("mixer_s32_224", {"img_size": 64}),
        "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    }
    model, options = small[name]
    return timm.create_model(model, num_classes=5, **options).eval()


def example(model: nn.Module, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name in FAMILIES_OF_TEXT:
        return torch.randint(3, 50, (2, 7), generator=generator)
    side = {"eva": 28, "mixer": 64, "convnext": 32}.get(name, 32)
    return torch.randn(2, 3, side, side, generator=generator)


FAMILIES_OF_TEXT = ("bert", "roberta", "distilbert", "gpt2", "llama", "llama, grouped queries")
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
    silent = [unit for unit in found[0] if 0 in unit.widths]
    assert len(silent) == (0 if name == "gpt2" else FAMILIES[name][0])  # whose Conv1D cannot read nothing
    units = [unit for some in found for unit in some]
    with torch.no_grad():
        whole = predict(model, batch)
    for choose in (lambda n: range(0, n, 2), lambda n: range(n // 2, n), lambda n: [n - 1], lambda _: []):
        # Without any member where that is offered: whole attentions and whole MLPs go.
        kept = {u: tuple(choose(u.n_members)) for u in units}
        removals = [Removal(u, "narrow", kept[u] if kept[u] or 0 in u.widths else (0,)) for u in units]
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
    if units[1] and 0 in units[1][0].widths:
        removals[0] = Removal(units[1][0], "narrow", ())  # a whole attention
    removals = [r for r in removals if not r.unit.path.startswith(f"{gone.path}.")]
    return model, (*removals, Removal(gone, "linear"))


def family(name: str) -> nn.Module:
    return text_model(name) if name in FAMILIES_OF_TEXT else vision_model(name)


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
from pathlib import Path
from safetensors.torch import save_file
spec = importlib.util.spec_from_file_location("families", sys.argv[1])
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)
answers = {}
for folder in Path(sys.argv[2]).iterdir():
    with torch.no_grad():
        net = families.family(folder.name)
        answers[folder.name] = families.predict(ttmpd.load(folder, model=net), families.example(net, folder.name))
save_file(answers, sys.argv[3])
"""


def test_artifacts_of_all_families_load_in_a_fresh_process(tmp_path):
    wanted = {}
    for name in FAMILIES:
        model, removals = narrowed_by_half(name)
        samples = Samples(example(model, name), ("a", "b"), padding=0 if name in FAMILIES_OF_TEXT else None)
        student = repaired(model, removals, samples)
        Result(model=student, plan=Plan(removals, 0.0, 2.0, 1.0, 1.0),
            opened=OpenedModel(model, "", False), sample_ids=samples.ids, facts={},
        ).save(tmp_path / "made" / name)  # fmt: skip
        with torch.no_grad():
            wanted[name] = predict(student, samples.inputs)
    command = [sys.executable, "-c", FRESH, __file__, str(tmp_path / "made"), str(tmp_path / "answers.safetensors")]
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


def test_widths_are_multiples_of_eight_and_fall_to_none():
    unit = Neuron().find(Mlp(nn.GELU(), hidden=100).eval(), torch.randn(3, 4)).units[0]
    assert unit.widths == (96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0)
    halves = Neuron(parts=2).find(Mlp(nn.GELU(), hidden=100).eval(), torch.randn(3, 4)).units[0]
    assert halves.widths == (48, 0)
    assert Head().find(tiny_transformer(), tiny_tokens()).units[0].widths == (3, 2, 1, 0)


def test_a_branch_without_any_neuron_answers_with_its_bias():
    net = Mlp(nn.GELU()).eval()
    unit = Neuron().find(net, torch.randn(3, 4)).units[0]
    student = cut(net, [Removal(unit, "narrow", ())])
    x = torch.randn(3, 4)
    assert torch.allclose(student(x), net.head(net.stem(x) + net.down.bias), atol=1e-6)


def test_all_kinds_stand_in_the_order_of_the_network_and_parts_know_their_whole():
    found = find_units(tiny_transformer(), tiny_tokens())
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
    block, head = find_units(tiny_transformer(), tiny_tokens()).units[:2]
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
