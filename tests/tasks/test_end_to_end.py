"""Models that predict something else than one class per sample, from compression to evaluation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.adapt.tent import Tent
from ttmpd.artifact.write import Result
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.pipeline.adapt import adapt_to
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.early_exits import add_early_exits
from ttmpd.pipeline.evaluate import evaluate
from ttmpd.pipeline.inspect import inspect
from ttmpd.tasks.classification import Classification
from ttmpd.tasks.multi_label import MultiLabel
from ttmpd.tasks.segmentation import Segmentation

SETTINGS: dict[str, Any] = {"num_samples": 24, "batch_size": 8, "distill": OneTime(steps=2, views=2), "macs": 0.6}
pytestmark = pytest.mark.usefixtures("quick_timing")


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """(B, 3, 8, 8) to (B, n_outputs)."""

    def __init__(self, n_outputs: int = 5, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(3)])
        self.head = nn.Linear(width, n_outputs)

    def maps(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(x))
        return features

    def features(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((2, 3))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.ink = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return self.head(features), self.ink(features)


class NamedOutputs(Net):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return {"embedding": features, "logits": self.head(features)}


class Dense(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maps(x))


class Pooled(Dense):
    def forward(self, x: Tensor) -> Any:
        return F.adaptive_avg_pool2d(super().forward(x), 1)


class Backbone(Net):
    def forward(self, x: Tensor) -> Any:
        return self.features(x)


class Auxiliary(Net):
    """In train mode a list, whose first entry is another head's."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        stem = self.stem(x)
        scores = self.head(self.blocks(stem).mean((2, 3)))
        return [self.auxiliary(stem.mean((2, 3))), scores] if self.training else scores


class Loss(Net):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return {"loss": scores.square().mean()} if self.training else {"logits": scores}


class AsksItsNorm(Net):
    """Answers otherwise where its batch norm is in train mode."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return (scores, scores) if self.stem[1].training else scores


def settled(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    net.train()
    with torch.no_grad():
        net(images(64, seed=1))
    return net.eval()


def images(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def compressed(net: nn.Module, **settings: Any) -> Result:
    return compress(net, images(), **SETTINGS | settings)


def test_all_heads_are_held() -> None:
    net = settled(TwoHeads())
    result = compressed(net)
    assert result.report.task.name == "classification"
    assert list(result.report.task.settings["parts"]) == ["0", "1"]
    emptied = [r for r in result.plan.removals if r.unit.path.startswith("ink") and not r.kept]
    assert not emptied
    with torch.no_grad():
        outputs = result.model(images())
    assert [tensor.shape[1] for tensor in outputs] == [5, 3]
    assert float(outputs[1].std(0).max()) > 0.0
    with pytest.raises(UnsupportedError, match="one tensor of class scores"):
        add_early_exits(net, images(), speedup=1.2)


def test_of_a_dict_the_logits_are_predicted() -> None:
    result = compressed(settled(NamedOutputs()))
    assert list(result.report.task.settings["parts"]) == ["logits"]
    with torch.no_grad():
        assert list(result.model(images())) == ["embedding", "logits"]
    assert len(result.report.held_out.teacher) == 4


def test_regression_is_not_measured_by_classes() -> None:
    net = settled(Net(1))
    result = compressed(net)
    assert result.report.task.name == "regression"
    assert "nothing done" in result.report.adaptation.note
    assert result.report.held_out.student == () and result.report.disagreements == ()
    with torch.no_grad():
        teacher, student = net(images()), result.model(images())
    assert not torch.allclose(teacher, student, atol=1e-3)
    measured = evaluate(result.model, images(seed=5), against=net)
    assert measured.task == "regression" and measured.model.confidence is None
    assert measured.agreement is not None and measured.agreement.share < 1.0
    with pytest.raises(UnsupportedError, match=r"tent must learn.*use none"):
        adapt_to(net, images(), adapt=Tent(), num_samples=24)


def test_labels_are_trained_and_compared_one_by_one() -> None:
    result = compressed(settled(Net(6)), task="multi_label")
    assert result.report.task.same == MultiLabel.same
    share = result.report.agreement.share
    assert 0.0 < share <= 1.0
    adapted = adapt_to(settled(Net(6)), images(), task="multi_label", adapt=Tent(epochs=1), num_samples=24)
    assert "epochs" in adapted.report.adaptation.numbers


def test_an_embedding_is_held_as_a_vector() -> None:
    result = compressed(settled(Backbone()), task="embedding")
    assert result.report.task.name == "embedding"
    assert result.report.held_out.student == ()


def test_dense_classes_are_named_by_hand() -> None:
    net = settled(Dense())
    for call in (compressed, lambda net: inspect(net, images(), timed=False)):
        with pytest.raises(ModelError, match="task=segmentation"):
            call(net)
    result = compressed(net, task=Segmentation(pixels=16))
    assert result.report.task.each == "pixel"
    assert list(result.report.task.settings["grid"]) == [4, 4]
    assert inspect(net, images(), timed=False, task="segmentation").task == "segmentation"


def test_scores_with_two_axes_too_many_are_refused_with_the_next_step() -> None:
    for call in (compressed, lambda net: inspect(net, images(), timed=False)):
        with pytest.raises(ModelError, match=r"\.flatten\(1\)"):
            call(settled(Pooled()))


@pytest.mark.parametrize("kind", [Auxiliary, Loss])
def test_a_student_is_never_asked_in_its_own_train_mode(kind: type[Net]) -> None:
    net = settled(kind())
    before = {name: value.clone() for name, value in net.state_dict().items() if name.startswith("auxiliary")}
    result = compressed(net)
    assert result.report.training.steps == 2
    after = result.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_another_structure_in_train_mode_is_refused_before_time_is_spent() -> None:
    with pytest.raises(ModelError, match="must answer in train mode as in eval mode"):
        compressed(settled(AsksItsNorm()))


def test_a_task_by_hand_wins() -> None:
    result = compressed(settled(TwoHeads()), task=Classification(parts=("1",)))
    assert list(result.report.task.settings["parts"]) == ["1"]
    assert max(result.report.held_out.teacher) < 3


class Auxiliaries(Net):
    """Scores, and a head that no task predicts unless it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.ink = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return {"ink": self.ink(features), "logits": self.head(features)}


def test_what_feeds_only_unpredicted_outputs_stays_and_is_said_to() -> None:
    net = settled(Auxiliaries())
    result = compressed(net, adapt="none")
    assert "ink.2" in dict(result.report.not_removable)
    assert "only outputs that the task does not predict" in dict(result.report.not_removable)["ink.2"]
    shapes = [{name: value.shape for name, value in part.ink.state_dict().items()} for part in (net, result.model)]
    assert shapes[0] == shapes[1], "nothing of the head that nobody predicts may go"
    with torch.no_grad():
        outputs, original = result.model(images()), net(images())
    assert list(outputs) == ["ink", "logits"]
    off, spread = (outputs["ink"] - original["ink"]).square().mean(), original["ink"].var(0).mean()
    assert float(off) < float(spread), "repair must hold it, too"
    told = inspect(net, images(), timed=False, task=Classification(parts=("ink", "logits")))
    assert any(unit.path == "ink.2" for unit in told.units), "what is predicted by hand may be narrowed"
