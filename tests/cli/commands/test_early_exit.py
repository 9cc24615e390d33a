"""`ttmpd early-exit` on the demo's network: what it prints, writes, refuses, and what its artifact is good for."""

import json

import pytest

from ttmpd.artifact.read_report import read_report
from ttmpd.cli.commands import _reporting
from ttmpd.latency.timing import Timings
from ttmpd.pipeline import exit_choice as _choice

DEMO = "ttmpd.demo:demo_model"


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """Nothing is measured: 20 ms for the model, 4 ms to the first exit and 4 more to each further one."""

    def mean_timings(_original, _model, _samples, depths, *_):
        mean = float((4.0 + 4 * depths).mean())
        return Timings({"original": (20.0,), "compressed": (mean,)})

    def exit_ms(_original, model, *_):
        return 20.0, tuple(4.0 + 4 * number for number in range(len(model.heads) + 1))

    monkeypatch.setattr(_choice, "exit_ms", exit_ms)
    monkeypatch.setattr(_choice, "mean_timings", mean_timings)


@pytest.fixture
def arguments(data, tmp_path):
    tool = ("steps=5", "views=1", "prune=false")
    settings = [part for text in tool for part in ("--set", f"early_exit.{text}")]
    return ("early-exit", "--model", DEMO, "--data", data, "--device", "cpu", "--num-samples", 80, *settings,
            "--output", tmp_path / "out")  # fmt: skip


def test_what_it_says_and_writes(arguments, data, tmp_path, monkeypatch, run, said):
    monkeypatch.setattr("sys.argv", ["/usr/bin/ttmpd", "early-exit", "--model", "a net", "--speedup", "1.5"])
    found = run(*arguments, "--speedup", 1.5)
    assert found.exit_code == 0, said(found)
    for words in ("exit behind", "stage1.1", "5 exits behind 13 blocks", "Threshold: 0.", "Target speedup 1.5: met",
                  "on 12 held-out samples", f"Artifact: {tmp_path / 'out'}"):  # fmt: skip
        assert words in said(found), words
    report = read_report(tmp_path / "out")
    assert report.methods["early_exit"].settings["steps"] == 5
    assert report.command == "ttmpd early-exit --model 'a net' --speedup 1.5"
    told = run("evaluate", "--model", tmp_path / "out", "--data", data, "--labels", data, "--against", DEMO,
               "--json", tmp_path / "e.json")  # fmt: skip
    assert told.exit_code == 0, said(told)
    assert json.loads((tmp_path / "e.json").read_text())["n_left_out"] == 80
    assert "must have --data" not in said(run("bench", tmp_path / "out"))
    assert run("bench", tmp_path / "out").exit_code == _reporting.FAILED
    again = run(*arguments[:2], tmp_path / "out", *arguments[3:], "--speedup", 1.2)
    assert "exits come last" in said(again)


def test_labels_and_a_latency(arguments, data, tmp_path, run, said):
    found = run(*arguments, "--latency", "18ms", "--labels", data, "--set", "early_exit.at=2,5")
    assert found.exit_code == 0, said(found)
    assert "2 exits behind 13 blocks learned the model's own answers and labels" in said(found)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [place["path"] for place in plan["early_exit"]["exits"]] == ["stage1.1", "stage1.4"]


def test_bad_input_is_said_plainly(arguments, tmp_path, run, said):
    cases = [
        (run(*arguments, "--speedup", 2, "--method", "magic"), "early_exit must be one of right_tool", 1),
        (run(*arguments, "--speedup", 2, "--set", "early_exit.n_exits=0"), "n_exits must be from 1", 1),
        (run(*arguments, "--speedup", 9), "which the first exit takes", _reporting.TARGET_MISSED),
    ]
    for found, words, code in cases:
        assert words in said(found), f"{words!r} is not in {said(found)!r}"
        assert found.exit_code == code
    assert not (tmp_path / "out").exists()


def test_a_missed_target_ends_with_its_own_code(arguments, tmp_path, run, said, monkeypatch):
    monkeypatch.setattr(_choice, "mean_timings", lambda *_: Timings({"original": (20.0,), "compressed": (19.0,)}))
    monkeypatch.setattr(_choice, "_ATTEMPTS", 1)
    found = run(*arguments, "--speedup", 1.5)
    assert found.exit_code == _reporting.TARGET_MISSED
    assert "Target missed" in said(found)
    assert (tmp_path / "out" / "plan.json").exists()
