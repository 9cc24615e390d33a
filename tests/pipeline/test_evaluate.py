"""Accuracy, calibration and agreement by hand-computed truths; samples that compression used never count."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reports import small_report
from ttmpd.artifact.read import open_any
from ttmpd.artifact.write import Result
from ttmpd.data.open import open_samples
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.errors import CheckpointError, InvalidValueError, ModelError, SamplesError
from ttmpd.models.open import open_model
from ttmpd.pipeline.bench import bench
from ttmpd.pipeline.evaluate import evaluate
from ttmpd.pipeline.inspect import inspect, preview
from ttmpd.pipeline.settings import Target
from ttmpd.quality.proportion import proportion
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.units.block import Block
from ttmpd.testing.tiny_models import tiny_model

DEMO = "ttmpd.demo:demo_model"


class Echo(nn.Module):
    """Answers with its input: the samples are the logits."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def logits(*shares: float) -> Tensor:
    """Two-class rows whose first class has the given probability."""
    p = torch.tensor(shares, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], 1).float()


def pixels(n: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the first ten of ``pixels()``."""
    opened = open_model(DEMO)
    used = open_samples(pixels()[:10], opened.preprocessing)
    units = Block().find(opened.module, used.batch(slice(0, 2))).units
    removals = tuple(Removal(unit, "drop") for unit in units[:6])
    student = repaired(opened.module, removals, used)
    report = small_report(input_shape=(1, 8, 8), batch_size=4)
    folder = tmp_path_factory.mktemp("artifact")
    plan = Plan(removals, 0.0, 2.0, 1.0, 1.0)
    return Result(model=student, plan=plan, opened=opened, sample_ids=used.ids, report=report).save(folder)


def test_numbers_by_hand():
    data = logits(0.9, 0.9, 0.8, 0.3)  # answers 0, 0, 0, 1
    found = evaluate(Echo(), data, [0, 1, 0, 1])
    assert found.n_samples == 4
    assert found.model.confidence == pytest.approx((0.9 + 0.9 + 0.8 + 0.7) / 4)
    interval = proportion(3, 4)
    assert found.model.accuracy is not None
    assert (found.model.accuracy.share, found.model.accuracy.low) == (0.75, interval.low)
    # Bins of a fifteenth: 0.9 twice (half right), 0.8 (right), 0.7 (right).
    assert found.model.calibration_error == pytest.approx((2 * abs(0.9 - 0.5) + 0.2 + 0.3) / 4, abs=1e-6)


def test_without_labels_there_is_no_accuracy():
    found = evaluate(Echo(), logits(0.9, 0.2))
    assert found.model.accuracy is None
    assert found.model.calibration_error is None
    assert found.against is None
    assert found.agreement is None


def test_against_another_model():
    found = evaluate(Echo(), logits(0.9, 0.2, 0.6), [0, 1, 1], against=Echo(-1.0))
    assert found.agreement is not None
    assert found.agreement.share == 0.0
    assert found.against is not None
    assert found.against.accuracy is not None
    assert found.against.accuracy.share == pytest.approx(1 / 3)
    assert evaluate(Echo(), logits(0.9, 0.2), against=Echo(3.0)).agreement.share == 1.0
    assert found.to_dict()["agreement"]["n"] == 3


def test_the_model_is_left_as_it_was():
    net = Echo().train()
    evaluate(net, logits(0.9))
    assert net.training


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_used_samples_are_left_out(artifact, batch_size):
    found = evaluate(artifact, pixels(), against=DEMO, batch_size=batch_size)
    assert (found.n_samples, found.n_left_out) == (30, 10)
    assert evaluate(DEMO, pixels(), against=artifact).n_left_out == 10
    assert evaluate(DEMO, pixels()).n_left_out == 0
    assert evaluate(artifact, pixels(20, seed=5)).n_left_out == 0


def test_labels_belong_to_what_is_left(artifact):
    y = np.full(40, 9)
    answered = np.concatenate([open_any(artifact).module(open_samples(pixels(), open_model(DEMO).preprocessing)
                               .batch(slice(None))).argmax(1).numpy()[None]])[0]  # fmt: skip
    y[10:] = answered[10:]
    found = evaluate(artifact, pixels(), y.tolist())
    assert found.model.accuracy is not None
    assert found.model.accuracy.share == 1.0


def test_files(artifact, tmp_path):
    np.savez(tmp_path / "d.npz", x=pixels(), y=np.zeros(40, dtype=np.int64))
    found = evaluate(str(artifact), tmp_path / "d.npz", tmp_path / "d.npz")
    assert found.model.accuracy is not None
    assert found.model.accuracy.n == 30


def test_nothing_is_left(artifact):
    with pytest.raises(SamplesError, match="all 10 were used; give other data"):
        evaluate(artifact, pixels()[:10])


def test_label_beyond_the_outputs():
    with pytest.raises(SamplesError, match=r"below 2, .* but holds 2; number the classes"):
        evaluate(Echo(), logits(0.9, 0.2), [0, 2])


def test_too_few_labels():
    with pytest.raises(SamplesError, match="has none for 1 of 2"):
        evaluate(Echo(), logits(0.9, 0.2), [0])


def test_answers_that_are_no_scores():
    with pytest.raises(ModelError, match="NaN"):
        evaluate(Echo(float("nan")), logits(0.9))


class Mean(nn.Module):
    """Two class scores from the mean pixel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.pretrained_cfg = Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3).to_dict()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None] * self.weight * torch.tensor([1.0, -1.0]).to(x)


