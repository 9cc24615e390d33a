"""A second device where there is none: tensors on the CPU that say they are elsewhere.

Code that mixes devices fails only where there are two. :func:`pretended` makes every machine such a one: tensors that
are sent to ``DEVICE`` stay where they are and bear its name, and what joins them with a tensor of the CPU raises the
error that a GPU raises. What is computed is computed on the CPU, so the values are those of the CPU.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_T: Any = Tensor  # as its descriptors are known at run time alone
_MOVES = {_T.to, _T.cuda, _T.cpu}
_FREE = {_T.copy_, _T.__repr__, _T.__hash__, torch._has_compatible_shallow_copy_type}
"""What may join two devices, and what is no computation."""
_INDEXING = {_T.__getitem__, _T.__setitem__}
_ON_CPU = {_T.numpy, _T.__array__}


class _Pretending(TorchFunctionMode):
    """Knows where every tensor says it is; one it has not met is on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Any = WeakIdKeyDictionary()

    def place(self, tensor: Tensor) -> torch.device:
        return cast(torch.device, self.places.get(tensor, _CPU))

    def put(self, found: Any, place: torch.device) -> Any:
        for tensor in _tensors(found):
            self.places[tensor] = place
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func == _T.device.__get__:
            return self.place(args[0])
        if func == _T.is_cuda.__get__:
            return self.place(args[0]).type == DEVICE.type
        if func == _T.grad.__get__:
            return self.put(func(*args), self.place(args[0]))
        if func == _T.data.__set__:
            self.places[args[0]] = self.place(args[1])
            return func(*args)
        if func in _MOVES:
            return self._moved(func, args, given)
        return self._computed(func, args, given)

    def _moved(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """``Tensor.to`` and its kin: the values stay, a copy bears the other name."""
        tensor, *rest = args
        if func is not _T.to:
            return self._elsewhere(tensor, tensor, _CPU if func is _T.cpu else DEVICE)
        target = self.place(tensor)
        for value in (*rest, *given.values()):
            if isinstance(value, Tensor):
                target = self.place(value)
            elif isinstance(value, torch.device | str):
                target = torch.device(value)
        found = tensor.to(*map(_here, rest), **{key: _here(value) for key, value in given.items()})
        return self._elsewhere(tensor, found, target)

    def _elsewhere(self, before: Tensor, found: Tensor, target: torch.device) -> Tensor:
        if found is before and target.type == self.place(before).type:
            return before
        return cast(Tensor, self.put(found.clone() if found is before else found, target))

    def _computed(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Anything else: it answers where its arguments are, or where it is told to."""
        place = self._common(func, args, given)
        if given.get("device") is not None:
            place = torch.device(given["device"])
            given["device"] = _CPU
        if given.get("generator") is not None and place.type != "cpu":
            raise RuntimeError(f"Expected a {place} device type for the generator of {func}, but found cpu")
        return self.put(func(*args, **given), place)

    def _common(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> torch.device:
        if func in _FREE or (func in _INDEXING and self.place(args[0]).type != "cpu"):
            return self.place(args[0])  # an index may lie on the CPU
        # So may a single number.
        places = {self.place(t).type for t in _tensors((args, given)) if t.dim() or self.place(t).type != "cpu"}
        if func in _ON_CPU and DEVICE.type in places:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy; use Tensor.cpu() first")
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {sorted(places)}")
        return DEVICE if DEVICE.type in places else _CPU


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _here(value: Any) -> Any:
    """A device as the CPU; anything else as it is."""
    return _CPU if isinstance(value, torch.device | str) else value


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """Within, there is a second device, which is answered."""
    mode = _Pretending()
    made = nn.Parameter.__new__

    def parameter(cls: type, data: Any = None, *args: Any, **settings: Any) -> Any:
        found: Any = made(cls, data, *args, **settings)
        return found if data is None else mode.put(found, mode.place(data))

    memory = mock.Mock(total_memory=1 << 32)
    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "get_device_properties", lambda *_: memory),
            (torch.cuda, "get_device_name", lambda *_: "a pretended device"),
            (nn.Parameter, "__new__", parameter),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        stack.enter_context(mode)
        yield DEVICE
