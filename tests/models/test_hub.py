"""Models for pixels from torchvision's list, built without a download."""

import pytest
import torch

from ttmpd.errors import UnsupportedError
from ttmpd.models.open import open_model
from ttmpd.pipeline.inspect import inspect

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def test_a_model_for_pixels_is_opened_with_its_preprocessing() -> None:
    opened = open_model("torchvision:lraspp_mobilenet_v3_large", pretrained=False)
    assert opened.preprocessing is not None and opened.preprocessing.input_size == (3, 520, 520)
    assert opened.class_names[15] == "person" and opened.rebuildable
    found = inspect(opened, torch.rand(2, 3, 32, 32), timed=False)
    assert found.task == "segmentation"


def test_the_auxiliary_head_of_published_weights_is_there_without_them() -> None:
    opened = open_model("torchvision:fcn_resnet50", pretrained=False)
    with torch.no_grad():
        assert list(opened.module(torch.rand(1, 3, 32, 32))) == ["out", "aux"]


def test_other_tasks_of_the_library_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="images or their pixels"):
        open_model("torchvision:ssdlite320_mobilenet_v3_large", pretrained=False)
