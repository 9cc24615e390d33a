"""Models that tools break on: each is compressed, written, loaded into a fresh one, and answers alike."""

import functools
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ttmpd
from compress_cases import QUICK
from ttmpd.errors import ModelError
from ttmpd.latency.table import count_units
from ttmpd.models.run import same_outputs
from ttmpd.pipeline import analysis
from ttmpd.pipeline.adapt import adapt_to
from ttmpd.pipeline.compress import compress

pytestmark = pytest.mark.usefixtures("counted")
CONVOLUTIONS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
SIDES = {1: (24,), 2: (8, 8), 3: (4, 6, 6)}


class Residual(nn.Module):
    """Two convolutions along some axes beside a shortcut."""

    def __init__(self, width: int, axes: int) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[axes]
        self.conv1, self.norm1 = conv(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = conv(width, width, 3, padding=1, bias=False), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """A stem, residual blocks, pooling and a head."""

    def __init__(self, axes: int = 2, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv, norm = CONVOLUTIONS[axes]
        self.stem = nn.Sequential(conv(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        self.blocks = nn.Sequential(*[Residual(width, axes) for _ in range(4)])
        self.head = nn.Linear(width, 5)
        self.axes = axes

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Viewed(Net):
    """Flattens by ``view``, which needs contiguous memory."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.blocks(self.stem(x))
        return self.head(maps.view(maps.size(0), -1))


class Keeping(Net):
    """Keeps its feature map on itself, and in eval mode what it computed from a weight, until it is trained again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.cache = nn.Parameter(torch.ones(16)), {}

    def train(self, mode: bool = True) -> "Keeping":
        if mode:
            self.cache = {}
        return super().train(mode)

    def features(self, x: Tensor) -> Tensor:
        self.last = super().features(x)
        if self.training or "scale" not in self.cache:
            self.cache["scale"] = self.scale * 2
        return self.last * self.cache["scale"]


class Normed(Net):
    """Weight norm on every convolution."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.utils.parametrizations.weight_norm(module)


class Paired(Residual):
    """Answers with a tensor and None, as the layers of DeBERTa do."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Pairs(Net):
    """Unpacks what its blocks answer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Paired(16, 2) for _ in range(4)])

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x, _ = block(x)
        return x.flatten(2).mean(2)


class Noted(Net):
    """Has plain data in its state."""

    def get_extra_state(self) -> dict[str, str]:
        return {"note": "mine"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


class Mlp(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Shared(nn.Module):
    """Four residual MLPs of which two and two share their weights; the first two do little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(192, 24), nn.Linear(24, 5)
        self.blocks = nn.Sequential(*[Mlp() for _ in range(4)])
        for first, second in ((0, 1), (2, 3)):
            self.blocks[second].up.weight = self.blocks[first].up.weight
            self.blocks[second].down.weight = self.blocks[first].down.weight
        with torch.no_grad():
            self.blocks[0].down.weight.mul_(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.flatten(1))))


@pytest.fixture
def counted(operations_for_milliseconds, monkeypatch):
    """Operations in the place of milliseconds, of every width too."""
    monkeypatch.setattr(analysis, "time_units", lambda _model, units, *_, **__: count_units(units))


FACTORIES = {
    "one axis": functools.partial(Net, 1),
    "three axes": functools.partial(Net, 3),
    "view": Viewed,
    "keeps tensors": Keeping,
    "weight norm": Normed,
    "pairs": Pairs,
    "plain data": Noted,
    "shared weights": Shared,
}


def inputs_for(model: nn.Module, n: int = 40) -> Tensor:
    sides = SIDES[getattr(model, "axes", 2)]
    return torch.rand(n, 3, *sides, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("actions", [("drop", "linear", "narrow"), ("linear",)], ids=["all", "linear"])
@pytest.mark.parametrize("name", FACTORIES)
def test_the_artifact_in_a_fresh_model_is_the_result(name, actions, tmp_path):
    factory = FACTORIES[name]
    model = factory().eval()
    x = inputs_for(model)
    with torch.no_grad():
        before = model(x)
    result = compress(model, x, macs=0.7, output=tmp_path / "out", adapt="none", **QUICK | {"actions": actions})
    assert result.plan.removals
    with torch.no_grad():
        assert torch.equal(model(x), before)  # the original is as it was
        expected = result.model(x)
        loaded = ttmpd.load(tmp_path / "out", model=factory())
        assert same_outputs(loaded(x), expected, 1e-6)
    if name in ("one axis", "three axes"):
        wider = F.pad(x, (0, 3))
        with torch.no_grad():
            assert result.model(wider).shape == model(wider).shape  # every size that the original takes


def test_shared_weights_stay_shared(tmp_path):
    settings = QUICK | {"units": ("block",), "actions": ("drop",), "adapt": "none"}
    result = compress(Shared(), inputs_for(Shared()), macs=0.85, **settings)
    assert len(result.plan.removals) == 1
    names = [name for name, _ in result.model.named_parameters(remove_duplicate=False)]
    assert len(list(result.model.parameters())) == len(names) - 2


class Centered(Net):
    """Divides by the deviation of the picture: a picture of one color becomes NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("adapter", ["none", "norm"])
def test_samples_on_which_the_model_answers_nan_are_left_out_and_listed(adapter, tmp_path):
    x = inputs_for(Centered())
    x[0] = x[7] = x[33] = 0.5
    result = compress(Centered(), x, macs=0.7, output=tmp_path / "out", adapt=adapter, **QUICK)
    names = sorted(name for name, reason in result.report.samples.skipped if "NaN" in reason)
    assert names == ["0", "33", "7"]
    assert torch.isfinite(result.model(x[1:5])).all()
    assert [row[0] for row in json.loads((tmp_path / "out" / "report.json").read_text())["samples"]["skipped"]]
    adapted = adapt_to(Centered(), x, adapt=adapter, num_samples=40, batch_size=8)
    assert len(adapted.report.samples.skipped) == 3
    assert torch.isfinite(adapted.model(x[1:5])).all()


def test_a_model_that_answers_nan_to_everything_is_refused():
    with pytest.raises(ModelError, match="for every sample"):
        compress(Centered(), torch.full((40, 3, 8, 8), 0.5), macs=0.7, **QUICK)


def test_a_model_that_draws_at_random_in_eval_mode_is_refused():
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.features(x), 0.3))

    with pytest.raises(ModelError, match="answer alike when it is asked twice"):
        compress(Random(), inputs_for(Random()), macs=0.7, **QUICK)


@pytest.mark.parametrize("run", [compress, adapt_to], ids=["compress", "adapt"])
def test_inputs_that_do_not_fit_are_refused_in_our_words(run):
    settings = QUICK if run is compress else {"num_samples": 40, "batch_size": 8}
    target = {"macs": 0.7} if run is compress else {}
    with pytest.raises(ModelError, match="must run on a batch of shape"):
        run(Net(), torch.rand(40, 1, 8, 8), **target, **settings)
