"""Where an artifact may be written: in a new or empty folder, or over another artifact; nothing of others is lost."""

import json
import os

import pytest

from ttmpd.artifact.write import check_output
from ttmpd.errors import InvalidValueError


def test_new_and_empty_folders_and_artifacts_are_taken(tmp_path):
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")  # of no name that an artifact writes
    check_output(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"format": 2, "ttmpd": "0.2"}))
    (tmp_path / "model.safetensors").touch()
    check_output(tmp_path)


@pytest.mark.parametrize("content", ['{"format": "pdf"}', '{"steps": []}', "[]", "not JSON", ""])
def test_a_plan_of_another_program_is_never_overwritten(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InvalidValueError, match=r"holds other files \(plan\.json\)"):
        check_output(tmp_path)
    assert (tmp_path / "plan.json").read_text() == content


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "report.html", "README.md"])
def test_other_files_of_an_artifacts_names_are_never_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidValueError, match="would be overwritten"):
        check_output(tmp_path)


def test_impossible_places_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidValueError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(InvalidValueError, match=r"lies below '.*file', which is a file"):
        check_output(tmp_path / "file" / "out")
    with pytest.raises(InvalidValueError, match="cannot"):
        check_output(tmp_path / ("x" * 5000))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InvalidValueError, match="is read-only"):
        check_output(tmp_path / "closed" / "out")
