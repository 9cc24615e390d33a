"""Artifacts come back exactly, without pickle and without running what they name; anything wrong is said plainly."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

import ttmpd
from saved_artifacts import DEMO, REPORT, answers, change, digits, save, small
from ttmpd.artifact import write as saving
from ttmpd.artifact.read import load, open_any, open_artifact, read_artifact
from ttmpd.artifact.run_report import Kind
from ttmpd.artifact.write import FORMAT, Result
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.data.samples import Samples
from ttmpd.demo.digits import DigitNet
from ttmpd.distill.one_time import OneTime
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import CheckpointError, InvalidValueError, TTMPDError, UnsupportedError
from ttmpd.models.config import preprocessing_of
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.storage import disk_guarded
from ttmpd.students.run import run_student
from ttmpd.surgery.find import find_units
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

TINY = "ttmpd.testing.tiny_models:tiny_model"


# ---------------------------------------------------------------------------------------------------------- round trip


def test_comes_back_exactly(made):
    folder, student = made
    again = load(folder)
    assert type(again) is DigitNet
    assert not again.training
    assert torch.equal(answers(again, digits()), answers(student, digits()))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "model.safetensors", "plan.json", "report.html", "report.json",
    ]  # fmt: skip


def test_comes_back_in_a_fresh_process(made, tmp_path):
    folder, student = made
    torch.save(digits().inputs, tmp_path / "x.pt")
    code = (
        "import sys, torch, ttmpd\n"
        f"net = ttmpd.from_pretrained({str(folder)!r})\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"torch.save(net(x).detach(), {str(tmp_path / 'y.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.allclose(found, answers(student, digits()), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, tuple[Path, nn.Module]]:
    """What each command writes about a tiny network, and the model that it gave back."""
    place, inputs = (
        tmp_path_factory.mktemp("kinds"),
        torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    np.savez(place / "images.npz", x=inputs.numpy(), y=np.arange(60) % 4)
    common = {"num_samples": 60, "batch_size": 8}
    one_step = {"adapt": "none", "score": "magnitude", "distill": OneTime(steps=1, views=1)}
    compressed = ttmpd.compress(TINY, inputs, macs=0.9, output=place / "compressed", **one_step, **common)
    adapted = ttmpd.adapt_to(TINY, inputs, output=place / "adapted", **common)
    tool = RightTool(steps=1, views=1)
    exits = ttmpd.add_early_exits(TINY, inputs, latency="1000ms", method=tool, output=place / "exits", num_samples=60)
    recipe = {"steps": 1, "views": 1, "batch_size": 8}
    student = run_student(open_model(TINY), str(place / "images.npz"), None, place / "student", **recipe)
    models = {"compressed": compressed.model, "adapted": adapted.model, "exits": exits.model,
              "student": student.trained.model}  # fmt: skip
    return {kind: (place / kind, model) for kind, model in models.items()}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_comes_back(every_kind, kind):
    folder, model = every_kind[kind]
    assert read_artifact(folder).kind == kind
    assert torch.equal(answers(load(folder, tiny_model()), tiny_samples()), answers(model, tiny_samples()))
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["format"] == FORMAT and plan["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("kind", get_args(Kind))
def test_other_commands_take_every_kind(every_kind, kind):
    folder, _ = every_kind[kind]
    fresh = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    evaluation = ttmpd.evaluate(folder, fresh, against=TINY, source=TINY)
    assert (evaluation.n_samples, evaluation.n_left_out) == (20, 0)
    assert [row.batch_size for row in ttmpd.bench(folder, TINY, batch_sizes=[2], samples=fresh, device="cpu")] == [2]
    if kind == "exits":
        with pytest.raises(UnsupportedError, match="exits"):
            ttmpd.inspect(open_any(folder, TINY), fresh, timed=False)
    else:
        assert ttmpd.inspect(open_any(folder, TINY), fresh, timed=False).units


def test_loading_leaves_the_random_state_alone(made):
    before = torch.get_rng_state()
    load(made[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_of_a_user_is_passed_again(tmp_path):
    net, samples = tiny_model(), tiny_samples()
    folder, student = save(tmp_path / "out", open_model(net), samples)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    again = load(folder, model=net)
    assert torch.equal(answers(again, samples), answers(student, samples))
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_preprocessing_is_attached(tmp_path):
    wanted = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    net = tiny_model()
    opened = OpenedModel(net, "", False, wanted, ("a", "b"))
    folder, _ = save(tmp_path / "out", opened, tiny_samples())
    assert preprocessing_of(load(folder, model=net)) == wanted
    assert read_artifact(folder).class_names == ("a", "b")


def test_tied_weights(tmp_path):
    def tied() -> nn.Module:
        net = tiny_model()
        blocks = [m for m in net.modules() if hasattr(m, "conv1")]
        blocks[0].conv2.weight = blocks[0].conv1.weight
        return net

    folder, student = save(tmp_path / "out", open_model(tied()), tiny_samples())
    assert torch.equal(answers(load(folder, model=tied()), tiny_samples()), answers(student, tiny_samples()))


def test_folded_stand_ins_come_back(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnetv2_50", num_classes=4, layers=(3, 1, 1, 1), channels=(16, 16, 16, 16), stem_chs=8)
    opened = open_model(net.eval())
    samples = Samples(torch.randn(8, 3, 32, 32), tuple(map(str, range(8))))
    student, plan = small(opened, samples, folded=True)
    Result(model=student, plan=plan, opened=opened, sample_ids=(), report=REPORT).save(tmp_path / "o")
    assert torch.equal(answers(load(tmp_path / "o", model=net), samples), answers(student, samples))


def test_an_artifact_can_be_compressed_again(made, tmp_path):
    opened = open_artifact(made[0])
    assert opened.id == DEMO
    assert len(opened.removed) == 3
    samples = Samples(digits().inputs, tuple(f"new{i}" for i in range(24)))
    folder, student = save(tmp_path / "again", opened, samples)
    assert torch.equal(answers(load(folder), samples), answers(student, samples))
    assert len(read_artifact(folder).removals) == 6
    assert len(read_artifact(folder).sample_ids) == 48


def test_a_kind_that_nobody_writes_is_refused(artifact):
    change(artifact, lambda data: data.update(kind="toaster"))
    with pytest.raises(CheckpointError, match="kind must be one of compressed, adapted, exits, student"):
        load(artifact)


def test_saving_twice_replaces(made, artifact):
    save(artifact, open_model(DEMO), digits(10))
    assert len(read_artifact(artifact).sample_ids) == 10
    assert load(artifact) is not None


def test_plan_is_readable(made):
    data = json.loads((made[0] / "plan.json").read_text())
    assert (data["format"], data["kind"]) == (2, "compressed")
    assert data["model"] == {"id": DEMO, "rebuildable": True, "class": "DigitNet"}
    assert [row["action"] for row in data["plan"]["removals"]] == ["drop", "linear", "linear"]
    assert data["plan"]["budget_ms"] == 6.0
    assert data["weights"]["file"] == "model.safetensors"
    assert data["sample_ids"] == list(digits().ids)


def test_a_block_that_was_narrowed_first_and_dropped_later_is_one_removal(tmp_path):
    samples, opened = digits(), open_model(DEMO)
    units = find_units(opened.module, samples.batch(slice(0, 2)), ["channel"]).units
    inside = [Removal(unit, "narrow", tuple(range(unit.widths[-1]))) for unit in units if "stage1" in unit.path]
    student = repaired(opened.module, inside, samples)
    Result(student, Plan(tuple(inside), 0.1, 10.0, 8.0, 8.0), REPORT, samples.ids, opened).save(tmp_path / "once")
    again = open_artifact(tmp_path / "once")
    block = Block().find(again.module, samples.batch(slice(0, 2))).units[0]
    assert block.n_params < Block().find(opened.module, samples.batch(slice(0, 2))).units[0].n_params
    plan = Plan((Removal(block, "drop"),), 0.2, 8.0, 6.0, 6.0)
    twice = repaired(again.module, plan.removals, samples)
    Result(twice, plan, REPORT, samples.ids, again).save(tmp_path / "twice")
    kept = read_artifact(tmp_path / "twice").removals
    assert [r.unit.id for r in kept] == [*(r.unit.id for r in inside if block.path not in r.unit.path), block.id]
    assert len(kept) == len(inside)
    assert torch.equal(answers(load(tmp_path / "twice"), samples), answers(twice, samples))


# -------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(tmp_path, monkeypatch, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(saving, "write_json", fail)
    with pytest.raises((TTMPDError, KeyboardInterrupt)):
        save(tmp_path / "out", open_model(DEMO), digits())
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_leaves_the_old_artifact(artifact, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    with pytest.raises(TTMPDError, match="it is full; free some space"):
        save(artifact, open_model(DEMO), digits())
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


def test_a_really_full_device():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(TTMPDError, match="is full"), disk_guarded(Path("/dev/full")):
        Path("/dev/full").write_text("x")


def test_errors_that_are_not_ours_pass():
    with pytest.raises(PermissionError), disk_guarded(Path("/out")):
        raise PermissionError(errno.EACCES, "Permission denied", "/photos/secret.png")


def test_a_kill_between_the_renames_is_seen(artifact):
    (artifact / "plan.json").unlink()
    (artifact / ".unfinished").touch()
    with pytest.raises(CheckpointError, match="interrupted"):
        load(artifact)
    save(artifact, open_model(DEMO), digits())
    assert load(artifact) is not None


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InvalidValueError, match="would be overwritten"):
        save(tmp_path, open_model(DEMO), digits())
    assert (tmp_path / "README.md").read_text() == "mine"


def test_public_names():
    for name in ttmpd.__all__:
        assert getattr(ttmpd, name) is not None
    assert ttmpd.from_pretrained is ttmpd.load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ttmpd.nothing  # noqa: B018
