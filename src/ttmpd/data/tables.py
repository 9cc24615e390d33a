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
    records = (line.split("\t") for line in _lines(text)) if kind == ".tsv" else _quoted(path.name, text)
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


SEPARATORS = (",", ";", "\t", "|")
"""What may stand between the values of a .csv file."""


def _quoted(source: str, text: str) -> Iterator[list[str] | str]:
    """The rows of a .csv file, separated as its first line is.

    Raises:
        SamplesError: a quote is opened that nothing closes, so that all that follows would be one value.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text))
    while True:
        first_line = reader.line_num
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"is no row of a .csv file ({error})"
            continue
        if reader.line_num - first_line > 1:
            _check_closed(source, text, first_line, reader)
        yield record


def _separator(text: str) -> str:
    """The separator that makes most columns of the first line; a comma where several do."""
    first_line = text.split("\n", 1)[0]

    def n_columns(separator: str) -> int:
        return max((len(row) for row in csv.reader([first_line], delimiter=separator)), default=0)

    return max(SEPARATORS, key=n_columns)


def _check_closed(source: str, text: str, first_line: int, reader: Any) -> None:
    """Raise where a row of several lines ends with the file, in the middle of a quoted value."""
    lines = io.StringIO(text, newline="").readlines()[first_line : reader.line_num]
    try:
        list(csv.reader(lines, reader.dialect, strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise SamplesError(
                f"every quote in {source} must be closed, but one in line {first_line + 1} is not: the {len(lines)} "
                "lines from there on would be one value; close it, or double the quotes that are meant as characters"
            ) from None


def _with_names(source: str, records: Iterator[list[str] | str]) -> Table:
    columns = next(records, [])
    if isinstance(columns, str) or any(_is_number(name) or len(name) > 100 for name in columns):
        raise SamplesError(
            f"the first line of {source} must name the columns, but is {str(columns)[:200]}; add such a line"
        )
    if source.removesuffix(".gz").endswith(".tsv") and len(columns) == 1 and any(map(columns[0].__contains__, ",;|")):
        raise SamplesError(
            f"the values of {source} must be separated by tabs, but its first line is one name, {columns[0][:200]!r}; "
            "rename it to .csv"
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
