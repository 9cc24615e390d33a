"""`ttmpd compress` on the demo's network: what it prints and writes, and how it ends."""

import dataclasses
import json
import sys
from inspect import signature

import pytest

import ttmpd
from ttmpd.artifact import format
from ttmpd.artifact.read import read_artifact
from ttmpd.cli.commands import _reporting, compress
from ttmpd.latency.table import UnitLatency
from ttmpd.pipeline import compress as pipeline
from ttmpd.pipeline import report_data
from ttmpd.pipeline.defaults import METHODS
from ttmpd.pipeline.settings import Settings
from ttmpd.storage import locked


def test_compress_says_what_it_did(made, said):
    folder, found = made
    text = said(found)
    assert found.exit_code == 0, text
    for words in (
        "Device: ",
        "1 thread",
        "Adaptation: normalisation statistics",
        "Plan",
        "compressed, predicted",
        "compressed, measured",
        "Target speedup 1.3",
        "Agreement with the adapted model: ",
        "on 9 held-out samples",
        "Seconds: ",
        "distill",
        f"Artifact: {folder}",
    ):
        assert words in text, words
    assert found.stderr == ""


def test_terminal_page_and_card_show_the_same_figures(made, said):
    folder, found = made
    report = json.loads((folder / "report.json").read_text())
    latency, agreement = report["latency"], report["agreement"]
    figures = [
        format.times(latency["speedup"]["median"]),
        format.interval(agreement["share"], agreement["low"], agreement["high"]),
        *(format.milliseconds(latency[name]["median_ms"]) for name in ("original", "compressed")),
    ]
    for text in (said(found), (folder / "report.html").read_text(), (folder / "README.md").read_text()):
        assert [figure for figure in figures if figure not in text] == []


def test_compress_writes_an_artifact_and_cleans_up(made):
    folder, _ = made
    assert not (folder / ".work").exists()
    visible = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert visible == ["README.md", "model.safetensors", "plan.json", "report.html", "report.json"]
    assert len(read_artifact(folder).sample_ids) == 60
    assert ttmpd.load(folder) is not None
    assert json.loads((folder / "report.json").read_text())["command"].split()[0] == "ttmpd"


def n_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_compress_again_and_several_targets(made, data, quick_timing, tmp_path, run, said, quick):
    folder, _ = made
    found = run("compress", "--model", folder, "--data", data, "--targets", "0.9x,0.8x", "--output", tmp_path / "many",
                "--seed", 1, *quick)  # fmt: skip
    assert found.exit_code in (0, _reporting.TARGET_MISSED), said(found)
    for name in ("0.9x", "0.8x"):
        assert n_weights(ttmpd.load(tmp_path / "many" / name)) < n_weights(ttmpd.load(folder))


def test_dry_run_writes_nothing(data, quick_timing, tmp_path, monkeypatch, run, said, demo, quick):
    monkeypatch.chdir(tmp_path)
    found = run("compress", "--model", demo, "--data", data, "--latency", "0.7x", "--dry-run", "--score", "damage",
                "--output", "out", *quick)  # fmt: skip
    assert found.exit_code == 0, said(found)
    assert "would remove" in found.stdout
    assert "What could be reached" in found.stdout
    assert "nothing was written" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_selected_samples(data, quick_timing, tmp_path, run, said, demo, quick):
    found = run("compress", "--model", demo, "--data", data, "--speedup", 1.1, "--score", "random", "--adapt", "none",
                "--select", "puma", "--pool", 100, "--set", "select.norm=l2", "--output", tmp_path / "out",
                *quick)  # fmt: skip
    assert found.exit_code in (0, _reporting.TARGET_MISSED), said(found)
    assert "select" in said(found).partition("Seconds: ")[2]
    assert len(read_artifact(tmp_path / "out").sample_ids) == 60
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["methods"]["select"] == {
        "name": "puma", "settings": {"norm": "l2", "max_iter": 50, "overshoot": 0.02, "classes": 10},
    }  # fmt: skip
    assert told["settings"]["pool"] == 100
    assert "puma" in (tmp_path / "out" / "report.html").read_text()


