"""Text files as they lie on disk: a sample a line (.txt), tables (.tsv, .csv) and JSON, all of them also .gz."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttmpd.data.files import files_below
from ttmpd.errors import SamplesError

SUFFIXES = frozenset({".txt", ".tsv", ".csv", ".jsonl", ".json"})
FORMS = (
    "a .txt, .tsv, .csv, .jsonl or .json file (.gz, too), a folder of .txt files, a list of strings, a Dataset, a "
    "DataLoader or an iterable of them"
)
COLUMNS = ("sentence", "text", "input_ids")
"""Columns that hold the text, or the ids of its tokens, wherever they are."""
_OTHERS = ("label", "labels", "idx", "id", "index", "file", "")
_LOOKED_AT = 100  # rows that tell a column of text from one of numbers


@dataclass(frozen=True, slots=True)
class Table:
    """Rows with named values.

    Args:
        source: name of the file, for messages.
        columns: their names.
        rows: a mapping for each row, or the reason why it has none.
    """

    source: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any] | str, ...]

    def text_column(self) -> str:
        """The column that holds the text: ``sentence``, ``text``, or the only one that holds words.

        Raises:
            SamplesError: there is none, or more than one.
        """
        by_name = {name.strip().lower(): name for name in reversed(self.columns)}
        named = next((by_name[name] for name in COLUMNS if name in by_name), None)
        if named is not None:
            return named
        first_rows = [row for row in self.rows if isinstance(row, Mapping)][:_LOOKED_AT]
        words = [name for name in self.columns if any(_is_words(row.get(name)) for row in first_rows)]
        left = [name for name in words if name.strip().lower() not in _OTHERS]
        if len(left) == 1:
            return left[0]
        raise SamplesError(
            f"{self.source} must have a column 'sentence' or 'text', or only one column of text, but has the columns "
            f"{list(self.columns)}; rename the one to read"
        )


def kind_of(path: Path) -> str:
    """The suffix of a text file, one of ``SUFFIXES``, without .gz; "" for any other file."""
    ends = [suffix.lower() for suffix in path.suffixes]
    last = ends[-2] if len(ends) > 1 and ends[-1] == ".gz" else ends[-1] if ends else ""
    return last if last in SUFFIXES else ""


def text_files(folder: Path) -> tuple[str, ...]:
    """Paths of all .txt files below ``folder``: see :func:`ttmpd.data.files.files_below`."""
    return files_below(folder, lambda name: kind_of(Path(name)) == ".txt")


def read_text(path: Path) -> str:
    """The text of a file, unpacked; bytes that are no UTF-8 become the character U+FFFD.

    Raises:
        SamplesError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise SamplesError(f"{path.name} must be a whole file of text, but got {error}; copy it again") from error
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets write it
    return content.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def read_table(path: Path) -> Table:
    """The rows of a text file; a .txt file has one column, ``text``, and no line of names.

    Raises:
        SamplesError: it cannot be read, or does not name its columns.
    """
    kind, text = kind_of(path), read_text(path)
    if kind == ".txt":
        return Table(path.name, ("text",), tuple({"text": line} for line in _lines(text)))
    if kind in (".jsonl", ".json"):
        rows = tuple(map(_from_json, _lines(text))) if kind == ".jsonl" else _from_list(path.name, text)
        columns = dict.fromkeys(name for row in rows[:_LOOKED_AT] if isinstance(row, Mapping) for name in row)
        return Table(path.name, tuple(columns), rows)
    # Quotes in a .tsv are characters like any other, as in the files of GLUE.
    records = (line.split("\t") for line in _lines(text)) if kind == ".tsv" else _quoted(text)
    return _with_names(path.name, records)


def _lines(text: str) -> list[str]:
    """The lines, the last one without its end; unlike ``splitlines``, which also breaks at characters within them."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else lines


def _from_json(line: str) -> Mapping[str, Any] | str:
    try:
        return _row_of(json.loads(line) if line.strip() else {})
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error})"[:200]


def _from_list(source: str, text: str) -> tuple[Mapping[str, Any] | str, ...]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplesError(f"{source} must be JSON, but is not ({str(error)[:200]}); save it again") from error
    if not isinstance(content, list):
        raise SamplesError(f"{source} must hold a list of samples, but holds a {type(content).__name__}")
    return tuple(map(_row_of, content))


def _row_of(value: Any) -> Mapping[str, Any] | str:
    """An object as it is; a text, or a list of token ids, as the only value of its row."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value and all(isinstance(number, int) for number in value):
        return {"input_ids": value}
    return value if isinstance(value, Mapping) else f"must be a JSON object, but is a {type(value).__name__}"


def _quoted(text: str) -> Iterator[list[str] | str]:
    reader = csv.reader(io.StringIO(text, newline=""))
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"is no row of a .csv file ({error})"


def _with_names(source: str, records: Iterator[list[str] | str]) -> Table:
    columns = next(records, [])
    if isinstance(columns, str) or any(_is_number(name) or len(name) > 100 for name in columns):
        raise SamplesError(
            f"the first line of {source} must name the columns, but is {str(columns)[:200]}; add such a line"
        )
    rows = (record if isinstance(record, str) else dict(zip(columns, record, strict=False)) for record in records)
    return Table(source, tuple(columns), tuple(rows))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _is_number(value)


def numbered(n_rows: int) -> tuple[str, ...]:
    """Names of rows: "0", "1", ... as for arrays."""
    return tuple(map(str, range(n_rows)))
