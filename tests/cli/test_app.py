"""The commands end to end on small models: what they print, write and answer the shell."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import ttmpd
from ttmpd.artifact import format
from ttmpd.artifact.read import read_artifact
from ttmpd.cli import show as display
from ttmpd.cli.commands import _parsing, _reporting, compress, inspect
from ttmpd.errors import InvalidValueError, UnknownMethodError
from ttmpd.latency.table import UnitLatency
from ttmpd.method import VERBS, names
from ttmpd.pipeline.defaults import METHODS
from ttmpd.pipeline.settings import Settings
from ttmpd.storage import locked

DEMO = "ttmpd.demo:demo_model"
QUICK = ("--num-samples", "60", "--batch-size", "16", "--steps", "4", "--device", "cpu", "--set", "distill.views=1",
         "--no-lossless")  # fmt: skip


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Result]) -> tuple[Path, Result]:
    """One artifact, and what was printed while it was made."""
    folder = tmp_path_factory.mktemp("made") / "out"
    return folder, run("compress", "--model", DEMO, "--data", data, "--speedup", 1.3, "--output", folder, *QUICK)


# ------------------------------------------------------------------------------------------------------------ compress


def test_compress_says_what_it_did(made, said):
    folder, found = made
    text = said(found)
    assert found.exit_code == 0, text
    for words in (
        "Device: ",
        "1 thread",
        "Adaptation: normalisation statistics mixed",
        "Plan",
        "compressed, predicted",
        "compressed, measured",
        "Target speedup 1.3",
        "agreement with the teacher, not accuracy",
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


def test_compress_again_and_several_targets(made, data, quick_timing, tmp_path, run, said):
    folder, _ = made
    found = run("compress", "--model", folder, "--data", data, "--targets", "0.9x,0.8x", "--output", tmp_path / "many",
                "--seed", 1, *QUICK)  # fmt: skip
    assert found.exit_code in (0, _reporting.TARGET_MISSED), said(found)
    for name in ("0.9x", "0.8x"):
        assert n_weights(ttmpd.load(tmp_path / "many" / name)) < n_weights(ttmpd.load(folder))


def test_dry_run_writes_nothing(data, quick_timing, tmp_path, monkeypatch, run, said):
    monkeypatch.chdir(tmp_path)
    found = run("compress", "--model", DEMO, "--data", data, "--latency", "0.7x", "--dry-run", "--score", "damage",
                "--output", "out", *QUICK)  # fmt: skip
    assert found.exit_code == 0, said(found)
    assert "would remove" in found.stdout
    assert "What could be reached" in found.stdout
    assert "nothing was written" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_selected_samples(data, quick_timing, tmp_path, run, said):
    found = run("compress", "--model", DEMO, "--data", data, "--speedup", 1.1, "--score", "random", "--adapt", "none",
                "--select", "puma", "--pool", 100, "--set", "select.norm=l2", "--output", tmp_path / "out",
                *QUICK)  # fmt: skip
    assert found.exit_code in (0, _reporting.TARGET_MISSED), said(found)
    assert "select" in said(found).partition("Seconds: ")[2]
    assert len(read_artifact(tmp_path / "out").sample_ids) == 60
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["methods"]["select"] == {"name": "puma", "norm": "l2", "max_iter": 50, "overshoot": 0.02, "classes": 10}
    assert told["settings"]["pool"] == 100
    assert "puma" in (tmp_path / "out" / "report.html").read_text()


def test_unreachable_target(data, quick_timing, tmp_path, monkeypatch, run, said):
    monkeypatch.setattr(
        "ttmpd.pipeline.analysis.time_units", lambda _m, units, *_, **__: [UnitLatency(u.id, 0.0, {}) for u in units]
    )
    found = run("compress", "--model", DEMO, "--data", data, "--speedup", 500, "--score", "random", "--adapt", "none",
                "--output", tmp_path / "out", *QUICK)  # fmt: skip
    assert found.exit_code == _reporting.TARGET_MISSED
    assert "Target out of reach" in found.stderr
    assert "ask for --speedup" in said(found)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_inspect_lists_the_kinds_that_are_asked_for(tmp_path, run, said):
    found = run("inspect", "--model", DEMO, "--no-time", "--units", "channel", "--json", tmp_path / "i.json")
    assert found.exit_code == 0, said(found)
    units = json.loads((tmp_path / "i.json").read_text())["units"]
    assert units
    assert {unit["kind"] for unit in units} == {"channel"}
    assert "units must be some of" in said(run("inspect", "--model", DEMO, "--no-time", "--units", "blocks"))


def test_a_share_of_the_macs(data, quick_timing, tmp_path, run, said):
    asked = ("compress", "--model", DEMO, "--data", data, "--score", "random", "--adapt", "none", *QUICK)
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


def test_a_missed_share_of_the_macs_says_what_is_left(data, quick_timing, tmp_path, monkeypatch, run, said):
    from ttmpd.pipeline import compress as pipeline

    monkeypatch.setattr(pipeline, "_verdict", lambda *_: {"met": False, "within_spread": False})
    found = run("compress", "--model", DEMO, "--data", data, "--macs", "0.7x", "--score", "random", "--adapt", "none",
                "--output", tmp_path / "out", *QUICK)  # fmt: skip
    assert found.exit_code == _reporting.TARGET_MISSED
    assert "of the MACs are left" in said(found)


def test_missed_target_keeps_the_artifact(data, quick_timing, tmp_path, monkeypatch, run):
    from ttmpd.pipeline import compress as pipeline

    true = pipeline.Result

    def missed(*arguments, **more):
        made = true(*arguments, **more)
        object.__setattr__(made, "met", False)
        return made

    monkeypatch.setattr(pipeline, "Result", missed)
    found = run("compress", "--model", DEMO, "--data", data, "--speedup", 1.1, "--score", "random", "--adapt", "none",
                "--output", tmp_path / "out", *QUICK)  # fmt: skip
    assert found.exit_code == _reporting.TARGET_MISSED
    assert "Target missed" in found.stderr
    assert ttmpd.load(tmp_path / "out") is not None


def test_two_runs_in_one_folder(data, tmp_path, run, said):
    with locked(tmp_path / "out"):
        found = run("compress", "--model", DEMO, "--data", data, "--speedup", 2, "--output", tmp_path / "out", *QUICK)
    assert found.exit_code == _reporting.FAILED
    assert "is in use" in said(found)


def test_interrupted(data, tmp_path, monkeypatch, run, said):
    from ttmpd.pipeline import compress as pipeline

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_plan", stop)
    monkeypatch.setattr(sys, "argv", ["ttmpd", "compress", "--output", "my out"])
    folder = tmp_path / "out"
    arguments = ("--model", DEMO, "--data", data, "--speedup", 2, "--score", "random", "--output", folder)
    found = run("compress", *arguments, *QUICK)
    assert found.exit_code == _reporting.INTERRUPTED
    assert "go on with: ttmpd compress --output 'my out' --resume" in said(found)
    assert (folder / ".work").is_dir()
    told = run("evaluate", "--model", folder, "--data", data)
    assert "was interrupted; go on with the same command and --resume" in said(told)


# -------------------------------------------------------------------------------------------------------------- resume


def start(arguments: Sequence[object]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ttmpd.cli.app", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_in_distillation_then_resumed(data, tmp_path, run, said):
    folder = tmp_path / "out"
    work = folder / ".work"
    arguments = ["compress", "--model", DEMO, "--data", data, "--speedup", 1.1, "--score", "damage", "--output", folder,
                 *QUICK]  # fmt: skip
    arguments[arguments.index("--steps") + 1] = "60"
    process = start([*arguments, "--set", "distill.batch_size=48"])
    try:
        deadline = time.monotonic() + 90
        while (
            not any(path.is_dir() for path in work.glob("distill*"))
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.02)
        process.kill()  # SIGKILL: nothing can be tidied up
    finally:
        output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert not (folder / "plan.json").exists()
    plan_file = next(work.glob("plan-*.json"))
    planned = json.loads(plan_file.read_text())["data"]["removals"]
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.*")}
    assert {"adapt.safetensors", "timing.json", "score.json"} <= set(before)

    pieces: dict[str, int] = {}
    from ttmpd.pipeline import compress as pipeline

    true = pipeline.finish

    def finish(analysis, planned, start, stages, *more):
        result = true(analysis, planned, start, stages, *more)
        pieces.update({name: (work / name).stat().st_mtime_ns for name in before if name != "run.json"})
        pieces["reused"] = len(stages.reused)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "finish", finish)
        found = run(*arguments, "--set", "distill.batch_size=48", "--resume")
    assert found.exit_code in (0, _reporting.TARGET_MISSED), said(found)
    assert pieces.pop("reused") >= 6  # adapt, timing, score, plan, repair, prepare
    assert pieces == {name: when for name, when in before.items() if name != "run.json"}
    artifact = read_artifact(folder)
    assert [[removal.unit.id, removal.action, list(removal.kept)] for removal in artifact.removals] == planned
    assert ttmpd.load(folder) is not None
    assert not work.exists()


# ------------------------------------------------------------------------------------------------- the other commands


def test_evaluate_leaves_used_samples_out(made, data, tmp_path, run, said):
    found = run("evaluate", "--model", made[0], "--data", data, "--labels", data, "--against", DEMO,
                "--json", tmp_path / "e.json")  # fmt: skip
    assert found.exit_code == 0, said(found)
    assert "90 samples; intervals are 95 % Wilson." in said(found)
    assert "60 samples left out: compression had used them." in said(found)
    assert json.loads((tmp_path / "e.json").read_text())["n_left_out"] == 60


def test_bench(made, quick_timing, run):
    found = run("bench", made[0], "--batch-size", 1, "--batch-size", 8, "--device", "cpu")
    assert found.exit_code == 0
    assert "speedup" in found.stdout
    assert "1 thread" in found.stdout


def test_methods_are_read_from_the_files(run):
    found = run("methods")
    assert found.exit_code == 0
    for verb in VERBS:
        for name in names(verb):
            assert any(f" {verb} " in line and f" {name} " in line for line in found.stdout.splitlines()), name


def test_methods_lists_the_settings_of_one(run, said):
    text = said(run("methods", "distill", "one_time"))
    for words in ("Settings of distill.one_time", "distill.steps", "400", "distill.views", "Fixed views per sample"):
        assert words in text
    assert "has no settings" in said(run("methods", "adapt", "none"))
    refused = run("methods", "adaptation")
    assert refused.exit_code == _reporting.FAILED
    assert "VERB, NAME or VERB NAME" in said(refused)


def test_version(run):
    found = run("--version")
    assert found.exit_code == 0
    assert found.stdout == f"ttmpd {ttmpd.__version__}\n"


def test_help_lists_commands_by_place_and_options_by_section(run):
    lines = [line.strip("│ ").split() for line in run("--help").stdout.splitlines()]
    listed = [line[0] for line in lines if line]
    places = [listed.index(name) for name in ("inspect", "compress", "evaluate", "bench", "adapt", "early-exit")]
    assert places == sorted(places)
    text = run("compress", "--help").stdout
    for words_of_help in ("─ Target ─", "─ Data ─", "─ Methods ─", "─ Run ─", "─ Model ─", "─ Output ─", "12ms|0.6x"):
        assert words_of_help in text


def test_inspect_and_its_json(quick_timing, tmp_path, run):
    found = run("inspect", "--model", DEMO, "--batch-size", 2, "--json", tmp_path / "i.json")
    assert found.exit_code == 0
    assert "25 removable units" in found.stdout
    data = json.loads((tmp_path / "i.json").read_text())
    assert [unit["id"] for unit in data["units"]][:2] == ["stage1.0", "channel:stage1.0.conv2"]
    assert data["whole"]["median_ms"] > 0


PLAIN = """
from torch import nn
def plain():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    net.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1)}
    return net
