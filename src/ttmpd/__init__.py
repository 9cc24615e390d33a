"""Make a pretrained model faster on your device, adapted to your data, without labels.

Example:
    >>> import ttmpd
    >>> result = ttmpd.compress("timm:resnet50.a1_in1k", "photos/", speedup=2.0, output="fast/")  # doctest: +SKIP
    >>> net = ttmpd.load("fast/")  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

from ttmpd.errors import (
    BudgetUnreachableError,
    CheckpointError,
    InvalidValueError,
    MissingPackageError,
    ModelError,
    SamplesError,
    TTMPDError,
    UnknownMethodError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from ttmpd.adapt.eata import EATA
    from ttmpd.adapt.eata_c import EATAC
    from ttmpd.adapt.none import NoAdaptation
    from ttmpd.adapt.norm import Norm
    from ttmpd.adapt.tent import Tent
    from ttmpd.artifact.read import load
    from ttmpd.artifact.write import Result
    from ttmpd.data.open import open_samples
    from ttmpd.data.preprocessing import Preprocessing
    from ttmpd.data.samples import Samples
    from ttmpd.data.tokenization import Tokenization
    from ttmpd.distill.mimic import Mimic
    from ttmpd.distill.one_time import OneTime
    from ttmpd.early_exit.right_tool import RightTool
    from ttmpd.latency.memory import keep_freed_memory
    from ttmpd.models.open import open_model
    from ttmpd.models.opened import OpenedModel
    from ttmpd.pipeline.adapt import adapt_to
    from ttmpd.pipeline.bench import BenchRow, bench
    from ttmpd.pipeline.compress import compress, compress_many
    from ttmpd.pipeline.early_exits import add_early_exits
    from ttmpd.pipeline.evaluate import Accuracy, Evaluation, Quality, evaluate
    from ttmpd.pipeline.inspect import Inspection, Preview, inspect, preview
    from ttmpd.pipeline.settings import Settings, Target
    from ttmpd.plan.greedy import Greedy
    from ttmpd.plan.knapsack import Knapsack
    from ttmpd.quality.agreement import Agreement
    from ttmpd.records import Fit, Plan, Removal, Score, Timing, Unit
    from ttmpd.score.damage import Damage
    from ttmpd.score.magnitude import Magnitude
    from ttmpd.score.practise import Practise
    from ttmpd.score.ttmpd import TTMPD
    from ttmpd.select.eata import Reliable
    from ttmpd.select.el2n import EL2N
    from ttmpd.select.forgetting import Forgetting
    from ttmpd.select.grand import GraNd
    from ttmpd.select.kcenter import KCenter
    from ttmpd.select.puma import PUMA
    from ttmpd.serving.service import OnlineService
    from ttmpd.students.train import train_student
    from ttmpd.surgery.exits.model import EarlyExitModel
    from ttmpd.surgery.units.block import Block

    from_pretrained = load

# Everything that needs torch is imported when it is first asked for: the command line starts at once.
_HOMES = {
    "Accuracy": "pipeline.evaluate",
    "Agreement": "quality.agreement",
    "BenchRow": "pipeline.bench",
    "Block": "surgery.units.block",
    "Damage": "score.damage",
    "EATA": "adapt.eata",
    "EATAC": "adapt.eata_c",
    "EL2N": "select.el2n",
    "EarlyExitModel": "surgery.exits.model",
    "Evaluation": "pipeline.evaluate",
    "Fit": "records",
    "Forgetting": "select.forgetting",
    "GraNd": "select.grand",
    "Greedy": "plan.greedy",
    "Inspection": "pipeline.inspect",
    "KCenter": "select.kcenter",
    "Knapsack": "plan.knapsack",
    "Magnitude": "score.magnitude",
    "Mimic": "distill.mimic",
    "NoAdaptation": "adapt.none",
    "Norm": "adapt.norm",
    "OneTime": "distill.one_time",
    "OpenedModel": "models.opened",
    "PUMA": "select.puma",
    "Plan": "records",
    "Practise": "score.practise",
    "Preprocessing": "data.preprocessing",
    "Preview": "pipeline.inspect",
    "Quality": "pipeline.evaluate",
    "Reliable": "select.eata",
    "Removal": "records",
    "Result": "artifact.write",
    "RightTool": "early_exit.right_tool",
    "Samples": "data.samples",
    "Score": "records",
    "Settings": "pipeline.settings",
    "TTMPD": "score.ttmpd",
    "Target": "pipeline.settings",
    "Tent": "adapt.tent",
    "Tokenization": "data.tokenization",
    "OnlineService": "serving.service",
    "Timing": "records",
    "Unit": "records",
    "adapt_to": "pipeline.adapt",
    "add_early_exits": "pipeline.early_exits",
    "bench": "pipeline.bench",
    "compress": "pipeline.compress",
    "compress_many": "pipeline.compress",
    "evaluate": "pipeline.evaluate",
    "from_pretrained": "artifact.read",
    "inspect": "pipeline.inspect",
    "keep_freed_memory": "latency.memory",
    "load": "artifact.read",
    "open_model": "models.open",
    "open_samples": "data.open",
    "preview": "pipeline.inspect",
    "train_student": "students.train",
}

__all__ = [
    "EATA",
    "EATAC",
    "EL2N",
    "PUMA",
    "TTMPD",
    "Accuracy",
    "Agreement",
    "BenchRow",
    "Block",
    "BudgetUnreachableError",
    "CheckpointError",
    "Damage",
    "EarlyExitModel",
    "Evaluation",
    "Fit",
    "Forgetting",
    "GraNd",
    "Greedy",
    "Inspection",
    "InvalidValueError",
    "KCenter",
    "Knapsack",
    "Magnitude",
    "Mimic",
    "MissingPackageError",
    "ModelError",
    "NoAdaptation",
    "Norm",
    "OneTime",
    "OnlineService",
    "OpenedModel",
    "Plan",
    "Practise",
    "Preprocessing",
    "Preview",
    "Quality",
    "Reliable",
    "Removal",
    "Result",
    "RightTool",
    "Samples",
    "SamplesError",
    "Score",
    "Settings",
    "TTMPDError",
    "Target",
    "Tent",
    "Timing",
    "Tokenization",
    "Unit",
    "UnknownMethodError",
    "UnsupportedError",
    "adapt_to",
    "add_early_exits",
    "bench",
    "compress",
    "compress_many",
    "evaluate",
    "from_pretrained",
    "inspect",
    "keep_freed_memory",
    "load",
    "open_model",
    "open_samples",
    "preview",
    "train_student",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ttmpd")
    if name not in _HOMES:
        raise AttributeError(f"module 'ttmpd' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"ttmpd.{_HOMES[name]}"), "load" if name == "from_pretrained" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
