"""One forward pass, noted."""

import torch
from torch import Tensor, nn

from ttmpd.models.trace import trace
from ttmpd.testing.tiny_models import assert_untouched, tiny_model


class Shared(nn.Module):
    """A layer under two names, called twice; a list that goes on growing; writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.join = Join()
        self.clip = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        joined = self.join(parts)
        parts.append(self.again(joined))
        return self.clip(parts[-1])


class Join(nn.Module):
    """Sums a list."""

    def forward(self, parts: list[Tensor], scale: float = 1.0) -> Tensor:
        """The sum."""
        return torch.stack(parts).sum(0) * scale


def test_calls_are_noted_in_the_order_in_which_they_begin():
    net = Shared().eval()
    notes = trace(net, torch.ones(2, 4))
    assert notes.order == ("", "first", "again", "join", "first", "again", "clip")
    assert [len(calls) for calls in notes.by_path().values()] == [1, 2, 1, 1]
    assert list(notes.once()) == ["", "join", "clip"]
    assert torch.equal(notes.output, net(torch.ones(2, 4)))


def test_paths_choose_modules_under_any_name():
    notes = trace(Shared().eval(), torch.ones(2, 4), paths={"again"})
    assert [call.path for call in notes.calls] == ["first", "first"]


def test_arguments_stay_as_they_were_given():
    join = trace(Shared().eval(), torch.ones(2, 4), values=True).once()["join"]
    assert len(join.args[0]) == 1, "the model fills the list after the call"
    assert join.input is None, "a list is no tensor"
    assert join.output is not None and join.output.value is join.result


def test_values_are_let_go_unless_they_are_asked_for():
    for call in trace(Shared().eval(), torch.ones(2, 4)).calls:
        assert call.args == () and call.result is None
        assert call.output is not None and call.output.value is None and call.output.node is None


def test_writes_are_counted_and_shapes_and_bytes_noted():
    clip = trace(Shared().eval(), torch.ones(2, 4)).once()["clip"]
    assert clip.input is not None and clip.input.n_writes == 1
    assert clip.input.shape == (2, 4) and clip.input.n_bytes == 2 * 4 * 4 and clip.is_plain


def test_gradients_give_every_tensor_a_node_and_leave_the_model_alone():
    net, batch = tiny_model(), torch.ones(2, 3, 8, 8)
    with assert_untouched(net):
        notes = trace(net, batch, gradients=True)
    assert all(call.input is None or call.input.node is not None for call in notes.calls)


def test_notes_are_taken_while_the_values_are_as_they_were():
    notes = trace(Shared().eval(), torch.ones(2, 4), note=lambda _m, _a, output: float(output.min()))
    assert [call.note for call in notes.calls][-1] >= 0, "clipped"
    assert len({call.note for call in notes.calls}) > 1


def test_a_call_that_ends_in_an_exception_leaves_no_note():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = Fails(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.fails(x)
            except ValueError:
                return self.works(x)

    assert trace(Tries().eval(), torch.ones(1, 4)).order == ("", "works")