def nan():
    net = plain()
    net[0].weight.data.fill_(float("nan"))
    return net
def broken():
    raise OSError("no network")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(PLAIN)
    return path


def test_inspect_of_a_model_without_units(factory, run):
    found = run("inspect", "--model", f"{factory}:plain", "--no-time")
    assert found.exit_code == 0
    assert "Nothing is removable" in found.stdout


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_bad_input_is_said_plainly(data, factory, images, tmp_path, run, said):
    def compress(*more: object, model: object = DEMO, data: object = data) -> Result:
        arguments = ("--model", model, "--data", data, "--speedup", 2, "--output", tmp_path / "o")
        return run("compress", *arguments, *QUICK, *more)

    (tmp_path / "file").touch()
    (tmp_path / "labels.csv").write_text("file,label\n0,cat\n")
    floats = tmp_path / "floats.npy"
    np.save(floats, np.zeros((20, 3, 8, 8), dtype=np.float32))
    cases = [
        (compress(data=tmp_path / "nowhere"), "does not exist; check the path"),
        (compress(data=images), "broken.png: cannot be read as an image"),
        (compress(model="resnet50"), "a model id must be one of timm:NAME"),
        (compress(model="timm:resnet51"), "did you mean"),
        (compress(model=f"{factory}:broken"), "raised OSError: no network"),
        (compress(model=f"{factory}:nan", data=floats), "NaN or infinity"),
        (compress(model=f"{factory}:plain", data=floats), "none was found"),
        (compress(model=images), "not written by ttmpd"),
        (compress("--weights", data), "must be a .safetensors file"),
        (compress("--adapt", "magic"), "adapt must be one of eata, "),
        (compress("--select", "magic"), "select must be one of eata, el2n, forgetting, grand, kcenter, puma, random"),
        (compress("--select", "puma", "--set", "select.norm=l7"), "norm must be one of l2, linf"),
        (compress("--set", "score.nothing=1"), "must be one of ['"),
        (compress("--set", "score.ridge=much"), "must be a float"),
        (compress("--set", "ridge=1"), "must be VERB.FIELD=VALUE"),
        (compress("--actions", "explode"), "actions must be some of drop, linear"),
        (compress("--time-budget", "soon"), "must be like 90s, 10min or 1h"),
        (compress("--device", "abacus"), "device must be auto, cpu, cuda or mps"),
        (compress("--holdout", 2), "holdout must be from 0 to 0.9"),
        (compress("--output", tmp_path / "file"), "is a file"),
        (run("compress", "--model", DEMO, "--data", data, "--latency", "soon", "--output", tmp_path / "o"), "12ms"),
        (run("compress", "--model", DEMO, "--data", data, "--targets", "1x", "--output", tmp_path / "o"), "0x and 1x"),
        (run("evaluate", "--model", DEMO, "--data", data, "--labels", tmp_path / "labels.csv"), "line 2"),
        (
            run("evaluate", "--model", DEMO, "--data", data, "--labels", images),
            "labels must be a .csv, .tsv, .jsonl or .npz file",
        ),
        (run("evaluate", "--model", tmp_path / "no", "--data", data), "a model id must be one of"),
        (run("bench", tmp_path / "no"), "does not exist"),
    ]
    for found, words in cases:
        assert words in said(found), f"{words!r} is not in {said(found)!r}"
        assert found.exit_code == _reporting.FAILED
        assert "Traceback" not in found.output
        assert found.stderr


