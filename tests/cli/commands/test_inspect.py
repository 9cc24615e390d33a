"""`ttmpd inspect`: the units of a model, and its JSON."""

import json


def test_inspect_lists_the_kinds_that_are_asked_for(tmp_path, run, said, demo):
    found = run("inspect", "--model", demo, "--no-time", "--units", "channel", "--json", tmp_path / "i.json")
    assert found.exit_code == 0, said(found)
    units = json.loads((tmp_path / "i.json").read_text())["units"]
    assert units
    assert {unit["kind"] for unit in units} == {"channel"}


def test_inspect_and_its_json(quick_timing, tmp_path, run, demo):
    found = run("inspect", "--model", demo, "--batch-size", 2, "--json", tmp_path / "i.json")
    assert found.exit_code == 0
    assert "25 removable units" in found.stdout
    data = json.loads((tmp_path / "i.json").read_text())
    assert [unit["id"] for unit in data["units"]][:2] == ["stage1.0", "channel:stage1.0.conv2"]
    assert data["whole"]["median_ms"] > 0


def test_inspect_of_a_model_without_units(factory, run):
    found = run("inspect", "--model", f"{factory}:plain", "--no-time")
    assert found.exit_code == 0
    assert "Nothing is removable" in found.stdout
