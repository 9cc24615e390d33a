"""Opening samples and labels: what is taken, what is skipped, and what is said about it."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_samples import MEAN, RGB, STD, note_reads, random_pixels
from ttmpd.data.files import image_files
from ttmpd.data.labels import Labels, open_labels
from ttmpd.data.open import open_samples
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError, SamplesError
from ttmpd.models.open import open_model

DATA = Path(os.environ.get("TTMPD_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
GRAY = Preprocessing((1, 16, 16), (0.5,), (0.5,))


def _numbers(samples: Samples) -> list[int]:
    return [int(value) // 20 for value in samples.inputs[:, 0, 0, 0]]


# --- folders


def test_a_folder_is_read_in_the_order_of_its_paths(folder: Path) -> None:
    samples = open_samples(folder, RGB)
    assert samples.inputs.shape == (12, 3, 16, 16)
    assert samples.inputs.dtype == torch.uint8
    assert _numbers(samples) == list(range(12))
    assert samples.names[5] == "class1/05.png"
    assert (samples.mean, samples.std) == (MEAN, STD)
    assert samples.skipped == ()


def test_a_choice_is_shuffled_by_its_seed(folder: Path) -> None:
    chosen = open_samples(folder, RGB, num_samples=6, seed=1)
    again = open_samples(str(folder), RGB, num_samples=6, seed=1)
    other = open_samples(folder, RGB, num_samples=6, seed=2)
    assert chosen.ids == again.ids != other.ids
    assert len(set(chosen.ids)) == 6
    assert _numbers(chosen) != sorted(_numbers(chosen))
    assert len({name.split("/")[0] for name in chosen.names[:4]}) > 1


def test_only_the_chosen_files_are_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = note_reads(monkeypatch)
    assert len(open_samples(folder, RGB, num_samples=3)) == 3
    assert len(seen) == 3


def test_ids_are_those_of_the_content(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy" / "deeper")
    first, second = open_samples(folder, RGB), open_samples(tmp_path / "copy", RGB)
    assert first.ids == second.ids
    assert first.names != second.names
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in first.ids)


def test_what_cannot_be_used_is_reported(folder: Path) -> None:
    good = folder / "class0" / "photo.JPG"
    Image.fromarray(random_pixels(1, 64)[0]).save(good, "JPEG")
    (folder / "truncated.jpg").write_bytes(good.read_bytes()[:-400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpeg").write_text("not an image")
    Image.new("RGB", (7, 30)).save(folder / "tiny.png")
    (folder / "notes.txt").write_text("not listed")
    (folder / ".hidden.png").write_text("not listed")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "a.png").write_text("not listed")
    samples = open_samples(folder, RGB)
    reasons = dict(samples.skipped)
    assert len(samples) == 13
    assert sorted(reasons) == ["empty.png", "text.jpeg", "tiny.png", "truncated.jpg"]
    assert "7x30" in reasons["tiny.png"]
    assert "truncated" in reasons["truncated.jpg"]


def test_skipped_files_are_replaced_by_further_ones(folder: Path) -> None:
    for i in range(20):
        (folder / f"bad{i}.png").write_bytes(b"bad")
    samples = open_samples(folder, RGB, num_samples=12, seed=3)
    assert sorted(_numbers(samples)) == list(range(12))
    assert all(name.startswith("bad") for name, _ in samples.skipped)


def test_a_folder_of_bad_files_says_why(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"bad")
    with pytest.raises(SamplesError, match=r"skipped all 7: 0\.png: cannot be read.*4\.png.*; pass a folder") as raised:
        open_samples(tmp_path, RGB)
    assert "5.png" not in str(raised.value)


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="it is empty"):
        open_samples(tmp_path, RGB)
    with pytest.raises(SamplesError, match="does not exist"):
        open_samples(tmp_path / "absent", RGB)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(SamplesError, match=r"model\.pt"):
        open_samples(tmp_path / "model.pt", RGB)
    with pytest.raises(SamplesError, match="int"):
        open_samples(7, RGB)


def test_a_folder_needs_preprocessing(folder: Path) -> None:
    with pytest.raises(SamplesError, match="pretrained_cfg"):
        open_samples(folder, None)


def test_images_turn_and_change_their_channels(tmp_path: Path) -> None:
    turned = Image.new("RGB", (16, 16))
    turned.paste((255, 255, 255), (0, 0, 16, 8))  # white above; orientation 3 turns it upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (16, 16), 9).save(tmp_path / "gray.png")
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    samples = open_samples(tmp_path, RGB)
    assert samples.names == ("clear.png", "gray.png", "turned.png")
    assert set(samples.inputs[:2].flatten().tolist()) == {9}
    assert samples.inputs[2, 0, 0, 0] == 0
    assert samples.inputs[2, 0, 15, 0] == 255
    assert open_samples(tmp_path, GRAY).inputs.shape == (3, 1, 16, 16)


def test_small_images_serve_small_models(tmp_path: Path) -> None:
    Image.new("L", (5, 5), 9).save(tmp_path / "five.png")
    assert len(open_samples(tmp_path, Preprocessing((1, 4, 4), (0.5,), (0.5,)))) == 1


def test_a_single_image_and_links_to_folders(folder: Path, tmp_path: Path) -> None:
    assert open_samples(folder / "class0" / "03.png", RGB).names == ("03.png",)
    (folder / "loop").symlink_to(folder)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "photos").symlink_to(folder)
    assert len(image_files(folder)) == 12
    assert len(image_files(tmp_path / "linked")) == 12


# --- arrays


def test_npz_npy_and_tensors_hold_the_same_samples(tmp_path: Path) -> None:
    x = random_pixels()
    np.savez(tmp_path / "named.npz", x=x, y=np.arange(6))
    np.savez_compressed(tmp_path / "only.npz", whatever=x, y=np.arange(6))
    np.savez(tmp_path / "images.npz", other=np.zeros(3), images=x)
    np.save(tmp_path / "rows.npy", x)
    expected = open_samples(x, RGB)
    assert torch.equal(expected.inputs, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert expected.names == ("0", "1", "2", "3", "4", "5")
    channels_first = torch.from_numpy(x).permute(0, 3, 1, 2)
    paths = [tmp_path / name for name in ("named.npz", "only.npz", "images.npz", "rows.npy")]
    for data in (*paths, torch.from_numpy(x), channels_first, (x, np.arange(6)), list(x), iter(channels_first)):
        samples = open_samples(data, RGB)
        assert samples.ids == expected.ids
        assert torch.equal(samples.inputs, expected.inputs)


def test_a_chosen_array_is_a_choice_of_its_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", random_pixels(50))
    everything = open_samples(tmp_path / "rows.npy", RGB)
    chosen = open_samples(tmp_path / "rows.npy", RGB, num_samples=20, seed=5)
    assert len(set(chosen.names)) == 20
    assert chosen.ids == tuple(everything.ids[int(name)] for name in chosen.names)
    assert len(open_samples(tmp_path / "rows.npy", RGB, num_samples=99)) == 50


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 16, 16, 1), (4, 1, 16, 16)])
def test_gray_arrays_fit_both_kinds_of_model(shape: tuple[int, ...]) -> None:
    x = random_pixels(4, channels=1).reshape(shape)
    assert open_samples(x, GRAY).inputs.shape == (4, 1, 16, 16)
    colored = open_samples(x, RGB).inputs
    assert colored.shape == (4, 3, 16, 16)
    assert torch.equal(colored[:, 0], colored[:, 2])
    assert open_samples(random_pixels(4), GRAY).inputs.shape == (4, 1, 16, 16)


def test_arrays_of_another_size_are_resized_or_kept() -> None:
    assert open_samples(random_pixels(2, 40), RGB).inputs.shape == (2, 3, 16, 16)
    kept = open_samples(random_pixels(2, 40), None)
    assert kept.inputs.shape == (2, 3, 40, 40)
    assert kept.batch(slice(None)).min() >= 0
    assert kept.batch(slice(None)).max() == 1.0


def test_floating_values_go_to_the_model_as_they_are() -> None:
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = open_samples(x, RGB)
    assert torch.equal(samples.batch(slice(None)), x)
    assert samples.mean == ()
    last = open_samples(x.permute(0, 2, 3, 1).numpy().astype(np.float64), RGB)
    assert torch.equal(last.inputs, x)
    assert last.ids == samples.ids
    assert open_samples(torch.randn(5, 7), None).inputs.shape == (5, 7)
    assert open_samples(x.bfloat16(), None).inputs.dtype == torch.bfloat16


def test_values_that_are_not_finite_are_skipped() -> None:
    x = torch.randn(5, 4)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    samples = open_samples(x, None, num_samples=3)
    assert sorted(samples.names) == ["0", "2", "4"]
    assert all("NaN" in reason for _, reason in samples.skipped)
    with pytest.raises(SamplesError, match="NaN"):
        open_samples(x[1:2], None)


def test_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="uint8 pixels or floating"):
        open_samples(torch.zeros(3, 4, dtype=torch.int64), None)
    with pytest.raises(SamplesError, match="1, 3 or 4 channels"):
        open_samples(np.zeros((3, 9), dtype=np.uint8), RGB)
    with pytest.raises(SamplesError, match="numbers"):
        open_samples(np.array(["a", "b"]), RGB)
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(SamplesError, match=r"'x'.*\['a', 'b'\]"):
        open_samples(tmp_path / "two.npz", RGB)
    for name in ("broken.npz", "broken.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 broken")
        with pytest.raises(SamplesError, match=name):
            open_samples(tmp_path / name, RGB)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    for name in ("objects.npz", "objects.npy"):
        with pytest.raises(SamplesError, match="of numbers"):
            open_samples(tmp_path / name, RGB)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_a_number_of_samples_must_be_positive(num_samples: int) -> None:
    with pytest.raises(InvalidValueError, match="num_samples"):
        open_samples(random_pixels(), RGB, num_samples=num_samples)


# --- labels


def _csv(path: Path, rows: list[list[str]], head: tuple[str, ...] = ("label", "file")) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([list(head), *rows])
    return path


def test_labels_follow_their_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=random_pixels(), y=np.array([3, 1, 4, 1, 5, 9]))
    samples = open_samples(tmp_path / "data.npz", RGB, num_samples=4, seed=2)
    expected = [[3, 1, 4, 1, 5, 9][int(name)] for name in samples.names]
    for labels in (None, tmp_path / "data.npz"):
        found = open_labels(labels, tmp_path / "data.npz").of(samples)
        assert found.tolist() == expected
        assert found.dtype == torch.int64
    rows = _csv(tmp_path / "rows.csv", [[str(label), str(i)] for i, label in enumerate([3, 1, 4, 1, 5, 9])])
    assert open_labels(rows, tmp_path / "data.npz").of(samples).tolist() == expected
    np.savez(tmp_path / "column.npz", y=np.array([[3], [1], [4], [1], [5], [9]]))
    assert open_labels(tmp_path / "column.npz", random_pixels()).of(samples).tolist() == expected


def test_labels_follow_their_files(folder: Path, tmp_path: Path) -> None:
    samples = open_samples(folder, RGB, num_samples=5, seed=1)
    expected = _numbers(samples)
    relative = _csv(tmp_path / "relative.csv", [[str(i), f"class{i // 4}/{i:02d}.png"] for i in range(12)])
    base = _csv(tmp_path / "base.csv", [[str(i), f".\\photos\\{i:02d}.png"] for i in range(12)])
    for labels in (relative, base):
        assert open_labels(labels, folder).of(samples).tolist() == expected


def test_a_base_name_that_is_not_unique_is_no_name(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "class0" / "00.png", folder / "class1" / "00.png")
    labels = open_labels(_csv(tmp_path / "base.csv", [[str(i), f"{i:02d}.png"] for i in range(12)]), folder)
    with pytest.raises(SamplesError, match=r"none for 2 of 13 \(class0/00.png, class1/00.png\)"):
        labels.of(open_samples(folder, RGB))


@pytest.mark.parametrize(
    ("rows", "head", "word"),
    [
        ([["0", "00.png"]], ("class", "file"), "columns 'file' and 'label'"),
        ([["cat", "00.png"]], ("label", "file"), "line 2 has file '00.png' and label 'cat'"),
        ([["1.5", "00.png"]], ("label", "file"), "1.5"),
        ([["-1", "00.png"]], ("label", "file"), "-1"),
        ([["1"]], ("label", "file"), "file ''"),
        ([["1", "00.png"], ["2", "00.png"]], ("label", "file"), "gives '00.png' two"),
        ([["1", "elsewhere.png"]], ("label", "file"), "names none"),
    ],
)
def test_bad_label_files_say_what_is_wrong(
    folder: Path, tmp_path: Path, rows: list[list[str]], head: tuple[str, ...], word: str
) -> None:
    with pytest.raises(SamplesError, match=word):
        open_labels(_csv(tmp_path / "labels.csv", rows, head), folder)


def test_labels_of_the_wrong_kind(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "y.npz", y=np.arange(5))
    np.savez(tmp_path / "float.npz", y=np.linspace(0, 1, 6))
    np.savez(tmp_path / "no.npz", a=np.arange(6), b=np.arange(6))
    (tmp_path / "labels.yaml").write_text("{}")
    (tmp_path / "labels.json").write_text("[]")
    (tmp_path / "latin.csv").write_bytes(b"file,label\n\xff,1\n")
    for labels, data, word in (
        ("y.npz", folder, "folder must be a .csv"),
        ("y.npz", random_pixels(6), "5 labels for 6 rows"),
        ("float.npz", random_pixels(6), "class index"),
        ("no.npz", random_pixels(6), "'y'"),
        ("labels.yaml", folder, "another kind of file"),
        ("labels.json", folder, "must belong to a file of text"),
        ("absent.csv", folder, "no such file"),
        ("latin.csv", folder, "UTF-8"),
    ):
        with pytest.raises(SamplesError, match=word):
            open_labels(tmp_path / labels, data)
    with pytest.raises(SamplesError, match="must be given"):
        open_labels(None, folder)


def test_samples_without_names_have_no_labels() -> None:
    with pytest.raises(SamplesError, match="names"):
        Labels({"0": 1}, "here").of(Samples(torch.zeros(1, 2), ("a",)))


# --- real data


def test_real_rows_are_normalized_exactly() -> None:
    if not (DATA / "zoo.py").is_file():
        pytest.skip(f"no real data at {DATA}: set TTMPD_DATA")
    opened = open_model(f"{DATA / 'zoo.py'}:resnet20")
    path = DATA / "cifar10" / "test.npz"
    with np.load(path) as file:
        x, y = file["x"], file["y"]
    samples = open_samples(path, opened.preprocessing, num_samples=200, seed=0)
    rows = torch.tensor([int(name) for name in samples.names])
    assert opened.preprocessing is not None
    mean, std = (
        torch.tensor(value).view(1, 3, 1, 1) for value in (opened.preprocessing.mean, opened.preprocessing.std)
    )
    expected = (torch.from_numpy(x)[rows].permute(0, 3, 1, 2).float() / 255 - mean) / std
    assert torch.equal(samples.batch(slice(None)), expected)
    labels = open_labels(None, path).of(samples)
    assert torch.equal(labels, torch.from_numpy(y)[rows])
    with torch.no_grad():
        assert (opened.module(expected).argmax(1) == labels).float().mean() > 0.85
