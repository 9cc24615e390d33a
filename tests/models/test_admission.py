"""What a module must be: wrappers are taken off, computed weights made plain, what has no plain weights is refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.models.admission import admitted
from ttmpd.models.modules import clone
from ttmpd.models.open import open_model
from ttmpd.testing.tiny_models import tiny_model


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_an_ordinary_module_is_taken_as_it_is():
    model = net()
    assert admitted(model) is model


@pytest.mark.parametrize("wrap", [
    lambda model: torch.compile(model, backend="eager"),
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
    lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
])  # fmt: skip
def test_wrappers_are_taken_off_with_a_word(wrap, caplog):
    inner = admitted(wrap(net()))
    assert type(inner) is nn.Sequential
    assert "is taken off: the Sequential in it is used" in caplog.text
    assert open_model(wrap(net())).module.state_dict().keys() == net().state_dict().keys()


def pruned(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_unstructured(model[0], "weight", amount=0.3)
    return model


def each(function):
    def apply(model: nn.Module) -> nn.Module:
        for layer in (model[0], model[2]):
            function(layer)
        return model

    return apply


@pytest.mark.parametrize("compute", [
    each(torch.nn.utils.weight_norm), each(parametrizations.weight_norm), each(torch.nn.utils.spectral_norm),
    each(parametrizations.spectral_norm), each(parametrizations.orthogonal), pruned,
], ids=["weight norm", "weight norm, new", "spectral norm", "spectral norm, new", "orthogonal", "pruning"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights_become_plain_ones(compute, caplog):
    model = compute(net()).eval()
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(X)
    plain = admitted(model)
    with torch.no_grad():
        assert torch.allclose(plain(X), expected, atol=1e-6)
        assert torch.equal(model(X), expected)
    assert list(model.state_dict()) == names  # the one that was passed in stays
    assert sorted(plain.state_dict()) == sorted(net().state_dict())
    assert isinstance(plain[0].weight, nn.Parameter)
    assert "computes weights from others" in caplog.text
    assert sorted(clone(plain).state_dict()) == sorted(net().state_dict())
    changed = clone(plain)
    with torch.no_grad():
        changed[0].weight.zero_()
    assert not torch.allclose(changed(X), expected)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, torch.qint8)


def without_weights() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Flatten())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("make", "error", "words"), [
    (on_meta, ModelError, "load the weights first"),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(3)), ModelError, "run the model once"),
    (quantised, UnsupportedError, "then quantise"),
    (lambda: torch.jit.trace(net(), X), UnsupportedError, "TorchScript"),
    (lambda: net().bfloat16(), ModelError, r"model\.float\(\)"),
    (lambda: net().double(), ModelError, r"\.to\(torch\.float64\)"),
    (without_weights, ModelError, "floating-point weights, but has none"),
], ids=["meta", "lazy", "quantised", "script", "bfloat16", "float64", "no weights"])  # fmt: skip
def test_what_cannot_be_worked_on_is_refused_with_the_next_step(make, error, words):
    with pytest.raises(error, match=words):
        open_model(make())


def test_a_copy_leaves_behind_the_graph_of_tensors_that_the_model_keeps():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.cache = net(), {}

        def forward(self, x):
            self.last = self.body(x)
            self.cache["nested"] = [self.last * 2]
            return self.last

    model = Keeps()
    model(X)
    copy = clone(model)
    assert copy.last.grad_fn is None and copy.cache["nested"][0].grad_fn is None
    assert torch.equal(copy.last, model.last) and copy.last is not model.last
    assert model.last.grad_fn is not None


def test_weights_are_copied_with_everything_else():
    model = tiny_model()
    copy = clone(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
