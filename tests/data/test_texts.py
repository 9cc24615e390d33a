"""Opening text: every form of file and data, labels, and what is said of what cannot be read."""

import csv
import gzip
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ttmpd.data.labels import open_labels
from ttmpd.data.open import open_samples, stream_samples
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.data.samples import Samples
from ttmpd.data.tables import kind_of, read_table
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import SamplesError
from ttmpd.models.open import open_model

TEXTS = ["the film was good", 'a "dull" plot', "not bad , not fine", "one story", "two long long long books"]
LABELS = [1, 0, 1, 1, 0]
RGB = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def how(text_folder: Callable[[str], Path]) -> Tokenization:
    found = open_model(f"hf:{text_folder('bert')}").preprocessing
    assert isinstance(found, Tokenization)
    return found


def _written(folder: Path, ending: str, texts: list[str] | None = None, column: str = "sentence") -> Path:
    """The texts with their labels in a file of the kind that ``ending`` says."""
    texts, kind = TEXTS if texts is None else texts, ending.removesuffix(".gz")
    rows = list(zip(LABELS, texts, strict=True))
    if kind == ".txt":
        content = "\n".join(texts) + "\n"
    elif kind == ".tsv":
        content = f"label\t{column}\n" + "".join(f"{label}\t{text}\n" for label, text in rows)
    elif kind == ".jsonl":
        content = "".join(json.dumps({"label": label, column: text}) + "\n" for label, text in rows)
    else:
        quoted = ('"' + text.replace('"', '""') + '"' for text in texts)
        content = f"label,{column}\r\n" + "".join(f"{n},{text}\r\n" for n, text in zip(LABELS, quoted, strict=True))
    path = folder / f"data{ending}"
    path.write_bytes(gzip.compress(content.encode()) if ending.endswith(".gz") else content.encode())
    return path


ENDINGS = [".txt", ".tsv", ".csv", ".jsonl", ".txt.gz", ".tsv.gz", ".csv.gz", ".jsonl.gz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_file_holds_the_same_samples(how: Tokenization, tmp_path: Path, ending: str) -> None:
    path = _written(tmp_path, ending)
    samples, expected = open_samples(path, how), open_samples(TEXTS, how)
    assert kind_of(path) == ending.removesuffix(".gz")
    assert samples.ids == expected.ids
    assert torch.equal(samples.inputs, expected.inputs)
    assert samples.names == ("0", "1", "2", "3", "4")
    assert samples.is_text and samples.padding == 0 and samples.inputs.dtype == torch.int64
    assert samples.skipped == () and samples.notes == ()
    assert (
        open_samples(str(path), how, num_samples=3, seed=1).ids == open_samples(TEXTS, how, num_samples=3, seed=1).ids
    )


def test_padding_is_on_the_right_up_to_the_longest(how: Tokenization) -> None:
    samples = open_samples(["good", "the film was good"], how)
    assert samples.inputs.tolist() == [[2, 15, 3, 0, 0, 0], [2, 4, 6, 10, 15, 3]]
    assert open_samples(["good"], how).ids == samples.ids[:1]


def test_ids_are_those_of_the_text(how: Tokenization, text_folder: Callable[[str], Path]) -> None:
    other = open_model(f"hf:{text_folder('gpt2')}").preprocessing
    expected = open_samples(TEXTS, how).ids
    assert open_samples(TEXTS, other).ids == expected
    assert open_samples([f"  {text}\n" for text in TEXTS], how).ids == expected
    shorter = Tokenization(how.tokenizer, how.padding, 4, how.limit)
    assert open_samples(TEXTS, shorter).ids == expected
    assert len(set(expected)) == len(TEXTS)


def test_a_folder_of_texts(how: Tokenization, tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        path = tmp_path / "books" / f"part{i % 2}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n\n")
    (tmp_path / "books" / "notes.md").write_text("not read")
    (tmp_path / "books" / ".hidden.txt").write_text("not read")
    samples = open_samples(tmp_path / "books", how)
    assert samples.names == ("part0/0.txt", "part0/2.txt", "part0/4.txt", "part1/1.txt", "part1/3.txt")
    assert set(samples.ids) == set(open_samples(TEXTS, how).ids)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "label"], *[[f"{i}.txt", label] for i, label in enumerate(LABELS)]])
    labels = open_labels(tmp_path / "labels.csv", tmp_path / "books").of(samples)
    assert labels.tolist() == [LABELS[0], LABELS[2], LABELS[4], LABELS[1], LABELS[3]]


class _Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, i: int) -> tuple[str, int]:
        return TEXTS[i], LABELS[i]


def _texts() -> Iterator[str]:
    yield from TEXTS


