"""A device beside the CPU: nothing joins tensors of two. Where there is no other, one is pretended."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ttmpd
from pretended_device import pretended
from ttmpd.data.samples import Samples
from ttmpd.distill.one_time import OneTime
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.method import method_class, names
from ttmpd.models.open import open_model
from ttmpd.pipeline.exit_threshold import exit_answers
from ttmpd.quality.margins import DeepFoolConfig, margins
from ttmpd.score.practise import Practise
from ttmpd.students.adversarial import Attack
from ttmpd.students.train import train_student
from ttmpd.testing.tiny_models import example_of_kind, tiny_model, tiny_samples

QUICK: dict[str, Any] = {"num_samples": 16, "holdout": 0.25, "batch_size": 8, "amp": "off"}
PRETENDED = "a device that is pretended"


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else PRETENDED])
def device(request: pytest.FixtureRequest, quick_timing: None) -> Iterator[str]:
    with pretended() if request.param == PRETENDED else contextlib.nullcontext("cuda:0") as found:
        yield str(found)


def compressed(model: nn.Module, samples: Samples, device: str, **settings: Any) -> ttmpd.Result:
    given = QUICK | {"distill": OneTime(steps=2, views=2, batch_size=8), "macs": 0.75, "device": device}
    return ttmpd.compress(model, samples.inputs.float() / 64, **given | settings)


# --- the device that is pretended fails where a real one does


def test_what_joins_two_devices_fails():
    model, here = tiny_model(), torch.zeros(2, 3, 8, 8)
    with pretended() as device:
        model.to(device)
        there = here.to(device)
        assert there.device == device == next(model.parameters()).device
        assert model(there).device == device
        for wrong in (
            lambda: model(here),
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: there.numpy(),
            lambda: torch.randn(3, device=device, generator=torch.Generator()),
        ):
            with pytest.raises((RuntimeError, TypeError), match=r"device|cuda"):
                wrong()
        assert (there + torch.tensor(1.0)).device == device  # a single number may lie anywhere
        assert torch.equal(there.cpu(), here)
        assert torch.zeros(2, device=device).new_ones(2).device == device
    assert torch.zeros(2).device.type == "cpu"


# --- nothing of what is offered joins two


@pytest.mark.parametrize("kind", ["block", "channel", "head", "neuron"])
def test_every_kind_of_unit(kind: str, device: str) -> None:
    model, samples = example_of_kind(kind, 24)
    found = compressed(model, samples, device, units=kind)
    assert any(unit.action != "keep" for unit in found.report.units)
    assert next(found.model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("adapt", names("adapt"))
def test_every_adapter(adapt: str, device: str) -> None:
    found = ttmpd.adapt_to(tiny_model(), tiny_samples(24).inputs.float() / 64, adapt=adapt, device=device,
                           num_samples=24, batch_size=8)  # fmt: skip
    assert all(bool(torch.isfinite(value).all()) for value in found.model.state_dict().values())


@pytest.mark.parametrize("score", names("score"))
def test_every_scorer(score: str, device: str) -> None:
    kind = "neuron" if score == "kcm" else "block"
    given = Practise(steps=2, train_batch_size=8) if score == "practise" else score
    assert compressed(*example_of_kind(kind, 24), device, score=given).report.units


@pytest.mark.parametrize("select", names("select"))
def test_every_selector(select: str, device: str) -> None:
    assert compressed(*example_of_kind("block", 24), device, select=select, pool=20).report.units


@pytest.mark.parametrize("distill", names("distill"))
def test_every_distiller(distill: str, device: str) -> None:
    given = {} if distill == "one_time" else {"distill": method_class("distill", distill)().with_settings(steps=2)}
    assert compressed(*example_of_kind("block", 24), device, **given).report.training.steps


@pytest.mark.parametrize("plan", names("plan"))
def test_every_planner(plan: str, device: str, tmp_path: Path) -> None:
    model, samples = example_of_kind("channel", 24)
    found = compressed(model, samples, device, plan=plan, macs=None, speedup=1.01, units=("block", "channel"),
                       output=tmp_path / "out")  # fmt: skip
    again = ttmpd.load(tmp_path / "out", model=model)
    batch = samples.inputs[:2].float() / 64
    assert torch.allclose(again(batch), found.model(batch), atol=1e-5)


def test_early_exits(device: str) -> None:
    found = RightTool(steps=3, views=1, prune=False).equip(tiny_model().to(device), tiny_samples(40), batch_size=8)
    answers, own = exit_answers(found.model, tiny_samples(8, 2), 8)
    assert answers.shape[1:] == own.shape == (8, 4)
    batch = tiny_samples(8, 2).batch(slice(None), torch.device(device))
    with torch.no_grad():
        found.model.threshold = float(answers[0].softmax(-1).amax(-1).median())
        some = found.model(batch)  # half of the batch goes on
        assert some.device.type == "cuda"
        assert not torch.allclose(some.cpu(), own, atol=1e-4)
        found.model.threshold = 1.1
        assert torch.allclose(found.model(batch).cpu(), own, atol=1e-4)


def test_text(device: str, text_folder: Callable[[str], Path], sentences: Callable[..., list[str]]) -> None:
    for name in ("distilbert", "llama"):
        opened = open_model(f"hf:{text_folder(name)}")
        found = ttmpd.compress(opened, sentences(24), macs=0.9, device=device,
                               **QUICK | {"distill": OneTime(steps=2, views=1, batch_size=8)})  # fmt: skip
        assert any(unit.action != "keep" for unit in found.report.units)


@pytest.mark.parametrize("attack", [None, Attack()])
def test_students(attack: Attack | None, device: str) -> None:
    student, teacher, labels = tiny_model(1).to(device), tiny_model().to(device), torch.arange(24) % 4
    settings: dict[str, Any] = {"fraction": 0.5, "steps": 2, "batch_size": 8, "views": 1, "attack": attack}
    result = train_student(student, tiny_samples(24), labels, teacher=teacher, select="el2n", adapt="norm", **settings)
    assert next(result.model.parameters()).device.type == "cuda"
    assert len(result.selected) == 12


def test_margins(device: str) -> None:
    assert len(margins(tiny_model().to(device), tiny_samples(8), search=DeepFoolConfig())) == 8


def test_evaluation(device: str) -> None:
    images, labels = torch.rand(20, 3, 8, 8), [0, 1, 2, 3] * 5
    found = ttmpd.evaluate(tiny_model(), images, labels, against=tiny_model(1), device=device, batch_size=8)
    assert found.n_samples == 20
    assert ttmpd.inspect(tiny_model(), images, device=device, batch_size=2).units
