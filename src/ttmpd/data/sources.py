"""The kinds of data that can be opened: a new one is a line in ``SOURCES``, for images and texts alike."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ttmpd.data.files import is_labelled
from ttmpd.data.images import ImageReader
from ttmpd.data.preprocessing import Preparation
from ttmpd.data.rows import Indexed, Reader, Row, isolated, load_item, rows_of_array
from ttmpd.data.texts import TextReader
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import SamplesError


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of data.

    Args:
        recognises: true for data of this kind; the first kind that recognises the data is taken.
        opens: returns the rows of (data, reader, seed): indexed where their number is known, else a stream. The reader
            turns samples into rows for the model.
    """

    recognises: Callable[[Any], bool]
    opens: Callable[[Any, Reader, int], Indexed | Iterator[Row]]


def open_rows(data: Any, preparation: Preparation | None, seed: int) -> Indexed | Iterator[Row]:
    """The rows of ``data``, prepared for a model: indexed where their number is known, else a stream.

    Raises:
        SamplesError: no source recognises the data.
    """
    reader: Reader = TextReader(preparation) if isinstance(preparation, Tokenization) else ImageReader(preparation)
    for source in SOURCES:
        if source.recognises(data):
            return source.opens(data, reader, seed)
    raise SamplesError(f"data must be {reader.forms}, but got {type(data).__name__}")


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and is_labelled(*data)


def _is_dataset(data: Any) -> bool:
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset) and isinstance(data, Sized)


def _is_strings(data: Any) -> bool:
    return isinstance(data, list | tuple) and all(isinstance(item, str) for item in data)


def _is_iterable(data: Any) -> bool:
    return isinstance(data, Iterable) and not isinstance(data, Mapping | bytes)


def _dataset(data: Any, reader: Reader, seed: int) -> Indexed:
    return Indexed(len(data), lambda index: reader.rows([(str(i), load_item(data, i, seed)) for i in index]))


def _stream(data: Iterable[Any], reader: Reader, seed: int) -> Iterator[Row]:
    batched = data.batch_sampler is not None or data.batch_size is not None if isinstance(data, DataLoader) else None
    samples = chain.from_iterable(reader.samples_of(item, batched) for item in isolated(data, seed))
    named = ((str(i), sample) for i, sample in enumerate(samples))
    while batch := list(islice(named, reader.rows_at_once)):
        yield from reader.rows(batch)


SOURCES = [
    Source(
        lambda data: isinstance(data, str | Path), lambda data, reader, _: reader.open_path(Path(data).expanduser())
    ),
    Source(_is_pair, lambda data, reader, _: rows_of_array(data[0], reader)),
    Source(lambda data: isinstance(data, Tensor | np.ndarray), lambda data, reader, _: rows_of_array(data, reader)),
    Source(_is_strings, lambda data, reader, _: rows_of_array(data, reader)),
    Source(_is_dataset, _dataset),
    Source(_is_iterable, _stream),
]
"""The kinds of data, in the order in which they are tried."""