def test_data_of_python(how: Tokenization) -> None:
    expected = open_samples(TEXTS, how)
    mappings = [{"label": y, "sentence": x} for x, y in zip(TEXTS, LABELS, strict=True)]
    pairs = list(zip(TEXTS, LABELS, strict=True))
    batches = [(TEXTS[:3], torch.tensor(LABELS[:3])), (TEXTS[3:], torch.tensor(LABELS[3:]))]
    for data in (tuple(TEXTS), np.array(TEXTS), _texts(), mappings, pairs, batches, [TEXTS[:2], TEXTS[2:]], _Pairs(),
                 DataLoader(_Pairs(), batch_size=2), [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}]):  # fmt: skip
        samples = open_samples(data, how)
        assert samples.ids == expected.ids
        assert torch.equal(samples.inputs, expected.inputs)
    assert open_samples(expected, how) is expected
    chunks = list(stream_samples(TEXTS, how, chunk=2))
    assert [len(one) for one in chunks] == [2, 2, 1]
    assert sum((one.ids for one in chunks), ()) == expected.ids
    assert [one.inputs.shape[1] for one in chunks] == [7, 7, 7]
    assert next(stream_samples(TEXTS[3:], how, chunk=1)).inputs.shape == (1, 4)  # as long as its own longest


def test_token_ids_may_be_given(how: Tokenization, tmp_path: Path) -> None:
    expected = open_samples(TEXTS, how).inputs
    np.save(tmp_path / "ids.npy", expected.numpy().astype(np.int32))
    lists = [[int(token) for token in row if token] for row in expected]
    read_only = expected.numpy().astype(np.uint16)
    read_only.flags.writeable = False
    for data in (
        expected,
        expected.numpy(),
        read_only,
        tmp_path / "ids.npy",
        lists,
        [{"input_ids": expected}],
        list(expected),
    ):
        samples = open_samples(data, how)
        assert torch.equal(samples.inputs, expected)
    wide = torch.nn.functional.pad(expected, (4, 9))  # padding on either side says nothing
    assert open_samples(wide, how).ids == open_samples(expected, how).ids
    bad = open_samples([[5, 6], [], [0, 0], [-1, 5]], how)
    assert bad.names == ("0",)
    assert "negative" in dict(bad.skipped)["3"]


# --- what is said


