"""Blocks found, masked and cut in real architectures with random weights, and in hand-written corner cases."""

import dataclasses
import gc

import pytest
import torch
import torchvision
from torch import nn

from block_nets import BLOCK, ROWS, Net, Plain, Res, image, paths
from ttmpd.models.modules import count_parameters, replace_module
from ttmpd.models.run import predict
from ttmpd.surgery.masks import skipped
from ttmpd.surgery.replacements import PassThrough, put, replacement_at
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_units

timm = pytest.importorskip("timm")


def numbered(*stages: tuple[str, range | list[int]]) -> list[str]:
    return [f"{name}.{i}" for name, numbers in stages for i in numbers]


def torchvision_model(name: str, **kwargs) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **kwargs)


RESNET50 = numbered(("layer1", [1, 2]), ("layer2", [1, 2, 3]), ("layer3", range(1, 6)), ("layer4", [1, 2]))
CONVNEXT = (3, 3, 9, 3)

# model, its keyword arguments, side of the input, paths of its units, the activation of each
ARCHITECTURES = {
    "torchvision:resnet18": ({}, 32, ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"], "relu"),
    "torchvision:resnet50": ({}, 32, RESNET50, "relu"),
    "torchvision:resnext50_32x4d": ({}, 32, RESNET50, "relu"),
    "torchvision:mobilenet_v2": ({}, 32, numbered(("features", [3, 5, 6, 8, 9, 10, 12, 13, 15, 16])), ""),
    "torchvision:mobilenet_v3_large": ({}, 32, numbered(("features", [1, 3, 5, 6, 8, 9, 10, 12, 14, 15])), ""),
    "torchvision:efficientnet_b0": (
        {},
        32,
        numbered(("features.2", [1]), ("features.3", [1]), *[(f"features.{i}", [1, 2]) for i in (4, 5)])
        + numbered(("features.6", [1, 2, 3])),
        "",
    ),
    "torchvision:convnext_tiny": (
        {},
        32,
        numbered(*[(f"features.{2 * i + 1}", range(n)) for i, n in enumerate(CONVNEXT)]),
        "",
    ),
    "torchvision:regnet_y_400mf": (
        {},
        32,
        [f"trunk_output.block{s}.block{s}-{i}" for s, n in ((2, 3), (3, 6), (4, 6)) for i in range(1, n)],
        "relu",
    ),
    "torchvision:shufflenet_v2_x0_5": (
        {},
        32,
        numbered(("stage2", [1, 2, 3]), ("stage3", range(1, 8)), ("stage4", [1, 2, 3])),
        "relu",
    ),
    "torchvision:swin_t": (
        {},
        32,
        numbered(*[(f"features.{2 * i + 1}", range(n)) for i, n in enumerate((2, 2, 6, 2))]),
        "",
    ),
    "timm:resnet50": ({}, 32, RESNET50, "relu"),
    "timm:resnetv2_50": (
        {},
        32,
        numbered(*[(f"stages.{i}.blocks", range(1, n)) for i, n in enumerate((3, 4, 6, 3))]),
        "",
    ),
    "timm:convnext_atto": (
        {},
        32,
        numbered(*[(f"stages.{i}.blocks", range(n)) for i, n in enumerate((2, 2, 6, 2))]),
        "",
    ),
    "timm:poolformerv2_s12": (
        {},
        32,
        numbered(*[(f"stages.{i}.blocks", range(n)) for i, n in enumerate((2, 2, 6, 2))]),
        "",
    ),
    "timm:deit_tiny_patch16_224": ({"img_size": 32}, 32, numbered(("blocks", range(12))), ""),
    "timm:cait_xxs24_224": ({"img_size": 32}, 32, numbered(("blocks", range(24))), ""),
    "timm:swin_tiny_patch4_window7_224": (
        {"img_size": 32, "window_size": 2},
        32,
        numbered(*[(f"layers.{i}.blocks", range(n)) for i, n in enumerate((2, 2, 6, 2))]),
        "",
    ),
    "timm:mobilenetv3_large_100": (
        {},
        32,
        [
            "blocks.0.0",
            "blocks.1.1",
            "blocks.2.1",
            "blocks.2.2",
            "blocks.3.1",
            "blocks.3.2",
            "blocks.3.3",
            "blocks.4.1",
            "blocks.5.1",
            "blocks.5.2",
        ],
        "",
    ),
    "timm:efficientnet_b0": (
        {},
        32,
        [
            "blocks.1.1",
            "blocks.2.1",
            "blocks.3.1",
            "blocks.3.2",
            "blocks.4.1",
            "blocks.4.2",
            "blocks.5.1",
            "blocks.5.2",
            "blocks.5.3",
        ],
        "",
    ),
    "timm:regnety_002": (
        {},
        32,
        [f"s3.b{i}" for i in (2, 3, 4)] + [f"s4.b{i}" for i in range(2, 8)],
        "relu",
    ),
}


def opened(name: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    library, _, model = name.partition(":")
    if library == "timm":
        return timm.create_model(model, pretrained=False, num_classes=10, **settings).eval()
    return torchvision_model(model, num_classes=10, **settings).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_of_an_architecture(name):
    settings, size, expected, activation = ARCHITECTURES[name]
    model, batch = opened(name, settings), image(size)
    found = BLOCK.find(model, batch)
    units = found.units
    assert [unit.path for unit in units] == expected
    assert not any("SqueezeExcit" in unit.module or "Norm" in unit.module for unit in units)
    if activation == "" or size > 32:
        assert {unit.activation for unit in units} == {activation}
    with torch.no_grad():
        whole = model(batch)
        for chosen in (units[:1], units):
            cut = BLOCK.cut(model, chosen)
            with skipped(model, chosen):
                assert torch.allclose(model(batch), cut(batch), rtol=0, atol=1e-5)
            assert count_parameters(model) - count_parameters(cut) == sum(unit.n_params for unit in chosen)
            gone = tuple(f"{unit.path}." for unit in chosen)
            kept = {k: v for k, v in model.state_dict().items() if not k.startswith(gone)}
            assert kept.keys() == cut.state_dict().keys()
            assert all(torch.equal(v, kept[k]) for k, v in cut.state_dict().items())
        assert torch.equal(model(batch), whole)
    del model
    gc.collect()


def test_relus_are_seen_on_maps_of_ordinary_size():
    units = BLOCK.find(opened("torchvision:resnet18", {}), image(64)).units
    assert {unit.activation for unit in units} == {"relu"}


def test_nothing_of_a_densenet_keeps_its_shape_and_every_reason_is_given():
    found = BLOCK.find(torchvision_model("densenet121").eval(), image(32))
    assert found.units == ()
    reasons = {path: str(refusal) for path, refusal in found.not_removable.items()}
    assert reasons["features.denseblock1"].startswith("changes the shape: (64,")
    assert len(reasons) >= 58


def test_blocks_in_branches_of_several_resolutions_are_found_and_the_modules_around_them_are_not():
    model = timm.create_model("hrnet_w18_small", pretrained=False, num_classes=10).eval()
    units = BLOCK.find(model, image(64)).units
    assert len(units) == 18
    assert {unit.module for unit in units} == {"BasicBlock"}


def masked_equals_cut(model: nn.Module, batch: torch.Tensor = ROWS) -> None:
    units = BLOCK.find(model.eval(), batch).units
    assert units
    for chosen in [(unit,) for unit in units] + [units]:
        cut = BLOCK.cut(model, chosen)
        with torch.no_grad(), skipped(model, chosen):
            masked = predict(model, batch)
        with torch.no_grad():
            assert torch.allclose(predict(cut, batch), masked, atol=1e-6)


def test_residual_blocks_of_rows():
    model = Net(Res(), Res())
    units = BLOCK.find(model, ROWS).units
    assert [(u.path, u.shape, u.layout, u.form) for u in units] == [
        ("body.0", (6,), "channels_last", "plain"),
        ("body.1", (6,), "channels_last", "plain"),
    ]
    assert units[0].n_params == 84
    assert units[0].macs == 72
    masked_equals_cut(model)


def test_plain_blocks_in_a_row_are_units_and_a_single_one_is_not():
    assert paths(Net(Plain(), Plain()), ROWS) == ["body.0", "body.1"]
    masked_equals_cut(Net(Plain(), Plain()))
    found = BLOCK.find(Net(Plain()), ROWS)
    assert found.units == ()


def test_a_block_of_blocks_gives_its_parts_and_not_itself_too():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(Res(), Res())

        def forward(self, x):
            return x + self.parts(x)

    assert paths(Net(Outer(), Outer()), ROWS) == [f"body.{i}.parts.{j}" for i in (0, 1) for j in (0, 1)]


def test_a_block_with_much_of_its_own_is_taken_whole():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.more = Res(), nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 6))

        def forward(self, x):
            return x + self.more(self.part(x))

    assert paths(Net(Outer(), Outer()), ROWS) == ["body.0", "body.1"]


