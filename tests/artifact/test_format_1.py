"""An artifact of format 1, written by 0.1.0, answers as it did then.

``format_1/`` was made on the digits of the demo by ``compress("ttmpd.demo:demo_model", ..., speedup=3.0)``, 10 steps:
blocks dropped and replaced, channels narrowed, batch norms folded. ``outputs.safetensors`` holds eight inputs and what
the student answered.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ttmpd
from reports import small_report
from ttmpd.artifact.format_1 import upgraded
from ttmpd.artifact.read import open_artifact, read_artifact
from ttmpd.artifact.write import Result
from ttmpd.errors import CheckpointError
from ttmpd.records import Plan
from ttmpd.surgery.exits.spec import Exits

FOLDER = Path(__file__).parent / "format_1"


def test_it_answers_as_it_did():
    saved = load_file(FOLDER / "outputs.safetensors")
    with torch.no_grad():
        outputs = ttmpd.load(FOLDER)(saved["inputs"])
    torch.testing.assert_close(outputs, saved["outputs"], rtol=1e-4, atol=1e-4)
    assert float(saved["outputs"].abs().max()) > 1


def test_compressed_again_it_is_of_format_2_and_answers_the_same(tmp_path):
    opened = open_artifact(FOLDER)
    result = Result(opened.module, Plan((), 0.0, 0.0, 0.0, 0.0), small_report(), (), opened)
    result.save(tmp_path / "again")
    assert read_artifact(tmp_path / "again").folded == opened.folded
    inputs = load_file(FOLDER / "outputs.safetensors")["inputs"]
    with torch.no_grad():
        assert torch.equal(ttmpd.load(tmp_path / "again")(inputs), opened.module(inputs))


def test_it_holds_units_of_all_sorts():
    artifact = read_artifact(FOLDER)
    assert artifact.kind == "compressed"
    assert {removal.action for removal in artifact.removals} == {"drop", "linear", "narrow"}
    plan = json.loads((FOLDER / "plan.json").read_text())
    narrowed = [row for row in plan["plan"]["removals"] if row["action"] == "narrow"]
    assert [removal.unit.n_members for removal in artifact.removals if removal.action == "narrow"] == [
        row["members"] for row in narrowed
    ]


def test_the_kind_follows_from_what_a_command_left_behind():
    removed = {"path": "a", "action": "drop"}
    exits = {"places": [], "saves": [], "blocks": ["a"]}
    assert upgraded({"plan": {"removals": [removed]}})["kind"] == "compressed"
    assert upgraded({"plan": {"removals": []}})["kind"] == "adapted"
    assert upgraded({"plan": {"removals": [removed]}, "early_exit": exits})["kind"] == "exits"


def test_exits_are_read_under_the_names_of_their_keys():
    place = {"path": "b", "reads": ["b"], "pool": "mean", "layout": "channels_first", "n_features": 4}
    old = {"places": [place], "blocks": ["a", "b"], "n_classes": 3, "followers": [], "fixed": [], "padding": None,
           "compact": True, "saves": [1.0], "threshold": 0.9}  # fmt: skip
    record = Exits.from_dict(upgraded({"plan": {"removals": []}, "early_exit": old})["early_exit"])
    assert (record.exits[0].path, record.saved_shares) == ("b", (1.0,))


def test_a_3x3_replacement_is_refused_with_the_version_that_reads_it(tmp_path):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "old"))
    plan = json.loads((folder / "plan.json").read_text())
    plan["plan"]["removals"][0]["action"] = "conv"
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=r"got 'conv': 3x3 replacements were dropped; ttmpd 0\.1\.0"):
        ttmpd.load(folder)


def test_a_plan_of_format_2_is_not_read_as_if_it_were_of_format_1(tmp_path):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "old"))
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"format": 2}))
    with pytest.raises(CheckpointError, match="is broken"):
        ttmpd.load(folder)