def test_what_cannot_be_read_is_reported(how: Tokenization, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbfthe film\r\n\r\n   \nb\xffd story\n" + b"good " * 60 + b"\nthe\x0bend")
    caplog.set_level(logging.WARNING)
    samples = open_samples(path, how)
    assert samples.names == ("0", "3", "4", "5")
    assert samples.skipped == (("1", "is empty"), ("2", "is empty"))
    assert dict(samples.notes) == {
        "held bytes that are no UTF-8": 1,
        "longer than 40 tokens, of which the first were read": 1,
    }
    assert samples.inputs.shape == (4, 40)
    assert "1 of 4 samples: longer than 40 tokens" in caplog.text
    chosen = open_samples(path, how, num_samples=4, seed=0)
    assert set(chosen.ids) == set(samples.ids)  # what is skipped is replaced by further ones


def test_bad_rows_of_tables_are_skipped(how: Tokenization, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('label\tsentence\n1\t"the film\n0\n1\tgood\textra\n')
    tsv = open_samples(tmp_path / "a.tsv", how)
    assert tsv.names == ("0", "2")  # a quote in a .tsv is a character
    assert tsv.skipped == (("1", "is empty"),)
    lines = ['{"text": "good"}', "{", '["a"]', '"a string"', '{"text": 3}', "", '{"other": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    jsonl = open_samples(tmp_path / "a.jsonl", how)
    reasons = dict(jsonl.skipped)
    assert jsonl.names == ("0", "3")
    assert "no JSON" in reasons["1"] and "list" in reasons["2"] and "int" in reasons["4"] and reasons["5"] == "is empty"
    (tmp_path / "a.csv").write_text('text\ngood\n"' + "x" * 200_000 + '"\nfine\n')  # longer than a field may be
    table = open_samples(tmp_path / "a.csv", how)
    assert len(table) == 2 and len(table.skipped) == 1
    (tmp_path / "wide.tsv").write_bytes("label\ttext\n0\tthe film\n".encode("utf-16"))
    assert open_samples(tmp_path / "wide.tsv", how).ids == open_samples(["the film"], how).ids


@pytest.mark.parametrize(
    ("head", "row", "column"),
    [
        ("idx\tsentence\ttext", "1\tthe film\tgood", "sentence"),
        ("TEXT\tother", "the film\tgood", "TEXT"),
        ("review\tlabel\tscore", "the film\tpositive\t3.5", "review"),
        ("\treview", "0\tthe film", "review"),
    ],
)
def test_the_column_of_text_is_found(tmp_path: Path, head: str, row: str, column: str) -> None:
    (tmp_path / "a.tsv").write_text(f"{head}\n{row}\n")
    assert read_table(tmp_path / "a.tsv").text_column() == column


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("two.tsv", b"premise\thypothesis\nthe film\tgood\n", r"\['premise', 'hypothesis'\]"),
        ("none.csv", b"label,score\n1,2\n", r"only one column of text, but has the columns \['label', 'score'\]"),
        ("headless.tsv", b"1\tthe film\n0\tgood\n", "must name the columns"),
        ("empty.txt", b"", "it is empty"),
        ("blank.txt", b"\n\n", "skipped all 2: 0: is empty"),
        ("empty.tsv", b"", "columns"),
        ("broken.txt.gz", b"\x1f\x8b\x08 broken", "must be a whole file of text"),
        ("cut.txt.gz", gzip.compress(b"the film\n" * 999, mtime=0)[:-12], "must be a whole file of text"),
        ("model.bin", b"", "another kind of file"),
        ("a.png", b"", "an image"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_files_that_hold_nothing(how: Tokenization, tmp_path: Path, name: str, content: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SamplesError, match=word):
        open_samples(tmp_path / name, how)


def test_places_and_things_that_hold_no_text(how: Tokenization, tmp_path: Path) -> None:
    for data, word in (
        (tmp_path / "absent.txt", "does not exist"),
        ("the film was good", "does not exist"),
        (7, "but got int"),
        ([Image.new("RGB", (8, 8))], "holds no text, but Image"),
        (torch.zeros(2, 3, 8, 8), "must be text or token ids"),
        (np.zeros((2, 8), dtype=np.uint8), "must be text or token ids"),
        (tmp_path, "it is empty"),
    ):
        with pytest.raises(SamplesError, match=word):
            open_samples(data, how)


def test_images_and_text_are_not_mixed_up(how: Tokenization, tmp_path: Path) -> None:
    path = _written(tmp_path, ".tsv")
    for data in (path, tmp_path):
        with pytest.raises(SamplesError, match="open a text model"):
            open_samples(data if data == path else _written(tmp_path, ".txt").parent, RGB)
    with pytest.raises(SamplesError, match="holds no tensor, array or image, but str"):
        open_samples(TEXTS, RGB)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    with pytest.raises(SamplesError, match=r"must be given text, but .* holds images"):
        open_samples(pictures, how)
    text, images = open_samples(TEXTS, how), Samples(torch.zeros(2, 3, 8, 8), ("a", "b"))
    with pytest.raises(SamplesError, match="are text, and the model takes images"):
        open_samples(text, RGB)
    with pytest.raises(SamplesError, match="and the model takes text"):
        next(stream_samples(images, how))


# --- labels


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl.gz"])
def test_labels_lie_beside_the_text(how: Tokenization, tmp_path: Path, ending: str) -> None:
    path = _written(tmp_path, ending)
    samples = open_samples(path, how, num_samples=4, seed=3)
    expected = [LABELS[int(name)] for name in samples.names]
    assert open_labels(path, path).of(samples).tolist() == expected
    assert open_labels(None, path).of(samples).tolist() == expected
    (tmp_path / "plain").mkdir()
    plain = _written(tmp_path / "plain", ".txt")
    assert open_labels(path, plain).of(samples).tolist() == expected


def test_labels_by_row_of_text(how: Tokenization, tmp_path: Path) -> None:
    path = _written(tmp_path, ".tsv")
    rows = tmp_path / "rows.csv"
    rows.write_text("file,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(LABELS)))
    assert open_labels(rows, path).of(open_samples(path, how)).tolist() == LABELS


def test_bad_labels_of_text(how: Tokenization, tmp_path: Path) -> None:
    path = _written(tmp_path, ".tsv")
    samples = open_samples(path, how)
    cases = {
        "words.tsv": ("label\ttext\n" + "positive\tgood\n" * 5, "row 1 has the label 'positive'"),
        "few.tsv": ("label\ttext\n1\tgood\n", "1 labels for 5 rows"),
        "none.tsv": ("sentence\tscore\ngood\t1\n", "must have a column 'label'"),
    }
    for name, (content, word) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(SamplesError, match=word):
            open_labels(tmp_path / name, path)
    (tmp_path / "gap.tsv").write_text("label\ttext\n1\ta\n\tb\n1\tc\n1\td\n1\te\n")
    with pytest.raises(SamplesError, match=r"none for 1 of 5 \(1\)"):
        open_labels(tmp_path / "gap.tsv", path).of(samples)
    with pytest.raises(SamplesError, match="must belong to a file of text"):
        open_labels(path, torch.zeros(5, 3))
