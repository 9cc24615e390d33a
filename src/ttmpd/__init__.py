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
    from ttmpd.adapting import adapt_to
    from ttmpd.batches import Samples
    from ttmpd.checkpoint import load
    from ttmpd.distill.mimic import Mimic
    from ttmpd.distill.one_time import OneTime
    from ttmpd.early_exit._model import EarlyExitModel
    from ttmpd.early_exit.right_tool import RightTool
    from ttmpd.evaluation import Accuracy, BenchRow, Evaluation, Quality, bench, evaluate
    from ttmpd.exiting import add_early_exits
    from ttmpd.inspection import Inspection, Preview, inspect, preview
    from ttmpd.memory import keep_freed_memory
    from ttmpd.models import OpenedModel, open_model
    from ttmpd.pipeline import compress, compress_many
    from ttmpd.plan.greedy import Greedy
    from ttmpd.plan.knapsack import Knapsack
    from ttmpd.preprocessing import Preprocessing
    from ttmpd.records import Agreement, Fit, Plan, Removal, Score, Timing, Unit
    from ttmpd.samples import open_samples
    from ttmpd.saving import Result
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
    from ttmpd.serving.online import TestTime
    from ttmpd.settings import Settings, Target
    from ttmpd.students.student import train_student
    from ttmpd.text import Tokenization
    from ttmpd.units.block import Block

    from_pretrained = load

# Everything that needs torch is imported when it is first asked for: the command line starts at once.
_HOMES = {
    "Accuracy": "evaluation",
    "Agreement": "records",
    "BenchRow": "evaluation",
    "Block": "units.block",
    "Damage": "score.damage",
    "EATA": "adapt.eata",
    "EATAC": "adapt.eata_c",
    "EL2N": "select.el2n",
    "EarlyExitModel": "early_exit._model",
    "Evaluation": "evaluation",
    "Fit": "records",
    "Forgetting": "select.forgetting",
    "GraNd": "select.grand",
    "Greedy": "plan.greedy",
    "Inspection": "inspection",
    "KCenter": "select.kcenter",
    "Knapsack": "plan.knapsack",
    "Magnitude": "score.magnitude",
    "Mimic": "distill.mimic",
    "NoAdaptation": "adapt.none",
    "Norm": "adapt.norm",
    "OneTime": "distill.one_time",
    "OpenedModel": "models",
    "PUMA": "select.puma",
    "Plan": "records",
    "Practise": "score.practise",
    "Preprocessing": "preprocessing",
    "Preview": "inspection",
    "Quality": "evaluation",
    "Reliable": "select.eata",
    "Removal": "records",
    "Result": "saving",
    "RightTool": "early_exit.right_tool",
    "Samples": "batches",
    "Score": "records",
    "Settings": "settings",
    "TTMPD": "score.ttmpd",
    "Target": "settings",
    "Tent": "adapt.tent",
    "Tokenization": "text",
    "TestTime": "serving.online",
    "Timing": "records",
    "Unit": "records",
    "adapt_to": "adapting",
    "add_early_exits": "exiting",
    "bench": "evaluation",
    "compress": "pipeline",
    "compress_many": "pipeline",
    "evaluate": "evaluation",
    "from_pretrained": "checkpoint",
    "inspect": "inspection",
    "keep_freed_memory": "memory",
    "load": "checkpoint",
    "open_model": "models",
    "open_samples": "samples",
    "preview": "inspection",
    "train_student": "students.student",
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
    "TestTime",
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
