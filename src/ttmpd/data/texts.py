"""Text, one sample at a time: each is a row of token ids, or the reason why there is none."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttmpd.data.files import SUFFIXES, image_files, read_array
from ttmpd.data.rows import Indexed, Named, Row, content_id, rows_of_array
from ttmpd.data.tables import COLUMNS, FORMS, kind_of, numbered, read_table, read_text, text_files
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import SamplesError

UNDECODABLE = "held bytes that are no UTF-8"


def cut_note(tokenization: Tokenization) -> str:
    """The note on texts of which the model reads only the beginning."""
    return f"longer than {tokenization.max_length} tokens, of which the first were read"


@dataclass(frozen=True, slots=True)
class TextReader:
    """Reads text, and token ids, for a model with this tokenization."""

    tokenization: Tokenization
    forms: str = FORMS
    rows_at_once: int = 256  # they are handed to the tokenizer together

    def open_path(self, path: Path) -> Indexed:
        """The rows of a folder of texts, of a table, or of an array file.

        Raises:
            SamplesError: it is none of them.
        """
        return _open_path(path, self)

    def rows(self, samples: Sequence[Named]) -> list[Row]:
        """A row for each sample."""
        return _encoded(samples, self.tokenization)

    def samples_of(self, item: Any, batched: bool | None) -> Iterable[Any]:
        """The samples in one item of a stream; the item itself shows whether it is a batch."""
        return _samples_of(item)


def _open_path(path: Path, reader: TextReader) -> Indexed:
    if path.is_dir():
        names = text_files(path)
        if not names and image_files(path):
            raise SamplesError(f"a text model must be given text, but {str(path)!r} holds images; pass {FORMS}")
        return _indexed(names, lambda i: _whole_file(path, names[i]), reader)
    if path.is_file() and kind_of(path):
        table = read_table(path)
        column = table.text_column()
        return _indexed(numbered(len(table.rows)), lambda i: _cell(i, table.rows[i], column), reader)
    if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        return rows_of_array(read_array(path), reader)
    problem = f"{str(path)!r} does not exist"
    if path.is_file():
        problem = f"got {'an image' if path.suffix.lower() in SUFFIXES else 'another kind of file'}, {str(path)!r}"
    raise SamplesError(f"data of a text model must be {FORMS}, but {problem}; check the path")


def _whole_file(folder: Path, name: str) -> Any:
    try:
        return read_text(folder / name)
    except SamplesError as error:
        return Row(name, reason=f"cannot be read ({error})"[:200])


def _cell(number: int, row: Mapping[str, Any] | str, column: str) -> Any:
    if isinstance(row, str):
        return Row(str(number), reason=row)
    value = row.get(column, "")
    if not isinstance(value, str | list):
        return Row(str(number), reason=f"{column} must be text, but is {type(value).__name__}")
    return value


def _indexed(names: Sequence[str], item: Callable[[int], Any], reader: TextReader) -> Indexed:
    return Indexed(len(names), lambda index: reader.rows([(names[i], item(i)) for i in index]))


def _samples_of(item: Any) -> Iterable[Any]:
    """The samples in one item of a stream: a list of texts and a matrix of ids are batches, labels beside them are not.

    A tuple that begins with a text is one sample with its label.
    """
    value = _named(item) if isinstance(item, Mapping) else item
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str | int | np.integer):
        value = value[0]  # a batch of texts or ids, then labels
    batch = isinstance(value, list) or (isinstance(value, tuple) and value is not item)
    if batch and value and isinstance(value[0], str):
        return list(value)
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 2:
        return value
    return [item]


def _named(item: Mapping[Any, Any]) -> Any:
    """The text or the ids among named values."""
    return next((item[key] for key in COLUMNS if key in item), item)


def _first(item: Any) -> Any:
    """The first text in a nested item, or the first token ids; labels come after it and are ignored."""
    if isinstance(item, str | Row | Tensor | np.ndarray | np.generic):
        return item
    if isinstance(item, Mapping):
        named = _named(item)
        item = list(item.values()) if named is item else [named]
    if isinstance(item, Sequence) and not isinstance(item, bytes):
        if item and all(isinstance(number, int) for number in item):
            return torch.tensor(item)
        return next((value for value in map(_first, item) if value is not None), None)
    return None


def _encoded(samples: Sequence[Named], tokenization: Tokenization) -> list[Row]:
    """A row for each sample; the texts among them go through the tokenizer together."""
    values = [_first(item) for _, item in samples]
    texts = {i: value.strip() for i, value in enumerate(values) if isinstance(value, str) and value.strip()}
    tokens = dict(zip(texts, tokenization.encode(list(texts.values())), strict=True))
    rows = []
    for i, ((name, item), value) in enumerate(zip(samples, values, strict=True)):
        if i in texts:
            rows.append(_from_text(name, texts[i], *tokens[i], tokenization))
        elif isinstance(value, Row):
            rows.append(value)
        elif isinstance(value, str):
            rows.append(Row(name, reason="is empty"))
        elif value is None:
            rows.append(Row(name, reason=f"holds no text, but {type(item).__name__}"))
        else:
            rows.append(_from_ids(name, value, tokenization))
    return rows


def _from_text(name: str, text: str, ids: Tensor, cut: bool, tokenization: Tokenization) -> Row:
    if not len(_unpadded(ids, tokenization.padding)):
        return Row(name, reason="holds no tokens")
    notes = [cut_note(tokenization)] if cut else []
    notes += [UNDECODABLE] if "\ufffd" in text else []
    # The id is that of the text, so it does not depend on tokenizer and length.
    return Row(name, ids, content_id(text.encode("utf-8", "surrogatepass")), notes=tuple(notes))


def _from_ids(name: str, value: Tensor | np.ndarray | np.generic, tokenization: Tokenization) -> Row:
    """One sample from token ids, possibly padded."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype.itemsize < 2:  # single bytes are pixels
        return Row(name, reason=f"is {array.dtype} {array.shape}, but must be text or token ids")
    ids = _unpadded(torch.from_numpy(array.astype(np.int64)), tokenization.padding)
    if not len(ids) or int(ids.min()) < 0:
        return Row(name, reason="holds no tokens" if not len(ids) else "holds negative token ids")
    notes = (cut_note(tokenization),) if len(ids) > tokenization.max_length else ()
    return Row(name, ids[: tokenization.max_length].clone(), content_id(ids.numpy().tobytes()), notes=notes)


def _unpadded(ids: Tensor, padding: int) -> Tensor:
    """Without the padding at either end."""
    places = (ids != padding).nonzero()
    return ids[int(places[0]) : int(places[-1]) + 1] if len(places) else ids[:0]
