"""Hidden channels found, masked and narrowed in real convolutional architectures with random weights."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from reports import small_report
from ttmpd.artifact.read import load
from ttmpd.artifact.write import Result
from ttmpd.data.samples import Samples
from ttmpd.latency import table as savings
from ttmpd.latency.timing import Timings
from ttmpd.models.macs import count_macs
from ttmpd.models.modules import hooks, module_at, to_fast_format
from ttmpd.models.open import open_model
from ttmpd.models.run import evaluating
from ttmpd.records import UNCHANGED, Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.cut import cut
from ttmpd.surgery.find import find_units, holders_of
from ttmpd.surgery.masks import mask_of, masked
from ttmpd.surgery.units.channel import Channel
from ttmpd.surgery.units.neuron import Neuron
from ttmpd.testing.tiny_models import tiny_model, tiny_samples


def settled(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """The model with batch statistics that fit its random weights, so that answers neither vanish nor explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(batch)
    return model.eval()


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 64, 64)
    if name == "timm efficientnet lite":
        timm = pytest.importorskip("timm")
        return settled(timm.create_model("efficientnet_lite0", num_classes=5), batch), batch
    return settled(getattr(torchvision.models, name)(num_classes=5), batch), batch


# name -> how many units there are; the others read the residual stream
FAMILIES = {"resnet18": 8, "resnet50": 32, "vgg11_bn": 7, "mobilenet_v2": 19, "timm efficientnet lite": 18}


def test_what_lies_between_two_blocks_is_timed_by_its_own_layers():
    """On the whole network, the smallest module that holds them, noise would drown what they save."""
    model, batch = built("mobilenet_v2")
    units = {unit.id: unit for unit in find_units(model, batch[:2], ["block", "channel", "neuron"]).units}
    between = units["channel:features.1.conv.1"]
    assert (savings.timed_path(between), units[between.id].producers[0]) == ("features", "features.0.0")
    far = savings._far_apart(model, units.values(), batch)
    assert between.id in far
    assert all(savings.timed_path(units[name]) in ("", "features") for name in far)
    ran = []
    modules = [module_at(model, path) for path in (*between.producers, between.path)]
    with hooks([m.register_forward_hook(lambda m, *_: ran.append(m)) for m in model.modules()]):
        runs = savings._layers(savings._Timed(model, model, UNCHANGED), between, batch)
        assert list(runs) == ["unit", *map(str, savings._timed_widths(between))]
        ran.clear()
        runs["unit"]()
        assert sorted(map(id, ran)) == sorted(map(id, modules))
        widths = {int(name): {answer.shape[1] for answer in runs[name]()} for name in list(runs)[1:]}
    assert widths == {width: {width, between.shape[0]} for width in savings._timed_widths(between)}


def test_units_far_apart_are_timed_one_by_one_in_the_same_seconds(monkeypatch):
    """All of their inputs together would take as much memory as a training step of the whole network."""
    model, batch = built("mobilenet_v2")
    units = find_units(model, batch[:2], ["block", "channel"]).units
    groups = []

    def still(runs, *, min_seconds, **_):
        groups.append((runs.keys(), min_seconds))
        return Timings(dict.fromkeys(runs, (1.0,)))

    monkeypatch.setattr(savings, "interleaved", still)
    found = savings.time_units(model, units, batch, min_seconds=2.0)
    assert [timing.unit for timing in found] == [unit.id for unit in units]
    far = {savings._signature(u) for u in units if u.id in savings._far_apart(model, units, batch)}
    sizes = sorted(len({name.split()[0] for name in names}) for names, _ in groups)
    assert sizes == [1] * len(far) + [len({savings._signature(u) for u in units}) - len(far)]
    assert sum(seconds for _, seconds in groups) == pytest.approx(2.0)


