"""Parts of a model run one by one, on what the model gives them."""

import pytest
import torch
from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.models.run import first_tensor
from ttmpd.repair.runner import ModuleRunner, tensors_in


class Body(nn.Module):
    """Three layers in a row, the last one behind a function; counts how often it is run as a whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.c(self.b(self.a(x)).relu())


def parts(paths=("a", "b", "c")):
    model, samples = Body().eval(), Samples(torch.randn(10, 3), tuple(map(str, range(10))))
    return ModuleRunner(model, paths, samples, 4, torch.device("cpu"))


def given(made, path):
    with torch.no_grad():
        return torch.cat([first_tensor(args) for args, _ in made.calls(path)])


def test_parts_are_given_what_the_model_gives_them():
    made = parts()
    x = made.samples.inputs
    with torch.no_grad():
        assert torch.allclose(given(made, "a"), x)
        assert torch.allclose(given(made, "b"), made.model.a(x))
        assert torch.allclose(given(made, "c"), made.model.b(made.model.a(x)).relu())


def test_a_change_of_an_earlier_part_is_seen_by_the_later_ones():
    made = parts()
    given(made, "a")
    with torch.no_grad():
        made.model.a.bias += 1
        assert torch.allclose(given(made, "b"), made.model.a(made.samples.inputs))


def test_the_model_is_not_run_for_what_directly_follows():
    made = parts()
    given(made, "a")
    before = made.model.runs
    given(made, "b")
    assert made.model.runs == before + 1  # a batch of two, for the form of the call
    given(made, "c")  # a function lies between
    assert made.model.runs == before + 1 + 3


class Masked(nn.Module):
    """Layers that are given a mask beside the output of the one before; counts how often it is run as a whole."""

    def __init__(self, extra=lambda mask: mask, ids=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 3) if ids else nn.Identity()
        self.a, self.b = MaskedLayer(), MaskedLayer()
        self.extra, self.runs = extra, 0

    def forward(self, x):
        self.runs += 1
        mask = (x > 0).float() if x.dtype == torch.int64 else (x.sum(-1) > 0).float()
        return self.b(self.a(self.embed(x), mask=mask), mask=self.extra(mask)).sum(1)


class MaskedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, mask=None):
        scale = mask.values if isinstance(mask, Cache) else mask
        if scale is None:
            return self.layer(x)
        return self.layer(x) * (scale if isinstance(scale, int) else scale[..., None])


class Cache:
    """Remembers a batch, and is no tensor."""

    def __init__(self, values) -> None:
        self.values = values


def masked(extra=lambda mask: mask, inputs=None, padding=None):
    torch.manual_seed(1)
    inputs = torch.randn(10, 5, 3) if inputs is None else inputs
    model = Masked(extra, ids=padding is not None).eval()
    samples = Samples(inputs, tuple(map(str, range(len(inputs)))), padding=padding)
    return ModuleRunner(model, ("a", "b"), samples, 4, torch.device("cpu"))


def test_a_mask_that_all_layers_are_given_does_not_send_back_through_the_model():
    made = masked()
    with torch.no_grad():
        made.calls("a")
        made.model.a.layer.bias += 1  # as if it had been fitted
        before, calls = made.model.runs, made.calls("b")
        assert made.model.runs == before + 1
        answer = torch.cat([made.run("b", call).sum(1) for call in calls])
        assert torch.allclose(answer, made.model(made.samples.inputs))


@pytest.mark.parametrize(
    "extra", [lambda mask: mask * 2, lambda mask: mask.mul_(2), Cache], ids=["another", "written into", "no tensor"]
)
def test_what_the_layer_before_was_not_given_comes_from_the_model(extra):
    made = masked(extra)
    with torch.no_grad():
        made.calls("a")
        before, calls = made.model.runs, made.calls("b")
        assert made.model.runs == before + 3
        answer = torch.cat([made.run("b", call).sum(1) for call in calls])
        assert torch.allclose(answer, made.model(made.samples.inputs))


def test_a_number_that_may_be_the_length_of_a_text_comes_from_the_model():
    ids = torch.tensor([[1, 2, 3, 4, 5]] * 4 + [[1, 2, 0, 0, 0]] * 4)
    made = masked(lambda mask: mask.shape[1], ids, padding=0)
    with torch.no_grad():
        made.calls("a")
        given = [call[1]["mask"] for call in made.calls("b")]
    assert given == [5, 2]
    assert masked(lambda mask: mask.shape[1])._predecessors  # images are of one size


def test_a_call_of_another_form_comes_from_the_model():
    ids = torch.tensor([[1, 2, 0, 0, 0], *[[1, 2, 3, 0, 0]] * 3, *[[1, 2, 3, 4, 5]] * 4])  # the last four need no mask

    class MaskedWhereNeeded(Masked):
        def forward(self, x):
            mask = (x > 0).float() if bool((x == 0).any()) else None
            return self.b(self.a(self.embed(x), mask=mask), mask=mask).sum(1)

    model, samples = MaskedWhereNeeded(ids=True).eval(), Samples(ids, tuple("abcdefgh"), padding=0)
    made = ModuleRunner(model, ("a", "b"), samples, 4, torch.device("cpu"))
    with torch.no_grad():
        made.calls("a")
        calls = made.calls("b")
        assert [call[1]["mask"] is None for call in calls] == [False, True]
        for call, batch in zip(calls, samples.batches(4), strict=True):
            assert torch.allclose(made.run("b", call).sum(1), model(batch))


def test_the_whole_model_may_be_a_part():
    made = parts(("",))
    assert torch.equal(given(made, ""), made.samples.inputs)
    with torch.no_grad():
        answer = torch.cat([made.run("", call) for call in made.calls("")])
        assert torch.equal(answer, made.model(made.samples.inputs))


def test_a_part_that_writes_into_its_input_does_so_in_a_copy():
    class Writes(nn.Module):
        def forward(self, x):
            return x.add_(1)

    made = parts(("a",))
    made.model.a = Writes()
    calls = made.calls("a")
    first = tensors_in(calls[0])[0].clone()
    made.run("a", calls[0])
    assert torch.equal(tensors_in(calls[0])[0], first)


def test_the_largest_input_is_known():
    assert parts().max_input_values == 4
