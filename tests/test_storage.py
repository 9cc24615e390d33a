"""Files whole or not at all, one run per folder, fingerprints."""

import json
import math

import pytest

from ttmpd.errors import InvalidValueError
from ttmpd.storage import fingerprint, locked, replacing, weights_fingerprint, write_copy, write_json
from ttmpd.testing.tiny_models import tiny_model


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.parent == path.parent  # a rename within one file system is one step
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("a par")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_that_cannot_be_read_leaves_the_goal_alone(tmp_path):
    (tmp_path / "goal").write_text("old")
    with pytest.raises(FileNotFoundError):
        write_copy(tmp_path / "missing", tmp_path / "goal")
    write_copy(tmp_path / "goal", tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goal", "second"]
    assert (tmp_path / "second").read_text() == "old"


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"harm": math.nan})
    assert not (tmp_path / "x.json").exists()
    write_json(tmp_path / "x.json", {"harm": 1.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {"harm": 1.5}
    assert len(list(tmp_path.iterdir())) == 1


def test_one_run_per_folder(tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(InvalidValueError, match="no other run"), locked(tmp_path / "out"):
            raise AssertionError("two runs hold one folder")
        with locked(tmp_path / "elsewhere"):
            pass
    with locked(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_fingerprints_tell_weights_apart():
    assert weights_fingerprint(tiny_model(0)) == weights_fingerprint(tiny_model(0))
    assert weights_fingerprint(tiny_model(0)) != weights_fingerprint(tiny_model(1))
    swapped = tiny_model(0)
    weight = swapped.head.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert weights_fingerprint(swapped) != weights_fingerprint(tiny_model(0))
    assert fingerprint(1, "a") == fingerprint(1, "a") != fingerprint("a", 1)