def test_units_with_large_maps_are_timed_apart_from_the_others(monkeypatch):
    """Allocated in changing order, large maps of many sizes leave freed memory in pieces."""
    model, batch = built("mobilenet_v2")
    units = find_units(model, batch[:2], ["block", "channel"]).units
    largest = savings._largest_maps(model, batch)
    assert largest["features.2.conv.0"] == largest["features.2"] == 4 * 96 * 32 * 32 * 4
    monkeypatch.setattr(savings, "LARGE", largest["features.3"] - 1)
    groups = savings._groups(model, dict(enumerate(units)), frozenset(), batch)
    places = [{savings.timed_path(unit) for unit in group.values()} for group in groups]
    large = {savings.timed_path(unit) for unit in units if largest[savings.timed_path(unit)] > savings.LARGE}
    assert 2 < len(large) < len({savings.timed_path(unit) for unit in units})
    apart = [group for group in places if group & large]
    assert sorted(map(len, apart)) == [1] * len(large)
    assert len(places) == len(apart) + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_cut_in_real_architectures(name):
    model, batch = built(name)
    units = Channel().find(model, batch[:2]).units
    assert len(units) == FAMILIES[name]
    removals = [Removal(unit, "narrow", tuple(range(unit.n_members))[-unit.widths[-1] :]) for unit in units]
    student = cut(model, removals)
    with torch.no_grad(), masked(model, {removal.unit: mask_of(removal.unit, removal.kept) for removal in removals}):
        wanted = model(batch)
    with torch.no_grad():
        found = student(batch)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    assert count_macs(student, batch[:1])[""] < 0.6 * count_macs(model, batch[:1])[""]
    assert len({unit.id for unit in units}) == len(units)


def test_what_goes_with_the_channels_is_counted():
    model, batch = built("mobilenet_v2")
    unit = next(u for u in Channel().find(model, batch[:2]).units if u.path == "features.2.conv.2")
    # expansion, its norm, the depthwise convolution, its norm; projection
    assert unit.producers == tuple(f"features.2.conv.{name}" for name in ("0.0", "0.1", "1.0", "1.1"))
    assert unit.n_members == 96
    assert unit.widths[0] < 96
    assert unit.widths[-1] == 16
    assert all(width % 8 == 0 for width in unit.widths)
    assert unit.n_params == 96 * 16 + 2 * 96 + 96 * 9 + 2 * 96 + 24 * 96
    student = cut(model, [Removal(unit, "narrow", tuple(range(48)))])
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in student.parameters())
    assert gone == unit.n_params // 2
    assert unit.macs == sum(count_macs(model, batch[:1])[f"features.2.conv.{name}"] for name in ("0.0", "1.0", "2"))


def test_channels_behind_squeeze_and_excitation_and_of_the_residual_stream_stay():
    model, batch = built("mobilenet_v3_small")
    found = Channel().find(model, batch[:2])
    paths = {unit.path for unit in found.units}
    refused = {path: str(refusal) for path, refusal in found.not_removable.items()}
    assert "features.2.block.2.0" in paths  # without squeeze and excitation
    assert "features.4.block.3.0" in refused
    assert "does not run" in refused["features.4.block.3.0"]
    resnet, batch = built("resnet18")
    readers = {unit.path for unit in Channel().find(resnet, batch[:2]).units}
    assert not any(path.endswith("conv1") for path in readers)


