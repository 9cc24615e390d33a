"""Artifacts come back exactly, without pickle and without running what they name; anything wrong is said plainly."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ttmpd
from reports import small_report
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
from ttmpd.surgery.replacements import put
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

DEMO = "ttmpd.demo:demo_model"
TINY = "ttmpd.testing.tiny_models:tiny_model"
REPORT = small_report(input_shape=(1, 8, 8), batch_size=16)


def digits(n: int = 24) -> Samples:
    values = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Samples(values, tuple(f"id{i}" for i in range(n)))


def small(opened: OpenedModel, samples: Samples, *, folded: bool = False) -> tuple[nn.Module, Plan]:
    """The second unit dropped, the third and fourth replaced."""
    units = Block().find(opened.module, samples.batch(slice(0, 2))).units
    actions = zip(units[1:4], ("drop", "linear", "linear"), strict=False)
    removals = tuple(Removal(unit, action) for unit, action in actions)
    student = repaired(opened.module, removals, samples)
    if folded:  # as format 1 left it: the layer behind has taken the replacement up
        put(student, removals[-1].unit, nn.Identity())
    return student, Plan(removals, 0.25, 10.0, 6.0, 5.5)


def save(folder: Path, opened: OpenedModel, samples: Samples) -> tuple[Path, nn.Module]:
    student, plan = small(opened, samples)
    Result(model=student, plan=plan, opened=opened, sample_ids=samples.ids, report=REPORT).save(folder)
    return folder, student


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An artifact of the demo's teacher, and its model."""
    return save(tmp_path_factory.mktemp("made") / "out", open_model(DEMO), digits())


@pytest.fixture
def artifact(made: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made[0], tmp_path / "artifact"))


@torch.no_grad()
def answers(net: nn.Module, samples: Samples) -> Tensor:
    return net(samples.batch(slice(None)))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "plan.json").read_text())
    edit(data)
    (folder / "plan.json").write_text(json.dumps(data))


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


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; check the path"):
        load(tmp_path / "nowhere")


def test_a_file(artifact):
    with pytest.raises(CheckpointError, match="is a file"):
        load(artifact / "plan.json")


def test_interrupted_run(tmp_path):
    (tmp_path / ".work").mkdir()
    with pytest.raises(CheckpointError, match=r"interrupted.*--resume"):
        load(tmp_path)


def test_foreign_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not written by ttmpd; to open a Hugging Face model write hf:"):
        load(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_plan_cut_off(artifact, cut):
    text = (artifact / "plan.json").read_text()
    (artifact / "plan.json").write_text(text[:cut])
    with pytest.raises(CheckpointError, match="cut off or broken"):
        load(artifact)


def test_plan_is_not_text(artifact):
    (artifact / "plan.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CheckpointError, match="cut off or broken"):
        load(artifact)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": "1"}', '{"format": true}', '{"format": 0}'])
def test_foreign_json(artifact, text):
    (artifact / "plan.json").write_text(text)
    with pytest.raises(CheckpointError, match="must state its format"):
        load(artifact)


def test_newer_format(artifact):
    change(artifact, lambda data: data.update(format=FORMAT + 1, ttmpd="9.0", something="new"))
    with pytest.raises(CheckpointError, match=r"written by a newer ttmpd \(9.0\); pip install --upgrade"):
        load(artifact)


def test_unknown_key(artifact):
    change(artifact, lambda data: data.update(code="print(1)"))
    with pytest.raises(CheckpointError, match="known keys only, but has code"):
        load(artifact)


@pytest.mark.parametrize(
    "key", ["model", "preprocessing", "class_names", "input_shape", "plan", "settings", "sample_ids", "weights"]
)
def test_missing_key(artifact, key):
    change(artifact, lambda data: data.pop(key))
    with pytest.raises(CheckpointError, match=f"is broken: no '{key}'"):
        load(artifact)


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "ear"), ("action", "explode"), ("form", "?"), ("layout", "?"), ("activation", "tanh"), ("shape", [])],
)
def test_removal_with_an_unknown_value(artifact, key, value):
    change(artifact, lambda data: data["plan"]["removals"][0].update({key: value}))
    with pytest.raises(CheckpointError, match=r"must be one of|this installation|must be relu|must hold a value"):
        load(artifact)


