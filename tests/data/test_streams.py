"""Datasets, loaders and streams as samples."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from image_samples import RGB, note_reads, random_pixels
from ttmpd.data.open import by_length, open_samples, stream_samples
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, SamplesError

# --- records, datasets, iterables


def test_a_record_is_returned_or_chosen_from() -> None:
    samples = open_samples(random_pixels(), RGB)
    assert open_samples(samples, RGB) is samples
    chosen = open_samples(samples, RGB, num_samples=4, seed=1)
    assert len(set(chosen.ids)) == 4
    assert set(chosen.ids) < set(samples.ids)


class _Photos(Dataset[Any]):
    """PIL images with labels, one of them broken, with a random transform."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        self.asked.append(i)
        if i == 4:
            raise OSError("broken")
        shade = int(torch.randint(0, 200, ())) if i == 5 else i
        return Image.new("RGB", (30, 20), (shade,) * 3), i


def test_a_dataset_of_images_is_asked_only_for_the_chosen() -> None:
    data, state = _Photos(), torch.get_rng_state()
    samples = open_samples(data, RGB, num_samples=3, seed=0)
    assert len(data.asked) - len(samples.skipped) == 3
    assert torch.equal(torch.get_rng_state(), state)
    everything = open_samples(data, RGB)
    assert everything.inputs.shape == (9, 3, 16, 16)
    assert everything.skipped[0][0] == "4"
    torch.rand(1)
    assert open_samples(data, RGB).ids == everything.ids


def _collate_to_dict(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"labels": torch.stack([y for _, y in items]), "pixel_values": torch.stack([x for x, _ in items])}


def test_loaders_and_datasets_leave_labels_and_random_state_alone() -> None:
    x = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data, state = TensorDataset(x, torch.arange(10)), torch.get_rng_state()
    expected = open_samples(x, RGB).ids
    assert open_samples(data, RGB).ids == expected
    assert open_samples(DataLoader(data, batch_size=4), RGB).ids == expected
    assert open_samples(DataLoader(data, batch_size=None), RGB).ids == expected
    assert open_samples(DataLoader(data, 4, collate_fn=_collate_to_dict), RGB).ids == expected
    shuffled = DataLoader(data, batch_size=4, shuffle=True)
    first = open_samples(shuffled, RGB, num_samples=5, seed=1)
    assert open_samples(shuffled, RGB, num_samples=5, seed=1).ids == first.ids
    assert len(set(first.ids)) == 5
    assert set(first.ids) < set(expected)
    assert torch.equal(torch.get_rng_state(), state)


class _Numbers(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((4,), float(i)) for i in range(40))


def test_a_stream_is_chosen_from_to_its_end() -> None:
    values = [open_samples(_Numbers(), None, num_samples=4, seed=seed).inputs[:, 0].tolist() for seed in range(50)]
    assert all(len(set(one)) == 4 for one in values)
    assert {value for one in values for value in one} >= {0.0, 39.0}
    mean = sum(itertools.chain.from_iterable(values)) / 200
    assert 15 < mean < 24
    assert open_samples(_Numbers(), None).inputs[:, 0].tolist() == list(range(40))


def test_iterables_of_batches_samples_and_images() -> None:
    x = torch.from_numpy(random_pixels(6))
    expected = open_samples(x, RGB)
    for data in ([x[:4], x[4:]], [(x[:4], torch.arange(4)), (x[4:], torch.arange(2))], [{"image": one} for one in x]):
        assert open_samples(data, RGB).ids == expected.ids
    images = [Image.fromarray(one.numpy()) for one in x]
    for given in (images, [(one, 0) for one in images], [images[:4], images[4:]], [(images, [0] * 6)]):
        assert torch.equal(open_samples(given, RGB).inputs, expected.inputs)
    assert torch.equal(open_samples(images, None).inputs, expected.inputs)
    assert open_samples([torch.zeros(7), torch.ones(7)], None).inputs.shape == (2, 7)
    assert open_samples([torch.zeros(5, 7), torch.ones(3, 7)], None).inputs.shape == (8, 7)


