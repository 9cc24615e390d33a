"""`ttmpd train-student` end to end on the demo's network: what it prints, writes, refuses, and loads again."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
from click.testing import Result

from ttmpd.artifact.read import read_artifact
from ttmpd.artifact.read_report import read_report
from ttmpd.cli.commands import _reporting, train_student
from ttmpd.storage import locked
from ttmpd.students.recipe import Recipe

DEMO = "ttmpd.demo:demo_model"
NETS = """
from torch import nn
def small():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    net.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    return net
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a factory of a small network."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "nets.py").write_text(NETS)
    return folder


@pytest.fixture(scope="module")
def arguments(place: Path, data: Path) -> tuple[object, ...]:
    return ("train-student", "--student", f"{place}/nets.py:small", "--data", data, "--steps", 8, "--batch-size", 16,
            "--views", 1, "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def made(place: Path, arguments: tuple[object, ...], run: Callable[..., Result]) -> tuple[Path, Result]:
    folder = place / "student"
    return folder, run(*arguments, "--teacher", DEMO, "--fraction", 0.5, "--holdout", 0.2, "--output", folder)


def test_what_it_says(made, said):
    folder, found = made
    assert found.exit_code == 0, said(found)
    for words in ("samples kept 60 of 120, by random", "weight of the teacher 0.75", "teacher passes per kept sample 1",
                  "steps 8", "student, accuracy on 30 held-out samples", "teacher, accuracy on 30 held-out samples",
                  "Seconds: ", f"Student: {folder}"):  # fmt: skip
        assert words in said(found), words
    assert found.stderr == ""


def test_what_it_writes(made, place):
    folder, _ = made
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "README.md", "model.safetensors", "plan.json", "report.html", "report.json"]  # fmt: skip
    report = read_report(folder)
    lesson = report.lesson
    assert (report.kind, report.model.id, lesson.teacher) == ("student", f"{place}/nets.py:small", DEMO)
    assert (lesson.n_samples, len(lesson.sample_names), lesson.alpha) == (120, 60, 0.75)
    assert report.methods["select"].name == "random"
    assert 0 <= lesson.accuracy.low <= lesson.accuracy.share <= lesson.accuracy.high <= 1
    for name in ("README.md", "report.html"):
        text = (folder / name).read_text()
        assert "60 of 120 labelled samples" in text and "Accuracy" in text


def test_the_weights_load_again(made, place, data, run, said):
    folder, _ = made
    found = run("evaluate", "--model", folder, "--source", f"{place}/nets.py:small", "--data", data, "--labels", data,
                "--json", f"{place}/e.json")  # fmt: skip
    assert found.exit_code == 0, said(found)
    evaluation = json.loads((place / "e.json").read_text())
    assert (evaluation["n_samples"], evaluation["n_left_out"]) == (90, 60)  # what it was trained on is left out
    assert read_artifact(folder).kind == "student"


def test_without_a_teacher_and_without_holding_back(arguments, place, run, said):
    found = run(*arguments, "--holdout", 0, "--output", place / "alone")
    assert found.exit_code == 0, said(found)
    assert "weight of the teacher 0 " in said(found)
    assert "Accuracy: not measured" in said(found)
    again = run(*arguments, "--output", place / "alone")
    assert again.exit_code == 0, said(again)


def test_selectors_and_adapters_take_settings(arguments, place, run, said):
    found = run(*arguments, "--teacher", DEMO, "--select", "puma", "--set", "select.max_iter=1", "--adapt", "norm",
                "--alpha", 1, "--balanced", "--num-samples", 40, "--output", place / "chosen")  # fmt: skip
    assert found.exit_code == 0, said(found)
    assert "Adaptation: normalisation statistics" in said(found)
    report = read_report(place / "chosen")
    assert report.methods["select"].settings["max_iter"] == 1
    assert report.lesson.n_samples == 34


def test_random_weights_are_drawn_by_seed(place, data, run, said):
    seen = []
    for seed in (0, 0, 1):
        found = run("train-student", "--student", "timm:test_resnet.r160_in1k", "--no-pretrained", "--data", data,
                    "--steps", 1, "--seed", seed, "--output", place / "timm", "--device", "cpu", "--batch-size", 2,
                    "--views", 1, "--num-samples", 30)  # fmt: skip
        assert found.exit_code == 0, said(found)
        seen.append((place / "timm" / "model.safetensors").read_bytes())
    assert seen[0] == seen[1] != seen[2]


def test_interrupted_and_resumed(arguments, place, monkeypatch, run, said):
    from ttmpd.students import train as student

    def stop(*_, **__):
        raise KeyboardInterrupt

    more = ("--teacher", DEMO, "--output", place / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(student, "train", stop)
        found = run(*arguments, *more)
    assert found.exit_code == _reporting.INTERRUPTED
    assert "--resume" in said(found)
    answers = place / "killed" / ".work" / "answers" / "logits.npy"
    before = answers.stat().st_mtime_ns
    kept = []
    with monkeypatch.context() as patch:
        true = student.train
        patch.setattr(student, "train", lambda *given: (kept.append(answers.stat().st_mtime_ns), true(*given))[1])
        assert run(*arguments, *more, "--resume").exit_code == 0
    assert kept == [before]
    assert not (place / "killed" / ".work").exists()


def test_bad_input_is_said_plainly(arguments, place, data, run, said):
    (place / "mine").mkdir()
    (place / "mine" / "model.safetensors").touch()
    (place / "file").touch()
    out = ("--output", place / "o")
    cases = [
        (run(*arguments, "--fraction", 0, *out), "fraction must keep at least 2 samples"),
        (run(*arguments, "--alpha", "lots", *out), "alpha must be auto or from 0 to 1"),
        (run(*arguments, "--alpha", 0.5, *out), "must have a teacher"),
        (run(*arguments, "--select", "el2n", *out), "select el2n must have a teacher"),
        (run(*arguments, "--set", "plan.step=1", *out), "with VERB one of select, adapt"),
        (run(*arguments, "--holdout", 1, *out), "holdout must be from 0 to 0.9"),
        (run(*arguments, "--labels", place / "nets.py", *out), "labels must be a .csv, .tsv, .jsonl or .npz file"),
        (run(*arguments, "--output", place / "mine"), "output must be a new or empty folder"),
        (run(*arguments, "--output", place / "file"), "is a file"),
        (run("train-student", "--student", place, "--data", data, *out), "a model id must be one of"),
    ]
    for found, words in cases:
        assert words in said(found), f"{words!r} is not in {said(found)!r}"
        assert found.exit_code == _reporting.FAILED
    with locked(place / "o"):
        assert "is in use" in said(run(*arguments, *out))


def test_options_left_out_mean_what_they_mean_in_python():
    defaults = {name: option.default for name, option in signature(train_student.command).parameters.items()}
    shared = ("fraction", "balanced", "alpha", "temperature", "views", "steps", "batch_size", "lr", "seed")
    assert {name: defaults[name] for name in shared} == {name: getattr(Recipe(), name) for name in shared}
    assert (defaults["select"], defaults["adapt"]) == (Recipe().select.name, Recipe().adapt.name)