class Scaled(nn.Conv2d):
    """A convolution whose weights are scaled before use."""

    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    ("middle", "reader", "n_units"),
    [
        ([nn.BatchNorm2d(24), nn.ReLU()], nn.Conv2d(24, 4, 3), 1),
        ([nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 24, 3, groups=24)], nn.Conv2d(24, 4, 1), 1),
        ([nn.ReLU()], nn.Conv2d(24, 4, 1), 1),
        ([nn.GroupNorm(4, 24)], nn.Conv2d(24, 4, 3), 0),  # normalises over channels
        ([nn.Conv2d(24, 24, 3, groups=4)], nn.Conv2d(24, 4, 3), 0),  # mixes channels in groups
        ([nn.ReLU()], Scaled(24, 4, 3), 0),  # answers otherwise than its weights say
        ([nn.ReLU()], nn.Conv2d(24, 4, 3, padding=1, padding_mode="reflect"), 0),
        ([nn.Softmax(1)], nn.Conv2d(24, 4, 3), 0),
    ],
)
def test_what_may_stand_in_between(middle, reader, n_units):
    net = nn.Sequential(nn.Conv2d(3, 24, 3), *middle, reader, nn.Flatten(), nn.LazyLinear(2)).eval()
    batch = torch.randn(2, 3, 16, 16)
    net(batch)
    assert len(Channel().find(net, batch).units) == n_units


def test_two_pointwise_convolutions_are_neurons_and_no_channels():
    net = nn.Sequential(nn.Conv2d(3, 24, 1), nn.GELU(), nn.Conv2d(24, 4, 1), nn.Flatten(), nn.Linear(64, 2)).eval()
    batch = torch.randn(2, 3, 4, 4)
    assert not Channel().find(net, batch).units
    assert len(Neuron().find(net, batch).units) == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_the_others_speak_for_a_channel_that_repeats_them(stride):
    """Each hidden channel is there three times: with a third of them, fitted again, the answer is the same."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 24, 3, padding=1)
    with torch.no_grad():
        first.weight[8:16], first.weight[16:] = first.weight[:8], first.weight[:8]
        first.bias[8:16], first.bias[16:] = first.bias[:8], first.bias[:8]
    net = nn.Sequential(
        first, nn.ReLU(), nn.Conv2d(24, 4, 3, stride=stride, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    pixels = torch.randn(64, 3, 8, 8)
    samples = Samples(pixels, tuple(map(str, range(64))))
    unit = Channel().find(net, pixels[:2]).units[0]
    removal = Removal(unit, "narrow", tuple(range(8)))
    with torch.no_grad():
        wanted = net(pixels)
        bare = cut(net, [removal])(pixels)
        fitted = repaired(net, [removal], samples, ridge=1e-9)(pixels)
    assert not torch.allclose(bare, wanted, atol=1e-2)
    assert torch.allclose(fitted, wanted, atol=1e-3)


def test_blocks_and_their_channels_are_one_or_the_other():
    model = tiny_model(hidden=24)
    units = find_units(model, tiny_samples(2).batch(slice(None)), ["block", "channel"]).units
    channels = [unit for unit in units if unit.kind == "channel"]
    assert len(channels) == 3
    blocks = {unit.path: unit.id for unit in units if unit.kind == "block"}
    holders = holders_of(units)
    assert all(holders[unit.id] == (blocks[unit.path.rpartition(".")[0]],) for unit in channels)


def test_a_narrowed_network_keeps_its_memory_format_and_comes_back(tmp_path):
    model = to_fast_format(tiny_model(hidden=24))
    batch = tiny_samples(4).batch(slice(None))
    unit = Channel().find(model, batch).units[1]
    removals = (Removal(unit, "narrow", tuple(range(1, 17))),)
    student = cut(model, removals)
    conv, norm = student.blocks[1].conv1, student.blocks[1].norm1
    assert (conv.out_channels, norm.num_features, student.blocks[1].conv2.in_channels) == (16, 16, 16)
    assert torch.equal(norm.running_var, model.blocks[1].norm1.running_var[1:17])
    assert student.blocks[1].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    result = Result(
        student,
        Plan(removals, 0.0, 2.0, 1.0, 1.0),
        small_report(input_shape=(3, 8, 8)),
        (),
        open_model(tiny_model(hidden=24)),
    )
    found = load(result.save(tmp_path / "out"), model=tiny_model(hidden=24))
    with evaluating(student), evaluating(found):
        assert torch.allclose(found(batch), student(batch), atol=1e-5)
