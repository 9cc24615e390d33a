"""`ttmpd adapt` end to end on the demo's network: what it prints, writes and refuses."""

import json

from ttmpd.artifact.read_report import read_report
from ttmpd.cli.commands import _reporting

DEMO = "ttmpd.demo:demo_model"


def test_what_it_says_and_writes(data, tmp_path, run, said):
    folder = tmp_path / "adapted"
    found = run("adapt", "--model", DEMO, "--data", data, "--adapt", "tent", "--set", "adapt.epochs=1",
                "--num-samples", 60, "--holdout", 0.2, "--device", "cpu", "--output", folder)  # fmt: skip
    assert found.exit_code == 0, said(found)
    for words in ("Adaptation: normalisation statistics", "forward per sample", "on 12 held-out samples",
                  f"Artifact: {folder}"):  # fmt: skip
        assert words in said(found), words
    report = read_report(folder)
    assert (report.methods["adapt"].name, report.methods["adapt"].settings["epochs"]) == ("tent", 1)
    assert (report.samples.n_fit, report.samples.n_held_out) == (48, 12)
    told = run("evaluate", "--model", folder, "--data", data, "--labels", data, "--json", tmp_path / "e.json")
    assert told.exit_code == 0, said(told)
    assert json.loads((tmp_path / "e.json").read_text())["n_left_out"] == 60


def test_bad_input_is_said_plainly(data, tmp_path, run, said):
    arguments = ("adapt", "--model", DEMO, "--data", data, "--device", "cpu", "--output", tmp_path / "o")
    cases = [
        (run(*arguments, "--adapt", "magic"), "adapt must be one of eata, "),
        (run(*arguments, "--set", "select.norm=l2"), "with VERB one of adapt"),
        (run(*arguments, "--set", "adapt.weights=2"), "norm.weights must be from 0 to 1"),
    ]
    for found, words in cases:
        assert words in said(found), f"{words!r} is not in {said(found)!r}"
        assert found.exit_code == _reporting.FAILED
    assert not (tmp_path / "o").exists()
