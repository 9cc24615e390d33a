"""Reports come back as they were written; those of format 1 in today's words; anything wrong is said plainly."""

import json
from pathlib import Path
from typing import Any

import pytest

from rich_report import of_student, rich, with_exits
from ttmpd.artifact.read_report import read_report
from ttmpd.artifact.report import render_card, render_html, write_report
from ttmpd.errors import CheckpointError

FORMAT_1 = Path(__file__).parent / "format_1"


@pytest.mark.parametrize("report", [rich(), with_exits(), of_student()], ids=lambda report: report.kind)
def test_every_kind_comes_back(report: Any, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    loaded = read_report(tmp_path)
    assert loaded.to_dict() == report.to_dict()
    assert loaded.units == report.units and loaded.latency == report.latency
    assert read_report(tmp_path / "report.json") == loaded


def test_format_1_is_read_in_the_words_of_today() -> None:
    report, old = read_report(FORMAT_1), json.loads((FORMAT_1 / "report.json").read_text())
    assert (report.kind, report.model.id, report.version) == ("compressed", "ttmpd.demo:demo_model", "0.1.0")
    assert report.latency is not None and report.latency.speedup.median == old["latency"]["speedup"]["median"]
    assert report.latency.lossless is not None and report.latency.lossless.changes == old["lossless"]
    assert report.latency.batch_size == 64
    assert report.task.name == "classification" and report.runtime.name == "eager"
    assert report.training is not None and report.training.start_weight == old["fit"]["mixed"]
    assert report.training.checks[-1].agreement == old["fit"]["checks"][-1][1]
    assert [unit.id for unit in report.removed] == [row["id"] for row in old["units"] if row["action"] != "keep"]
    narrowed = next(unit for unit in report.units if unit.n_members and unit.action == "narrow")
    row = next(row for row in old["units"] if row["id"] == narrowed.id)
    assert narrowed.harm == dict(map(tuple, row["width_harms"]))[row["kept"]]
    assert len(report.disagreements) == len(old["parted"])
    assert "is met" in render_html(report) and "is met" in render_card(report)


def broken(tmp_path: Path, edit: Any) -> Path:
    write_report(rich(), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    data = edit(data) or data
    (tmp_path / "report.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(format=3, version="9.9"), r"newer ttmpd \(9\.9\); pip install --upgrade"),
        (lambda data: data.update(format=True), "must state its format"),
        (lambda data: data.pop("format") and None, "must state its format"),
        (lambda data: data.update(format=1), "must hold what a run measured, but is broken: "),
        (lambda data: data["latency"].pop("speedup") and None, "latency must have the keys .* lacks speedup"),
        (lambda data: data.update(toaster=1), "has unknown toaster"),
        (lambda data: data["latency"]["original"].update(median_ms=-1), "median_ms must be finite and at least 0"),
        (lambda data: json.dumps(data)[:200], "whole JSON, but is cut off"),
        (lambda data: "[1]", "must state its format"),
    ],
)  # fmt: skip
def test_a_broken_report_says_so(tmp_path: Path, edit: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_report(broken(tmp_path, edit))


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; check the path"):
        read_report(tmp_path / "nothing")