def test_removal_with_another_key(artifact):
    change(artifact, lambda data: data["plan"]["removals"][0].update(more=1))
    with pytest.raises(CheckpointError, match="differs in more"):
        load(artifact)


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"removals": 3}, {"removals": [3]}])
def test_plan_of_another_form(artifact, value):
    change(artifact, lambda data: data.update(plan=value))
    with pytest.raises(CheckpointError):
        load(artifact)


def test_removal_at_an_unknown_place(artifact):
    change(artifact, lambda data: data["plan"]["removals"][0].update(path="stage9.0"))
    with pytest.raises(CheckpointError, match=r"must fit the given DigitNet.*stage9\.0"):
        load(artifact)


def test_preprocessing_that_breaks_a_rule(artifact):
    change(artifact, lambda data: data["preprocessing"].update(std=[0.0]))
    with pytest.raises(CheckpointError, match="std must hold"):
        load(artifact)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "other.safetensors", "", None])
def test_weights_elsewhere(artifact, name):
    change(artifact, lambda data: data["weights"].update(file=name))
    with pytest.raises(CheckpointError, match=r"must lie in model\.safetensors"):
        load(artifact)


def test_weights_missing(artifact):
    (artifact / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        load(artifact)


@pytest.mark.parametrize("keep", [0, 5, 2000, 100_000])
def test_weights_cut_off(artifact, keep):
    path = artifact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cut off or broken"):
        load(artifact)


def test_weights_of_another_run(artifact):
    state = load_file(artifact / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, artifact / "model.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load(artifact)


def test_wrong_class(artifact):
    with pytest.raises(CheckpointError, match="must be a DigitNet, but got a TinyNet"):
        load(artifact, model=tiny_model())


@pytest.mark.parametrize("other", [DigitNet(widths=(16, 32)), DigitNet(depth=3), DigitNet(depth=7)])
def test_same_class_of_other_shape(artifact, other):
    with pytest.raises(CheckpointError, match="must fit the given DigitNet"):
        load(artifact, model=other)


FACTORY = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from ttmpd.testing.tiny_models import tiny_model
"""


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """(artifact, file) of a model from a user's own factory; the file leaves a mark when it is run."""
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    folder, _ = save(tmp_path / "out", open_model(f"{path}:tiny_model"), tiny_samples())
    (tmp_path / "ran").unlink()
    return folder, path


def test_a_users_factory_is_never_run(own):
    folder, path = own
    with pytest.raises(CheckpointError, match=r"came from your own factory .*mine\.py:tiny_model.*model=net.*--source"):
        load(folder)
    change(folder, lambda data: data["model"].update(rebuildable=True))  # the file's own claim counts nothing
    with pytest.raises(CheckpointError, match="which ttmpd does not run by itself"):
        load(folder)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("name", ["os:getcwd", "ttmpd.demo:demo_data", "builtins:exit", "timm:", "no such form"])
def test_no_code_is_run_for_a_strange_id(artifact, name):
    change(artifact, lambda data: data["model"].update(id=name, rebuildable=True))
    with pytest.raises(CheckpointError, match="which ttmpd does not run by itself"):
        load(artifact)


def test_source_names_the_factory_again(own):
    folder, path = own
    opened = open_artifact(folder, f"{path}:tiny_model")
    assert answers(opened.module, tiny_samples()).shape[0] == len(tiny_samples())
    assert opened.used_ids == tiny_samples().ids


def test_a_library_that_no_longer_knows_the_model(artifact):
    change(artifact, lambda data: data["model"].update(id="torchvision:no_such_net"))
    with pytest.raises(CheckpointError, match="must be possible to build from 'torchvision:no_such_net'"):
        load(artifact)


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
