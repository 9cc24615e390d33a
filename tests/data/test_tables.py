"""Tables as spreadsheets write them: other separators, quotes, and quotes that nobody closes."""

from pathlib import Path

import pytest

from ttmpd.data.tables import read_table
from ttmpd.errors import SamplesError


def table(folder: Path, text: str, name: str = "rows.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_table(path)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_values_are_separated_as_the_first_line_is(tmp_path, separator):
    text = separator.join(("id", "text", "label")) + "\n" + separator.join(("1", '"dull, but: long; really"', "0"))
    rows = table(tmp_path, text)
    assert rows.columns == ("id", "text", "label")
    assert rows.rows == ({"id": "1", "text": "dull, but: long; really", "label": "0"},)
    assert rows.text_column() == "text"


def test_decimal_commas_stay_in_their_value(tmp_path):
    rows = table(tmp_path, "id;text;bewertung\n1;gut, sehr gut;4,5\n")
    assert rows.rows == ({"id": "1", "text": "gut, sehr gut", "bewertung": "4,5"},)


def test_a_tsv_without_tabs_is_refused(tmp_path):
    with pytest.raises(SamplesError, match=r"separated by tabs.*'text;label'.*rename it to \.csv"):
        table(tmp_path, "text;label\ndull;0\n", "rows.tsv")


@pytest.mark.parametrize("lines", [2, 70])
def test_a_quote_that_nothing_closes_is_named_with_its_line(tmp_path, lines):
    text = 'text,label\ngood,1\n"never closed,0\n' + "film,1\n" * lines
    with pytest.raises(SamplesError, match=rf"one in line 3 is not: the {lines + 1} lines from there on"):
        table(tmp_path, text)


def test_values_of_several_lines_are_read(tmp_path):
    rows = table(tmp_path, 'text,label\n"one\ntwo\n""three""",1\ngood,0\n')
    assert [row["text"] for row in rows.rows] == ['one\ntwo\n"three"', "good"]
    last = table(tmp_path, 'text,label\ngood,0\n"one\ntwo",1')  # at the end of the file, without a line break
    assert [row["text"] for row in last.rows] == ["good", "one\ntwo"]