def test_unreachable_target(data, quick_timing, tmp_path, monkeypatch, run, said, demo, quick):
    monkeypatch.setattr(
        "ttmpd.pipeline.analysis.time_units", lambda _m, units, *_, **__: [UnitLatency(u.id, 0.0, {}) for u in units]
    )
    found = run("compress", "--model", demo, "--data", data, "--speedup", 500, "--score", "random", "--adapt", "none",
                "--output", tmp_path / "out", *quick)  # fmt: skip
    assert found.exit_code == _reporting.TARGET_MISSED
    assert "Target out of reach" in found.stderr
    assert "ask for --speedup" in said(found)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_share_of_the_macs(data, quick_timing, tmp_path, run, said, demo, quick):
    asked = ("compress", "--model", demo, "--data", data, "--score", "random", "--adapt", "none", *quick)
    planned = run(*asked, "--macs", "0.7x", "--dry-run")
    assert planned.exit_code == 0, said(planned)
    for words in ("Plan for 0.7 of the MACs", "ms now, predicted", "Dry run"):
        assert words in said(planned)
    assert "measured on the cut model" not in said(planned)
    made = run(*asked, "--macs", "0.7x", "--output", tmp_path / "out")
    assert made.exit_code == 0, said(made)
    assert "Target 0.7 of the MACs: met" in said(made)
    for wrong, words in (("most", 'must be like "0.7x"'), ("1.2x", "between 0 and 1")):
        refused = run(*asked, "--macs", wrong, "--output", tmp_path / "other")
        assert refused.exit_code == _reporting.FAILED
        assert words in said(refused)


@pytest.fixture
def missed(monkeypatch):
    """Every target counts as missed."""
    judge = report_data._target

    def missed(*arguments):
        return dataclasses.replace(judge(*arguments), met=False, within_spread=False)

    monkeypatch.setattr(report_data, "_target", missed)


@pytest.mark.usefixtures("quick_timing", "missed")
def test_a_missed_share_of_the_macs_says_what_is_left(data, tmp_path, run, said, demo, quick):
    ended = run("compress", "--model", demo, "--data", data, "--macs", "0.7x", "--score", "random", "--adapt", "none",
                "--output", tmp_path / "out", *quick)  # fmt: skip
    assert ended.exit_code == _reporting.TARGET_MISSED
    assert "of the MACs are left" in said(ended)


@pytest.mark.usefixtures("quick_timing", "missed")
def test_missed_target_keeps_the_artifact(data, tmp_path, run, demo, quick):
    ended = run("compress", "--model", demo, "--data", data, "--speedup", 1.1, "--score", "random", "--adapt", "none",
                "--output", tmp_path / "out", *quick)  # fmt: skip
    assert ended.exit_code == _reporting.TARGET_MISSED
    assert "Target missed" in ended.stderr
    assert ttmpd.load(tmp_path / "out") is not None


def test_two_runs_in_one_folder(data, tmp_path, run, said, demo, quick):
    with locked(tmp_path / "out"):
        found = run("compress", "--model", demo, "--data", data, "--speedup", 2, "--output", tmp_path / "out", *quick)
    assert found.exit_code == _reporting.FAILED
    assert "is in use" in said(found)


def test_interrupted(data, tmp_path, monkeypatch, run, said, demo, quick):

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_plan", stop)
    monkeypatch.setattr(sys, "argv", ["ttmpd", "compress", "--output", "my out"])
    folder = tmp_path / "out"
    arguments = ("--model", demo, "--data", data, "--speedup", 2, "--score", "random", "--output", folder)
    found = run("compress", *arguments, *quick)
    assert found.exit_code == _reporting.INTERRUPTED
    assert "continue with:" in said(found)
    assert "\nttmpd compress --output 'my out' --resume\n" in found.stderr
    assert (folder / ".work").is_dir()
    told = run("evaluate", "--model", folder, "--data", data)
    assert "was interrupted; go on with the same command and --resume" in said(told)


def test_options_left_out_mean_what_they_mean_in_python():
    given = {name: parameter.default for name, parameter in signature(compress.command).parameters.items()}
    plain = Settings().to_dict()
    shared = {"num_samples", "pool", "holdout", "batch_size", "device", "seed", "amp"}
    assert shared <= given.keys()
    assert {name: given[name] for name in shared} == {name: plain[name] for name in shared}
    assert given["actions"].split(",") == plain["actions"]
    assert given["units"] is None
    for verb in ("select", "adapt", "score", "plan", "distill", "runtime"):
        assert given[verb] == METHODS[verb] == getattr(Settings(), verb).name
