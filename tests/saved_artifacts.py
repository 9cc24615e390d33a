"""Compress a small model, and save, change and run artifacts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reports import small_report
from ttmpd.artifact.write import Result
from ttmpd.data.samples import Samples
from ttmpd.models.opened import OpenedModel
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.replacements import put
from ttmpd.surgery.units.block import Block

DEMO = "ttmpd.demo:demo_model"
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


@torch.no_grad()
def answers(net: nn.Module, samples: Samples) -> Tensor:
    return net(samples.batch(slice(None)))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "plan.json").read_text())
    edit(data)
    (folder / "plan.json").write_text(json.dumps(data))
