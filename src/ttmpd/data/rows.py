"""One sample, or the reason why there is none."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ttmpd.errors import SamplesError

Named = tuple[str, Any]
"""A sample before it is read: its name, and what the data hold, or a row that says why there is nothing."""


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


class Reader(Protocol):
    """Turns samples into rows for one kind of model: images and values, or text."""

    @property
    def forms(self) -> str:
        """The forms of data that can be opened, for messages."""

    @property
    def rows_at_once(self) -> int:
        """Number of samples of a stream that are read together."""

    def open_path(self, path: Path) -> Indexed:
        """The rows of a file or folder."""

    def rows(self, samples: Sequence[Named]) -> list[Row]:
        """A row for each sample."""

    def samples_of(self, item: Any, batched: bool | None) -> Iterable[Any]:
        """The samples in one item of a stream; ``batched`` is what a DataLoader says of its items, else None."""


def rows_of_array(data: Any, reader: Reader) -> Indexed:
    """The rows of an array, a tensor or a list; a memory-mapped array is read row by row.

    Raises:
        SamplesError: the array has no axis of samples.
    """
    if getattr(data, "ndim", 1) < 1:
        raise SamplesError("an array of samples must have a first axis of samples, but got a single number")
    return Indexed(len(data), lambda index: reader.rows([(str(i), data[i]) for i in index]))


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
    torch.default_generator.manual_seed(seed + i)  # random transforms repeat; the caller's state is restored
    try:
        return data[i]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the owner's own code: an image that is not there shows as any kind of error
        return Row(str(i), reason=f"cannot be read ({type(error).__name__}: {error})"[:200])
    finally:
        torch.set_rng_state(outer)


def isolated(data: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate with torch's random state set by ``seed``; the caller's state is restored between the items."""
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