def test_models_with_different_preprocessing_see_the_same_samples():
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    found = evaluate(Mean(16), images, against=Mean(8))
    assert found.agreement is not None
    assert found.agreement.n == 30


def test_bench(artifact, quick_timing):
    rows = bench(artifact, device="cpu")
    assert [row.batch_size for row in rows] == [1, 4]
    for row in rows:
        assert row.original.low_ms <= row.original.median_ms <= row.original.high_ms
        assert row.speedup.low_ms <= row.speedup.median_ms <= row.speedup.high_ms


def test_bench_of_a_users_model_needs_its_source(tmp_path, quick_timing):
    net = tiny_model()
    folder = tmp_path / "out"
    report = small_report(input_shape=(3, 8, 8), batch_size=2)
    Result(model=net, plan=Plan((), 0, 1, 1, 1), opened=open_model(net), sample_ids=(), report=report
    ).save(folder)  # fmt: skip
    with pytest.raises(CheckpointError, match="a module that was passed in"):
        bench(folder)
    rows = bench(folder, "ttmpd.testing.tiny_models:tiny_model", batch_sizes=[2])
    assert len(rows) == 1


def test_bench_refuses_a_batch_of_nothing(artifact):
    with pytest.raises(InvalidValueError, match="batch_sizes must be at least 1"):
        bench(artifact, batch_sizes=[0])


# ---------------------------------------------------------------------------------------------------------- inspection


def test_inspect_with_times(quick_timing):
    found = inspect(DEMO, batch_size=2, device="cpu")
    assert Counter(unit.kind for unit in found.units) == {"block": 12, "channel": 13}
    assert [timing.unit for timing in found.timings] == [unit.id for unit in found.units]
    assert found.input_shape == (1, 8, 8)
    plain = found.to_dict()
    assert plain["units"][0]["id"] == "stage1.0"
    assert 0 < plain["units"][0]["ms_share"] < 1
    assert sum(unit["macs_share"] for unit in plain["units"] if unit["kind"] == "block") < 1
    assert ("down", "changes the shape: (32, 8, 8) to (64, 4, 4)") in found.refused


def test_inspect_without_input_size_needs_samples():
    with pytest.raises(InvalidValueError, match="how large its input is"):
        inspect(tiny_model(), timed=False)
    found = inspect(tiny_model(), torch.randn(5, 3, 8, 8), timed=False)
    assert len(found.units) == 3
    assert found.whole is None
    assert "ms" not in found.to_dict()["units"][0]


def test_preview_plans_and_keeps_nothing(quick_timing):
    from ttmpd import Damage, NoAdaptation

    found = preview(
        DEMO, pixels(), targets=[Target(speedup=1.1), Target(speedup=1.2)], num_samples=30, batch_size=16,
        score=Damage(), adapt=NoAdaptation(), lossless=False,
    )  # fmt: skip
    removed = [len(planned.plan.removals) for planned in found.plans]
    assert min(removed) > 0
    assert found.plans[0].plan.budget_ms > found.plans[1].plan.budget_ms
    assert found.plans[0].pareto_front
