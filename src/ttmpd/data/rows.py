"""One sample, or the reason why there is none."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One sample on its way: its value, or the reason why there is none.

    ``notes`` say what was done to a sample that is used all the same.
    """

    name: str
    value: Tensor | None = None
    id: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Indexed:
    """A source of known length: any rows can be loaded without the others."""

    size: int
    load: Callable[[Sequence[int]], list[Row]]


def described(value: Tensor) -> str:
    """Type and shape of a tensor, for messages."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def content_id(content: bytes, shape: Sequence[int] = ()) -> str:
    """A short hash of what a sample holds."""
    digest = hashlib.blake2b(content, digest_size=8)
    if shape:
        digest.update(repr(tuple(shape)).encode())
    return digest.hexdigest()


def load_item(data: Any, i: int, seed: int) -> Any:
    """Item ``i`` of a Dataset, or a row that says why it cannot be read."""
    outer = torch.get_rng_state()
    torch.default_generator.manual_seed(seed + i)  # random transforms repeat; the caller's state is as found
    try:
        return data[i]
    except (OSError, ValueError, SyntaxError) as error:
        return Row(str(i), reason=f"cannot be read ({type(error).__name__}: {error})"[:200])
    finally:
        torch.set_rng_state(outer)


def isolated(data: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate with torch's random state set by ``seed``; the caller's state is as found between the items."""
    inner = torch.Generator().manual_seed(seed).get_state()
    iterator: Iterator[Any] | None = None
    while True:
        outer = torch.get_rng_state()
        torch.set_rng_state(inner)
        try:
            iterator = iter(data) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inner = torch.get_rng_state()
            torch.set_rng_state(outer)
        yield item