def test_wrong_usage(data, run, said):
    for arguments, words in (
        (("--speedup", 2, "--latency", "0.5x", "--output", "o"), "exactly one of"),
        (("--output", "o"), "exactly one of"),
        (("--speedup", 2), "--output DIR, or --dry-run"),
    ):
        found = run("compress", "--model", DEMO, "--data", data, *arguments)
        assert found.exit_code == 2
        assert words in said(found)


def test_verbose_shows_where_an_error_came_from(tmp_path, run):
    found = run("bench", tmp_path / "no", "--verbose")
    assert found.exit_code == _reporting.FAILED
    assert "Traceback" in found.stderr


def test_help_loads_no_torch():
    code = "import sys, ttmpd.cli.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------------------------- parsing


def test_methods_from_options():
    chosen = _parsing.choose_methods(
        {"adapt": "none", "score": "ttmpd", "plan": "greedy", "distill": "one_time"},
        ["score.ridge=1e-2", "distill.train_norm=no"],
        7,
    )
    assert chosen["score"].ridge == 0.01
    assert chosen["distill"].steps == 7
    assert chosen["distill"].train_norm is False
    assert chosen["adapt"].name == "none"
    with pytest.raises(UnknownMethodError):
        _parsing.choose_methods({"plan": "none", "distill": "one_time"}, [], None)


@pytest.mark.parametrize("text", ["", "s", "-3s", "0min", "inf", "nan", "3 days"])
def test_durations_that_are_none(text):
    with pytest.raises(InvalidValueError, match="must be like 90s"):
        _parsing.parse_duration(text)


def test_durations():
    assert [_parsing.parse_duration(text) for text in ("90s", "10min", "2m", "1h", "45")] == [90, 600, 120, 3600, 45]


class Recorder:
    """Stands for rich's Progress."""

    def __init__(self) -> None:
        self.log: list[object] = []

    def add_task(self, name, total):
        self.log.append(("add", name, total))
        return 7

    def update(self, bar, completed, total):
        self.log.append(("at", completed))

    def remove_task(self, bar):
        self.log.append("remove")


def test_bars_are_for_long_stages_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    recorder = Recorder()
    bars = display._Bars(recorder)
    for done in range(1, 11):
        bars("short", done, 10)
    assert recorder.log == []
    for done in range(1, 5):
        now[0] += 0.6
        bars("long", done, 4)
    assert recorder.log == [("add", "long", 4), ("at", 3), "remove"]


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
    assert signature(inspect.command).parameters["units"].default is None