def test_samples_of_other_shapes_are_skipped() -> None:
    samples = open_samples([torch.zeros(7), torch.zeros(8), torch.ones(7), "text"], None)
    assert samples.names == ("0", "2")
    assert "(8,)" in samples.skipped[0][1]
    assert "str" in samples.skipped[1][1]


# --- streaming


def test_streaming_gives_the_same_samples_in_the_same_order(folder: Path) -> None:
    x = random_pixels(12)
    record = open_samples(x, RGB)
    for data in (folder, x, record, DataLoader(TensorDataset(torch.from_numpy(x)), batch_size=3)):
        chunks = list(stream_samples(data, RGB, chunk=5))
        assert [len(one) for one in chunks] == [5, 5, 2]
        assert sum((one.ids for one in chunks), ()) == open_samples(data, RGB).ids
        assert sum((one.names for one in chunks), ()) == open_samples(data, RGB).names


def test_streaming_decodes_one_chunk_at_a_time_and_reports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("class0/00.png", "class0/01.png", "class0/02.png"):
        (folder / name).write_bytes(b"bad")
    seen = note_reads(monkeypatch)
    stream = stream_samples(folder, RGB, chunk=2)
    assert [name for name, _ in next(stream).skipped] == ["class0/00.png", "class0/01.png", "class0/02.png"]
    assert len(seen) == 4
    assert sum(len(one) for one in stream) == 8


def test_streaming_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(SamplesError, match=r"bad\.png"):
        list(stream_samples(tmp_path, RGB))
    with pytest.raises(InvalidValueError, match="chunk"):
        list(stream_samples(tmp_path, RGB, chunk=0))


def texts(lengths: list[int]) -> Samples:
    """Texts of these lengths, named by them; token 0 is padding."""
    rows = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = n
    return Samples(rows, tuple(map(str, lengths)), padding=0)


def test_texts_of_like_length_stand_side_by_side():
    lengths = torch.randperm(34, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    sorted_ = by_length(texts(lengths), 4)
    found = sorted_.inputs.count_nonzero(dim=1).tolist()
    assert sorted(found) == list(range(1, 35)) and list(map(int, sorted_.ids)) == found
    runs = [found[i : i + 4] for i in range(0, 34, 4)]
    assert all(max(run) - min(run) == len(run) - 1 for run in runs)
    assert [run[0] for run in runs] == [17, 9, 25, 5, 21, 13, 29, 1, 33]  # the middle, quarters, ...; the rest last
    assert all(abs(sum(found[i : i + 12]) / 12 - 17.5) < 4 for i in (0, 12, 20))  # any three runs hold all lengths


def test_only_texts_are_sorted():
    samples = Samples(torch.arange(6.0)[:, None], tuple("abcdef"))
    assert by_length(samples, 2) is samples
    assert by_length(texts([3, 1, 2]), 8).ids == ("1", "2", "3")


def test_a_stream_without_an_end_is_read_so_far_and_no_further(caplog: pytest.LogCaptureFixture) -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        for i in itertools.count():
            read.append(i)
            yield torch.full((4,), float(i))

    samples = open_samples(endless(), None, num_samples=5)
    assert len(samples) == 5
    assert 20 * 5 <= len(read) <= 20 * 5 + 1
    assert "not read to its end: samples are chosen from its first 100 items" in caplog.text


def test_items_that_a_dataset_cannot_give_are_skipped_whatever_it_raises() -> None:
    class Broken(Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> Tensor:
            if i == 3:
                raise TypeError("'NoneType' object is not subscriptable")
            if i == 4:
                raise AttributeError("no shape")
            return torch.full((4,), float(i))

    samples = open_samples(Broken(), None)
    assert len(samples) == 10
    assert [name for name, _ in samples.skipped] == ["3", "4"]
    assert "TypeError: 'NoneType' object is not subscriptable" in samples.skipped[0][1]
