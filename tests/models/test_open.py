"""Opening models: every form of id, with the model's own preprocessing."""

import importlib
import os
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from photos import HALF, photo
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.errors import InvalidValueError, MissingPackageError, ModelError, UnsupportedError
from ttmpd.models.config import preprocessing_of
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.testing.tiny_models import tiny_model

DATA = Path(os.environ.get("TTMPD_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))


FACTORIES = """
from dataclasses import dataclass
import torch
from torch import nn
import ttmpd_test_sibling

@dataclass
class Settings:
    width: "int" = 3

class Net(nn.Linear):
    def __init__(self):
        super().__init__(ttmpd_test_sibling.WIDTH, 2)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}

def good():
    return Net().train()

def raising():
    raise RuntimeError("no weights here\\nsecond line")

def number():
    return 7
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "ttmpd_test_sibling.py").write_text("WIDTH = 4\n")
    path = tmp_path / "my zoo.py"
    path.write_text(FACTORIES)
    return path


# --- modules and factories


def test_a_module_is_used_as_it_is() -> None:
    module = nn.Linear(2, 2)
    opened = open_model(module)
    assert opened.module is module
    assert module.training
    assert (opened.id, opened.rebuildable, opened.preprocessing) == ("", False, None)


def test_preprocessing_of_reads_either_dict() -> None:
    module = nn.Linear(2, 2)
    module.pretrained_cfg = {}  # type: ignore[assignment]
    module.default_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (1.0,)}  # type: ignore[assignment]
    assert preprocessing_of(module) == Preprocessing((1, 8, 8), (0.5,), (1.0,))


def test_a_factory_in_a_file(zoo: Path) -> None:
    path_before = list(sys.path)
    opened = open_model(f"{zoo}:good")
    assert isinstance(opened, OpenedModel)
    assert not opened.module.training
    assert not opened.rebuildable
    assert opened.preprocessing == Preprocessing((3, 8, 8), HALF, HALF)
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("raising", "raised RuntimeError: no weights here$"),
        ("number", "returned int"),
        ("god", "good"),
    ],
)
def test_a_factory_that_fails_says_how(zoo: Path, name: str, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        open_model(f"{zoo}:{name}")


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ModelError, match="no_such_package_at_all"):
        open_model(f"{tmp_path / 'broken.py'}:net")
    with pytest.raises(ModelError, match="must exist"):
        open_model(f"{tmp_path / 'absent.py'}:net")


def test_a_factory_in_a_package(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (zoo.parent / "ttmpd_test_package.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(zoo.parent))
    assert isinstance(open_model("ttmpd_test_package:good").module, nn.Linear)
    with pytest.raises(ModelError, match="PYTHONPATH"):
        open_model("ttmpd_test_absent.package:good")


@pytest.mark.parametrize("model", ["net", "", "timm:", "a b:c", "model.pt", "dir/model:net", "x:y z", ":f", "file.py:"])
def test_an_id_of_no_known_form_lists_the_forms(model: str) -> None:
    with pytest.raises(InvalidValueError, match="torchvision:NAME"):
        open_model(model)


# --- libraries


def test_timm_without_weights_keeps_its_preprocessing() -> None:
    pytest.importorskip("timm")
    opened = open_model("timm:resnet10t.c3_in1k", pretrained=False)
    assert opened.preprocessing == Preprocessing(
        (3, 176, 176), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875
    )
    assert opened.rebuildable
    assert not opened.module.training


def test_unknown_and_bare_timm_names_get_a_suggestion() -> None:
    pytest.importorskip("timm")
    with pytest.raises(InvalidValueError, match="resnet18"):
        open_model("timm:resnet18x", pretrained=False)
    with pytest.raises(InvalidValueError, match=r"did you mean timm:resnet18\?"):
        open_model("resnet18")


def test_torchvision_without_weights_keeps_its_preprocessing() -> None:
    pytest.importorskip("torchvision")
    opened = open_model("torchvision:squeezenet1_1", pretrained=False)
    assert opened.preprocessing == Preprocessing(
        (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875
    )
    assert len(opened.class_names) == 1000
    assert opened.rebuildable
    with pytest.raises(InvalidValueError, match="squeezenet1_1"):
        open_model("torchvision:squeezenet11", pretrained=False)
    with pytest.raises(UnsupportedError, match="classify images or their pixels"):
        open_model("torchvision:ssdlite320_mobilenet_v3_large", pretrained=False)


def test_a_resize_that_timm_would_round_down_is_kept() -> None:
    models = pytest.importorskip("torchvision.models")
    transforms = models.get_model_weights("resnet50").DEFAULT.transforms()  # 232, then 224
    ours = Preprocessing((3, 224, 224), tuple(transforms.mean), tuple(transforms.std), "bilinear", 224 / 232)
    image = photo(301, 257)
    expected = transforms(image)
    mean, std = (torch.tensor(value)[:, None, None] for value in (ours.mean, ours.std))
    torch.testing.assert_close((ours.pixels(image).float() / 255 - mean) / std, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_a_failed_download_says_what_to_do(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip(model.partition(":")[0].replace("torchvision", "torchvision.models"))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    seen = []

    def offline(*_: object, **__: object) -> None:
        seen.append(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(library, "create_model" if model.startswith("timm") else "get_model", offline)
    with pytest.raises(ModelError, match=r"--no-pretrained.*--weights FILE.safetensors") as raised:
        open_model(model)
    assert "OSError: Name or service not known;" in str(raised.value)
    assert seen == ["1" if model.startswith("torchvision") else None]  # timm is asked for tensors only by itself
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_timm_takes_nothing_but_tensors_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    hub = importlib.import_module("timm.models._hub")
    path = tmp_path / "weights.bin"
    torch.save({"x": Fraction(1, 2)}, path)  # an object, as a file that runs code when opened holds one
    monkeypatch.setattr(hub, "download_cached_file", lambda *_, **__: str(path), raising=False)
    monkeypatch.setattr(hub, "_get_safe_alternatives", lambda _: (), raising=False)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(path))
    with pytest.raises(ModelError, match=r"(?i)weights.only"):
        open_model("timm:resnet10t")


def test_threads_that_build_at_once_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    true, switches, start = models.get_model, [], threading.Barrier(4)

    def build(*given: Any, **named: Any) -> nn.Module:
        switches.append(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))
        time.sleep(0.002)
        switches.append(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))
        return true(*given, **named)

    def work() -> None:
        start.wait()
        open_model("torchvision:squeezenet1_1", pretrained=False)

    monkeypatch.setattr(models, "get_model", build)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches == ["1"] * 8
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r'pip install "ttmpd\[timm\]"'):
        open_model("timm:resnet18")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "vit"
    config = hf.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "elk"},
    )
    hf.ViTForImageClassification(config).half().save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}, image_std=(0.25, 0.5, 0.5)).save_pretrained(folder)
    return folder


def test_a_hugging_face_directory(vit: Path) -> None:
    opened = open_model(f"hf:{vit}")
    assert opened.class_names == ("cat", "dog", "elk")
    assert opened.preprocessing == Preprocessing((3, 32, 32), HALF, (0.25, 0.5, 0.5), "bilinear", 1.0, "squash")
    assert opened.rebuildable
    assert not opened.module.training
    assert {parameter.dtype for parameter in opened.module.parameters()} == {torch.float32}
    fresh = open_model(f"hf:{vit}", pretrained=False).module.state_dict()
    assert any(not torch.equal(fresh[key], value) for key, value in opened.module.state_dict().items())


def test_a_hugging_face_directory_without_a_head_is_refused(vit: Path, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    body = hf.ViTModel.from_pretrained(vit)
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(ModelError, match=r"missing.*classifier"):
        open_model(f"hf:{tmp_path / 'body'}")


def test_hugging_face_directories_that_cannot_be_opened(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(f"hf:{tmp_path}")
    hf.WhisperConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"images or text, or a decoder, but .* is a WhisperConfig"):
        open_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "settings", "crop_pct", "mode"),
    [
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
            32 / 36,
            "center",
        ),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.8}, 0.8, "center"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, 1.0, "squash"),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 48}}, 1.0, "squash"),
    ],
)
def test_image_processors_are_read_as_they_act(
    vit: Path, tmp_path: Path, kind: str, settings: dict[str, object], crop_pct: float, mode: str
) -> None:
    hf = pytest.importorskip("transformers")
    hf.AutoConfig.from_pretrained(vit).save_pretrained(tmp_path)
    getattr(hf, kind)(**settings).save_pretrained(tmp_path)
    ours = open_model(f"hf:{tmp_path}", pretrained=False).preprocessing
    assert ours is not None
    assert (ours.crop_pct, ours.crop_mode) == (crop_pct, mode)
    image = photo(72, 48)  # no half pixels in the crop: there the libraries round differently
    theirs = hf.AutoImageProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(value)[:, None, None] for value in (ours.mean, ours.std))
    mine = (ours.pixels(image).float() / 255 - mean) / std
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().mean() < 0.02  # they resize tensors, we resize images


# --- weights


def test_weights_are_loaded_from_safetensors(zoo: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {"weight": torch.ones(2, 4), "bias": torch.zeros(2)}
    safetensors.save_file(state, tmp_path / "good.safetensors")
    opened = open_model(f"{zoo}:good", weights=tmp_path / "good.safetensors")
    assert torch.equal(opened.module.state_dict()["weight"], state["weight"])


def test_weights_that_do_not_fit_are_named(zoo: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.ones(2, 5), "head": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=r"1 missing \(bias\) and 2 unexpected \(head \(1,\), weight \(2, 5\)\)"):
        open_model(f"{zoo}:good", weights=tmp_path / "bad.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(ModelError, match="readable"):
        open_model(f"{zoo}:good", weights=tmp_path / "broken.safetensors")


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin", "weights.pkl", "weights"])
def test_pickled_weights_are_refused_unopened(zoo: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(InvalidValueError, match=r"must be a \.safetensors file"):
        open_model(f"{zoo}:good", weights=tmp_path / name)


def test_weights_that_are_not_there(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="existing file"):
        open_model(f"{zoo}:good", weights=tmp_path / "absent.safetensors")


def test_the_real_zoo_opens() -> None:
    if not (DATA / "zoo.py").is_file():
        pytest.skip(f"no real data at {DATA}: set TTMPD_DATA")
    opened = open_model(f"{DATA / 'zoo.py'}:resnet20")
    assert opened.preprocessing is not None
    assert opened.preprocessing.input_size == (3, 32, 32)
    assert opened.module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_before_every_name_of_a_file_of_weights_is_taken_off(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.head.bias.add_(1.0)
    save_file({f"{prefix}{name}": value for name, value in other.state_dict().items()}, tmp_path / "w.safetensors")
    opened = open_model(model, weights=tmp_path / "w.safetensors")
    assert torch.equal(opened.module.head.bias, other.head.bias)
    assert "before every name in w.safetensors is taken off" in caplog.text


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("model", nn.Linear(2, 2))
    save_file({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    before = model.model.weight.detach().clone()
    assert torch.equal(open_model(model, weights=tmp_path / "w.safetensors").module.model.weight, before + 1)