def test_a_shortcut_around_plain_parts_makes_the_whole_the_unit():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Plain(), Plain()

        def forward(self, x):
            return x + self.b(self.a(x))

    assert paths(Net(Outer()), ROWS) == ["body.0"]


def test_a_learned_scale_on_the_shortcut_is_still_a_shortcut():
    class Scaled(Res):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((6,), 0.9))

        def forward(self, x):
            return x * self.scale.view(1, -1) + self.layer(x) * 0.5

    assert paths(Net(Scaled()), ROWS) == ["body.0"]


def test_more_arguments_and_tuples():
    class Layer(Res):
        def forward(self, hidden, mask=None, flag=True):
            return (super().forward(hidden) * (1 if mask is None else mask), "weights")

    def run(body, x):
        for layer in body:
            x = layer(x, torch.ones(6), flag=False)[0]
        return x

    model = Net(Layer(), Layer(), run=run)
    units = BLOCK.find(model, ROWS).units
    assert [(u.path, u.form) for u in units] == [("body.0", "tuple"), ("body.1", "tuple")]
    masked_equals_cut(model)
    assert isinstance(BLOCK.cut(model, units).body[0], PassThrough)


def test_arguments_by_keyword():
    class Layer(Res):
        def forward(self, *, hidden, scale):
            return hidden + scale * self.layer(hidden)

    model = Net(Layer(), Layer(), run=lambda body, x: body[1](hidden=body[0](hidden=x, scale=2.0), scale=1.0))
    assert [u.form for u in BLOCK.find(model, ROWS).units] == ["arguments", "arguments"]
    masked_equals_cut(model)


