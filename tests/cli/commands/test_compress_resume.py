"""`ttmpd compress` killed in the middle, then continued with `--resume`."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ttmpd
from ttmpd.artifact.read import read_artifact
from ttmpd.cli.commands import _reporting
from ttmpd.pipeline import compress as pipeline


def kill_in_distillation(arguments: Sequence[object], work: Path) -> None:
    """Run a command and kill it when the first state of the training is there: nothing can be tidied up."""
    command = [sys.executable, "-m", "ttmpd.cli.app", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 90
        while not any(path.is_dir() for path in work.glob("distill*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output


def test_killed_in_distillation_then_resumed(data, tmp_path, monkeypatch, run, said, demo, quick):
    folder, work = tmp_path / "out", tmp_path / "out" / ".work"
    arguments = ("compress", "--model", demo, "--data", data, "--speedup", 1.1, "--score", "damage", "--output", folder,
                 *quick, "--steps", 60, "--set", "distill.batch_size=48")  # fmt: skip
    kill_in_distillation(arguments, work)
    assert not (folder / "plan.json").exists()
    planned = json.loads(next(work.glob("plan-*.json")).read_text())["data"]["removals"]
    before = times(work)
    assert {"adapt.safetensors", "timing.json", "score.json"} <= set(before)
    finished = []

    def finish(analysis, start, context, asked, command):
        result = true(analysis, start, context, asked, command)
        unchanged = {name: time for name, time in times(work).items() if name in before}
        finished.append((unchanged, len(asked.stages.reused)))
        return result

    true = pipeline.finish
    monkeypatch.setattr(pipeline, "finish", finish)
    shown = run(*arguments, "--resume")
    assert shown.exit_code in (0, _reporting.TARGET_MISSED), said(shown)
    ((after, n_reused),) = finished
    assert n_reused >= 6  # adapt, timing, score, plan, repair, prepare
    assert after == before
    removals = read_artifact(folder).removals
    assert [[removal.unit.id, removal.action, list(removal.kept)] for removal in removals] == planned
    assert ttmpd.load(folder) is not None
    assert not work.exists()


def times(work: Path) -> dict[str, int]:
    """When each finished stage was written."""
    return {path.name: path.stat().st_mtime_ns for path in work.glob("*.*") if path.name != "run.json"}
