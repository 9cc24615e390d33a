"""Make a pretrained model faster on your device, adapted to your data, without labels.

Example:
    >>> import ttmpd
    >>> result = ttmpd.compress("timm:resnet50.a1_in1k", "photos/", speedup=2.0, output="fast/")  # doctest: +SKIP
    >>> net = ttmpd.load("fast/")  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "BenchRow": "pipeline.bench",
    "Block": "surgery.units.block",
    "BudgetUnreachableError": "errors",
    "Channel": "surgery.units.channel",
    "CheckpointError": "errors",
    "Damage": "score.damage",
    "EATA": "adapt.eata",
    "EATAC": "adapt.eata_c",
    "EL2N": "select.el2n",
    "Eager": "runtimes.eager",
    "EarlyExitModel": "surgery.exits.model",
    "Evaluation": "pipeline.evaluate",
    "Forgetting": "select.forgetting",
    "GraNd": "select.grand",
    "Greedy": "plan.greedy",
    "Head": "surgery.units.head",
    "Inspection": "pipeline.inspect",
    "InvalidValueError": "errors",
    "KCM": "score.kcm",
    "KCenter": "select.kcenter",
    "Knapsack": "plan.knapsack",
    "Magnitude": "score.magnitude",
    "Mimic": "distill.mimic",
    "MissingPackageError": "errors",
    "ModelError": "errors",
    "Neuron": "surgery.units.neuron",
    "NoAdaptation": "adapt.none",
    "Norm": "adapt.norm",
    "OneTime": "distill.one_time",
    "OnlineService": "serving.service",
    "OpenedModel": "models.opened",
    "PUMA": "select.puma",
    "Plan": "records",
    "Practise": "score.practise",
    "Preprocessing": "data.preprocessing",
    "Preview": "pipeline.inspect",
    "Proportion": "quality.proportion",
    "Quality": "pipeline.evaluate",
    "Reliable": "select.eata",
    "Removal": "records",
    "Result": "artifact.write",
    "RightTool": "early_exit.right_tool",
    "RunReport": "artifact.run_report",
    "Samples": "data.samples",
    "SamplesError": "errors",
    "Score": "records",
    "Settings": "pipeline.settings",
    "TTMPD": "score.ttmpd",
    "TTMPDError": "errors",
    "Target": "pipeline.settings",
    "Tent": "adapt.tent",
    "Timing": "latency.timing",
    "Tokenization": "data.tokenization",
    "TrainingResult": "training.loop",
    "Unit": "records",
    "UnknownMethodError": "errors",
    "UnsupportedError": "errors",
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
    "read_report": "artifact.read_report",
    "train_student": "students.train",
}
"""Public name -> its module in ``ttmpd``. Each is imported when it is first asked for.

A new name is written here and, for type checkers, below: ``tests/test_public_names.py`` prints what it should be.
"""

if TYPE_CHECKING:
    from ttmpd.adapt.eata import EATA as EATA
    from ttmpd.adapt.eata_c import EATAC as EATAC
    from ttmpd.adapt.none import NoAdaptation as NoAdaptation
    from ttmpd.adapt.norm import Norm as Norm
    from ttmpd.adapt.tent import Tent as Tent
    from ttmpd.artifact.read import load as load
    from ttmpd.artifact.read_report import read_report as read_report
    from ttmpd.artifact.run_report import RunReport as RunReport
    from ttmpd.artifact.write import Result as Result
    from ttmpd.data.open import open_samples as open_samples
    from ttmpd.data.preprocessing import Preprocessing as Preprocessing
    from ttmpd.data.samples import Samples as Samples
    from ttmpd.data.tokenization import Tokenization as Tokenization
    from ttmpd.distill.mimic import Mimic as Mimic
    from ttmpd.distill.one_time import OneTime as OneTime
    from ttmpd.early_exit.right_tool import RightTool as RightTool
    from ttmpd.errors import BudgetUnreachableError as BudgetUnreachableError
    from ttmpd.errors import CheckpointError as CheckpointError
    from ttmpd.errors import InvalidValueError as InvalidValueError
    from ttmpd.errors import MissingPackageError as MissingPackageError
    from ttmpd.errors import ModelError as ModelError
    from ttmpd.errors import SamplesError as SamplesError
    from ttmpd.errors import TTMPDError as TTMPDError
    from ttmpd.errors import UnknownMethodError as UnknownMethodError
    from ttmpd.errors import UnsupportedError as UnsupportedError
    from ttmpd.latency.memory import keep_freed_memory as keep_freed_memory
    from ttmpd.latency.timing import Timing as Timing
    from ttmpd.models.open import open_model as open_model
    from ttmpd.models.opened import OpenedModel as OpenedModel
    from ttmpd.pipeline.adapt import adapt_to as adapt_to
    from ttmpd.pipeline.bench import BenchRow as BenchRow
    from ttmpd.pipeline.bench import bench as bench
    from ttmpd.pipeline.compress import compress as compress
    from ttmpd.pipeline.compress import compress_many as compress_many
    from ttmpd.pipeline.early_exits import add_early_exits as add_early_exits
    from ttmpd.pipeline.evaluate import Evaluation as Evaluation
    from ttmpd.pipeline.evaluate import Quality as Quality
    from ttmpd.pipeline.evaluate import evaluate as evaluate
    from ttmpd.pipeline.inspect import Inspection as Inspection
    from ttmpd.pipeline.inspect import Preview as Preview
    from ttmpd.pipeline.inspect import inspect as inspect
    from ttmpd.pipeline.inspect import preview as preview
    from ttmpd.pipeline.settings import Settings as Settings
    from ttmpd.pipeline.settings import Target as Target
    from ttmpd.plan.greedy import Greedy as Greedy
    from ttmpd.plan.knapsack import Knapsack as Knapsack
    from ttmpd.quality.proportion import Proportion as Proportion
    from ttmpd.records import Plan as Plan
    from ttmpd.records import Removal as Removal
    from ttmpd.records import Score as Score
    from ttmpd.records import Unit as Unit
    from ttmpd.runtimes.eager import Eager as Eager
    from ttmpd.score.damage import Damage as Damage
    from ttmpd.score.kcm import KCM as KCM
    from ttmpd.score.magnitude import Magnitude as Magnitude
    from ttmpd.score.practise import Practise as Practise
    from ttmpd.score.ttmpd import TTMPD as TTMPD
    from ttmpd.select.eata import Reliable as Reliable
    from ttmpd.select.el2n import EL2N as EL2N
    from ttmpd.select.forgetting import Forgetting as Forgetting
    from ttmpd.select.grand import GraNd as GraNd
    from ttmpd.select.kcenter import KCenter as KCenter
    from ttmpd.select.puma import PUMA as PUMA
    from ttmpd.serving.service import OnlineService as OnlineService
    from ttmpd.students.train import train_student as train_student
    from ttmpd.surgery.exits.model import EarlyExitModel as EarlyExitModel
    from ttmpd.surgery.units.block import Block as Block
    from ttmpd.surgery.units.channel import Channel as Channel
    from ttmpd.surgery.units.head import Head as Head
    from ttmpd.surgery.units.neuron import Neuron as Neuron
    from ttmpd.training.loop import TrainingResult as TrainingResult

    from_pretrained = load

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ttmpd")
    if name not in _MODULES:
        raise AttributeError(f"module 'ttmpd' has no attribute {name!r}")
    module = importlib.import_module(f"ttmpd.{_MODULES[name]}")
    globals()[name] = value = getattr(module, "load" if name == "from_pretrained" else name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
