"""Parts of a model run one by one, on what the model gives them."""

import torch
from torch import nn

from ttmpd.modules import first_tensor
from ttmpd.records import Samples
from ttmpd.running import Parts, tensors_in


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
    return Parts(model, paths, samples, 4, torch.device("cpu"))


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
    assert parts().most_values == 4