def test_one_argument_by_keyword():
    class Layer(Res):
        def forward(self, hidden):
            return hidden + self.layer(hidden)

    model = Net(Layer(), Layer(), run=lambda body, x: body[1](hidden=body[0](hidden=x)))
    masked_equals_cut(model)


def test_a_module_under_two_names_is_replaced_under_both():
    shared = Res()
    model = Net(Res(), shared)
    model.first = model.body[0]
    units = BLOCK.find(model, ROWS).units
    assert len(units) == 2
    masked_equals_cut(model)
    student = BLOCK.cut(model, units[:1])
    put(student, units[0], nn.Tanh())
    assert isinstance(student.body[0], nn.Tanh)
    assert isinstance(replacement_at(student, units[0]), nn.Tanh)


def test_token_models_have_units_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.net = nn.Embedding(9, 5), Net(Res(), Res())

        def forward(self, ids):
            return self.net(self.embed(ids.long()).mean(1))

    assert paths(Tokens(), torch.randint(0, 9, (2, 4)).float()) == ["net.body.0", "net.body.1"]


# --- activations and stand-ins


def test_activations_are_read_off_the_values():
    class Act(Res):
        def __init__(self, act):
            super().__init__()
            self.act = act

        def forward(self, x):
            return self.act(9 * super().forward(x))

    acts = [Act(nn.ReLU()), Act(nn.ReLU6()), Act(nn.Identity()), Act(nn.LeakyReLU(0.1))]
    units = BLOCK.find(Net(*acts), torch.randn(64, 5)).units
    assert [unit.activation for unit in units] == ["relu", "relu6", "", ""]


@pytest.mark.parametrize(
    ("shape", "layout", "kind"),
    [
        ((6, 4, 4), "channels_first", nn.Conv2d),
        ((6, 4), "channels_first", nn.Conv1d),
        ((4, 6), "channels_last", nn.Linear),
        ((6,), "channels_last", nn.Linear),
    ],
)
def test_stand_ins_keep_the_shape(shape, layout, kind):
    unit = tiny_units(tiny_model())[0]
    unit = dataclasses.replace(unit, shape=shape, layout=layout)
    stand_in = BLOCK.replacement(unit)
    assert isinstance(stand_in[0], kind)
    assert isinstance(stand_in[1], nn.ReLU)
    assert stand_in(torch.randn(2, *shape)).shape == (2, *shape)


# --- what goes wrong


def test_find_leaves_the_model_as_it_was_even_where_it_refuses():
    class Layer(Res):
        gain = 2.0

    model = Net(Layer(), Res(), run=lambda body, x: body[1](body[0](x) * body[0].gain))
    with assert_untouched(model):
        assert len(BLOCK.find(model, ROWS).units) == 1


def test_replacing_a_unit_by_hand_is_what_cut_does():
    model = Net(Res(), Res())
    units = BLOCK.find(model, ROWS).units
    cut = BLOCK.cut(model, units[:1])
    replace_module(model, "body.0", nn.Identity())
    with torch.no_grad():
        assert torch.equal(model(ROWS), cut(ROWS))
