"""Folders that are no artifact, or a broken or foreign one, are refused with the reason."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from saved_artifacts import answers, change, save
from ttmpd.artifact.read import load, open_artifact
from ttmpd.artifact.write import FORMAT
from ttmpd.demo.digits import DigitNet
from ttmpd.errors import CheckpointError
from ttmpd.models.open import open_model
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

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
