"""One forward pass with exits: what shrinks, what does not, and who may run it."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import InvalidValueError, UnsupportedError
from ttmpd.models.modules import clone
from ttmpd.models.taps import Tap, read_taps
from ttmpd.surgery.exits.model import EarlyExitModel, with_only
from ttmpd.surgery.exits.places import exits_at, find_places, proven, spread
from ttmpd.surgery.exits.pooling import pooled
from ttmpd.surgery.exits.spec import NEVER, Exit, Exits
from ttmpd.testing.tiny_models import TinyBlock, tiny_samples

QUICK = RightTool(steps=3, views=1)


class Layer(nn.Module):
    """A block that is called with a mask, a nested pair and a table of positions; it answers with a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.sizes: list[tuple[int, int, int, int]] = []

    def forward(self, x: Tensor, mask: Tensor, *, pair: tuple[Tensor, Tensor], table: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append((len(x), len(mask), len(pair[0]), len(table)))
        mixed = (self.inner(self.norm(x)) + table + pair[0]).relu() * mask[..., None]
        return x + self.outer(mixed) * pair[1][:, None, None], mask


class Layers(nn.Module):
    """Four of them; the table has one row per token, as many as samples in the tests."""

    def __init__(self, n_tokens: int = 6, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(4))
        self.head, self.table = nn.Linear(width, 3), nn.Parameter(torch.randn(n_tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[..., 0] > -1).float()
        pair = (x.mean(1, keepdim=True), x[:, 0, 0].abs())
        for layer in self.layers:
            x, mask = layer(x, mask, pair=pair, table=self.table)
        return self.head(x.mean(1))


@pytest.fixture
def layers() -> tuple[nn.Module, Samples]:
    torch.manual_seed(0)
    return Layers().eval(), Samples(torch.randn(6, 6, 8), tuple("abcdef"))


@torch.no_grad()
def answered(net: nn.Module, batch: Tensor) -> Tensor:
    return net(batch)


# ------------------------------------------------------------------------------------------------------------ shrinking


@torch.no_grad()
def test_arguments_shrink_with_the_batch_and_those_of_no_sample_do_not(layers):
    net, samples = layers
    model = QUICK.equip(net, samples).model
    assert model.spec.fixed == ("table",)
    assert model.spec.followers == ("layers.1", "layers.2", "layers.3")
    assert model.spec.compact
    for layer in model.backbone.layers:
        layer.sizes.clear()
    found = model.answer_at(samples.inputs, torch.tensor([0, 3, 1, 3, 0, 2]))
    assert [layer.sizes for layer in model.backbone.layers] == [
        [(6, 6, 6, 6)], [(4, 4, 4, 6)], [(3, 3, 3, 6)], [(2, 2, 2, 6)],
    ]  # fmt: skip
    wanted = net(samples.inputs)
    assert torch.allclose(found.logits[[1, 3]], wanted[[1, 3]], atol=1e-6)
    assert not torch.allclose(found.logits[[0, 2, 4, 5]], wanted[[0, 2, 4, 5]], atol=1e-3)


@torch.no_grad()
def test_the_answer_of_an_exit_is_its_head_on_what_the_block_hands_on(layers):
    net, samples = layers
    model = QUICK.equip(net, samples).model
    model.backbone.layers[2].sizes.clear()
    found = model.answer_at(samples.inputs, torch.full((6,), 1))
    assert not model.backbone.layers[2].sizes  # not run any more
    behind = read_taps(net, samples.inputs, {"x": Tap("layers.1", "output")})["x"]
    assert torch.allclose(found.logits, model.heads[1](behind.mean(1)), atol=1e-6)


@torch.no_grad()
def test_memory_format_survives_a_shrinking_batch(net):
    model = QUICK.equip(net, tiny_samples(8)).model.to(memory_format=torch.channels_last)
    formats = []
    model.backbone.blocks[1].register_forward_pre_hook(
        lambda _m, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    batch = tiny_samples(6).batch(slice(None)).contiguous(memory_format=torch.channels_last)
    model.answer_at(batch, torch.tensor([0, 2, 0, 2, 2, 2]))
    assert formats == [True]


class Remembers(nn.Sequential):
    """Asks at its end how many samples it began with, as decoders do that look for the last token."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        return super().forward(x).reshape(n, -1)[torch.arange(n), :4]


@torch.no_grad()
def test_where_a_batch_cannot_shrink_whole_ones_still_end_early():
    net = Remembers(nn.Conv2d(3, 4, 1), *(TinyBlock(4) for _ in range(3)), nn.Flatten()).eval()
    found = QUICK.equip(net, tiny_samples(12))
    model, batch = found.model, tiny_samples(5, seed=2).batch(slice(None))
    assert not model.spec.compact
    assert "do not shrink" in found.note
    wanted, run = net(batch), []
    model.backbone[3].register_forward_hook(lambda *_: run.append(1))
    mixed = model.answer_at(batch, torch.tensor([0, 2, 1, 2, 0]))
    assert torch.equal(mixed.logits[[1, 3]], wanted[[1, 3]])
    single = torch.cat([model.answer_at(batch[i : i + 1], torch.tensor([e])).logits for i, e in enumerate((0, 2, 1))])
    assert torch.allclose(mixed.logits[:3], single, atol=1e-5)
    run.clear()
    assert model.answer_at(batch, torch.tensor([0, 1, 1, 1, 0])).exits.tolist() == [0, 1, 1, 1, 0]
    assert not run


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
@torch.no_grad()
def test_text_with_padding(name, text_folder, sentences, tmp_path):
    from ttmpd.models.open import open_model

    (tmp_path / "few.txt").write_text("\n".join(sentences(24)) + "\n")
    opened = open_model(f"hf:{text_folder(name)}")
    samples = open_samples(str(tmp_path / "few.txt"), opened.preprocessing)
    model = QUICK.equip(opened.module, samples).model
    assert model.spec.padding == samples.padding
    assert model.spec.compact == (name != "gpt2")
    batch = samples.inputs[:8]
    whole = opened.module(batch).logits
    assert torch.equal(model(batch), whole)
    exits = torch.tensor([0, 3, 1, 3, 0, 3, 2, 1])
    found = model.answer_at(batch, exits)
    assert torch.allclose(found.logits[exits == 3], whole[exits == 3], atol=1e-5)
    short = [batch[i : i + 1, : int((batch[i] != samples.padding).sum())] for i in range(8)]  # no padding at all
    alone = torch.cat([model.answer_at(one, exits[i : i + 1]).logits for i, one in enumerate(short)])
    assert torch.allclose(found.logits, alone, atol=1e-4)


@torch.no_grad()
def test_vision_transformer():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=5)
    samples = Samples(torch.randn(10, 3, 32, 32), tuple(map(str, range(10))))
    model = QUICK.equip(net.eval(), samples).model
    assert [(place.path, place.pool) for place in model.spec.exits] == [(f"blocks.{i}", "tokens") for i in range(3)]
    exits = torch.tensor([3, 0, 3, 1])
    found = model.answer_at(samples.inputs[:4], exits)
    assert torch.allclose(found.logits[exits == 3], net(samples.inputs[:4])[exits == 3], atol=1e-5)


def test_blocks_that_change_the_shape_carry_exits_too():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=4).eval()
    places, fixed = find_places(net, torch.randn(2, 3, 64, 64))
    assert [place.path for place in places] == [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    assert (places[2].shape, places[2].layout, fixed) == ((128, 8, 8), "channels_first", ())
    spec = exits_at(places, spread(8, 3), 4, mix=False, fixed=fixed, padding=None)
    assert [place.path for place in spec.exits] == ["layer1.1", "layer2.1", "layer3.1"]
    assert [place.n_features for place in spec.exits] == [5 * 64, 5 * 128, 5 * 256]  # quarters and the highest
    assert proven(clone(net), spec, torch.randn(4, 3, 64, 64)) == spec


def test_exits_are_refused_where_they_make_no_sense(net):
    with pytest.raises(UnsupportedError, match="a row of blocks"):
        find_places(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), torch.randn(2, 3, 8, 8))
    model = QUICK.equip(net, tiny_samples(8)).model
    with pytest.raises(InvalidValueError, match="exits once"):
        EarlyExitModel(model, model.spec)
    with pytest.raises(InvalidValueError, match="in their order"):
        Exits(tuple(reversed(model.spec.exits)), model.spec.blocks, 4)
    with pytest.raises(InvalidValueError, match="must end with"):
        Exit("b", ("a",), "mean", "channels_first", 6)


def test_quarters_say_where_things_are():
    left, right = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    left[..., 0], right[..., 3] = 4.0, 4.0
    assert torch.equal(pooled(left, "mean", "channels_first"), pooled(right, "mean", "channels_first"))
    assert pooled(left, "grid", "channels_first")[0, :4].tolist() == [2, 0, 2, 0]
    assert pooled(right.movedim(1, -1), "grid", "channels_last")[0, :4].tolist() == [0, 2, 0, 2]
    kept = torch.tensor([[True, True, False]])
    assert pooled(torch.tensor([[[1.0], [3.0], [9.0]]]), "tokens", "channels_last", kept).tolist() == [[2.0]]


# ---------------------------------------------------------------------------------------------------------- as a module


def test_threads_do_not_meet(net):
    model = QUICK.equip(net, tiny_samples(12)).model
    batches = [tiny_samples(n, seed=n).batch(slice(None)) for n in (3, 5, 8, 13)]
    with torch.no_grad():
        model.threshold = float(model.exit_logits(model.features(batches[3])[0])[0].softmax(-1).amax(-1).median())
    wanted = [answered(model, batch) for batch in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(20):
            if not torch.equal(answered(model, batches[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_model_under_the_exits_is_left_alone_outside_of_a_pass(net):
    model = QUICK.equip(net, tiny_samples(8)).model
    model.threshold = 0.0
    batch = tiny_samples(4).batch(slice(None))
    assert torch.equal(answered(model.backbone, batch), answered(net, batch))
    other = EarlyExitModel(model.backbone, model.spec, NEVER)  # its passes are none of the first model's
    other.threshold = 0.0
    assert torch.equal(answered(other, batch), torch.zeros(4, 4))  # heads that know nothing


def test_what_looks_into_the_model_and_stops_it_is_not_taken_for_an_exit(net):
    model = QUICK.equip(net, tiny_samples(8)).model
    model.threshold = 1.0
    batch = tiny_samples(2).batch(slice(None))
    seen = read_taps(model, batch, {"early": Tap("backbone.blocks.0", "input")})
    assert seen["early"].shape == (2, 6, 8, 8)
    assert answered(model, batch).shape == (2, 4)  # and the stopped pass is over


def test_copies_and_state(net):
    model = QUICK.equip(net, tiny_samples(8)).model
    model.threshold = 0.0
    batch = tiny_samples(4).batch(slice(None))
    wanted, twin = answered(model, batch), copy.deepcopy(model)
    with torch.no_grad():
        twin.heads[0].bias += torch.arange(4.0)
    assert torch.equal(answered(model, batch), wanted)
    assert not torch.equal(answered(twin, batch), wanted)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"backbone", "heads"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_some_exits_alone(layers):
    net, samples = layers
    model = QUICK.equip(net, samples).model
    few = with_only(model, (0, 2))
    exits = torch.tensor([0, 2, 1, 2, 0, 1])
    told = torch.tensor([0, 3, 2, 3, 0, 2])  # the same, among all of them
    with torch.no_grad():
        assert torch.allclose(few.answer_at(samples.inputs, exits).logits, model.answer_at(samples.inputs, told).logits)
    hooks = (
        [len(m._forward_hooks) for m in few.backbone.layers],
        [len(m._forward_pre_hooks) for m in few.backbone.layers],
    )
    assert hooks == ([1, 0, 1, 0], [0, 1, 1, 1])
    assert len(model.heads) == 3  # and the model has all of them


def test_specification_is_plain_data(net):
    spec = RightTool(steps=3, views=1, mix=True).equip(net, tiny_samples(8)).model.spec
    assert spec.exits[1].reads == ("blocks.0", "blocks.1")
    assert Exits.from_dict(spec.to_dict()) == spec
    with pytest.raises(KeyError):
        Exits.from_dict({**spec.to_dict(), "exits": [{"path": "blocks.0"}]})


@pytest.mark.parametrize(("n_places", "n_exits", "wanted"), [(6, 5, range(5)), (27, 3, (6, 13, 19)), (2, 9, (0,))])
def test_exits_are_spread_over_the_depth(n_places, n_exits, wanted):
    assert spread(n_places, n_exits) == tuple(wanted)


def test_every_number_of_exits_stands_behind_different_blocks():
    for n_places in range(2, 40):
        for n_exits in range(1, n_places):
            found = spread(n_places, n_exits)
            assert len(set(found)) == n_exits
            assert min(found) >= 0 and max(found) < n_places - 1, (n_places, n_exits, found)
