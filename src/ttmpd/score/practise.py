"""PRACTISE's recoverability: the error that is left after small adaptors around a removed block were trained."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.data.views import random_view
from ttmpd.errors import UnsupportedError
from ttmpd.method import check_fields
from ttmpd.models.modules import module_at, replace_module
from ttmpd.models.run import evaluating
from ttmpd.models.taps import Tap, find_feature_tap, read_taps
from ttmpd.models.trace import trace
from ttmpd.progress import track
from ttmpd.records import DepthUnit, RefitScope, Removal, Score, Unit
from ttmpd.score.base import Scorer, ScoringInputs
from ttmpd.surgery.cut import build
from ttmpd.training.loop import Loop, Schedule, batch_order, train


class Practise(Scorer):
    """R of each block: error of the last feature map after 1x1 adaptors around the removed block were trained."""

    source: ClassVar[str] = (
        "Wang and Wu, CVPR 2023 (arXiv 2202.07861); adaptors, schedule and loss as in the authors' code"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    refit_scope: ClassVar[RefitScope] = "removed_only"  # the authors' students keep the weights they had
    steps: int = 1000
    """Adaptor iterations per block."""
    lr: float = 0.02
    train_batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, steps=0, train_batch_size=1)

    def can_judge(self, model: nn.Module, unit: Unit) -> bool:
        """True for blocks that contain their shortcut: adaptors are put around them."""
        return super().can_judge(model, unit) and isinstance(unit, DepthUnit) and not unit.branch

    def scores(self, inputs: ScoringInputs) -> Iterable[Score]:
        """One score per unit for "drop": the mean squared error that remains.

        Raises:
            UnsupportedError: the model has no feature map before pooling, or its blocks hold no convolutions.

        Cost: ``steps`` training steps per unit, with the teacher in the loop.
        """
        pair = inputs.samples.batch(slice(0, 2), inputs.device)
        tap = find_feature_tap(inputs.teacher, pair)
        if tap is None or tap.side != "output":
            raise UnsupportedError(
                "practise needs a feature map before pooling, which this model does not have; use ttmpd"
            )
        blocks = _blocks(inputs.teacher, inputs.units, pair)
        for unit in track(inputs.units, "practise", len(inputs.units)):
            yield Score(unit.id, "drop", self._recoverability(inputs, unit, blocks, tap))

    def _recoverability(self, inputs: ScoringInputs, unit: Unit, blocks: list["_Block"], tap: Tap) -> float:
        teacher, samples, device = inputs.teacher, inputs.samples, inputs.device
        pruned = build(teacher, [Removal(unit, "drop")])
        for parameter in pruned.parameters():
            parameter.requires_grad_(False)
        _insert_adaptors(pruned, unit, blocks)
        generator = torch.Generator().manual_seed(inputs.seed)

        def loss_at(step: int) -> Tensor:
            index = batch_order(len(samples), self.train_batch_size, step, inputs.seed)
            view = random_view(samples.batch(index, device), generator)
            with torch.no_grad():
                target = read_taps(teacher, view, {"f": tap})["f"]
            return F.mse_loss(read_taps(pruned, view, {"f": tap})["f"], target)

        with evaluating(teacher, gradients=True):
            # The adaptors are in eval mode like the rest: there is nothing in them that depends on it.
            train(
                pruned,
                loss_at,
                Schedule(steps=self.steps, lr=self.lr, shape="thirds"),
                Loop(stage=f"adaptors {unit.id}"),
            )
            with evaluating(pruned):
                error = torch.zeros((), dtype=torch.float64)
                for batch in samples.batches(self.train_batch_size, device):
                    difference = read_taps(pruned, batch, {"f": tap})["f"] - read_taps(teacher, batch, {"f": tap})["f"]
                    error += difference.square().flatten(1).mean(1).sum().double().cpu()
        return float(error) / len(samples)


class _Block:
    """One block of a stage, with the convolutions beside which adaptors may be put."""

    def __init__(self, path: str, shape: tuple[int, ...], convs: list[str], shortcut: str | None) -> None:
        self.path, self.shape, self.shortcut = path, shape, shortcut
        self.first, self.last = convs[0], convs[-1]


def _blocks(teacher: nn.Module, units: Sequence[Unit], batch: Tensor) -> list[_Block]:
    """All siblings of the units in calling order, with their first, last and shortcut convolutions."""
    parents = list(dict.fromkeys(unit.path.rpartition(".")[0] for unit in units))
    paths = {f"{p}.{name}" if p else name for p in parents for name, _ in module_at(teacher, p).named_children()}
    convolutions = {path for path, module in teacher.named_modules() if isinstance(module, nn.Conv2d)}
    calls = trace(teacher, batch, paths=paths | convolutions, values=True).by_path()
    blocks = []
    for path in (path for path in calls if path in paths):
        x, answer = calls[path][-1].args[0], calls[path][-1].result
        inside = [
            (name, call.args[0])
            for name, conv_calls in calls.items()
            if name in convolutions and name.startswith(f"{path}.")
            for call in conv_calls
        ]
        if not inside or not isinstance(answer, Tensor):
            continue
        shortcut = next((name for name, conv_input in inside[1:] if conv_input is x), None)
        blocks.append(_Block(path, tuple(answer.shape[1:]), [n for n, _ in inside if n != shortcut], shortcut))
    missing = [unit.id for unit in units if unit.path not in {block.path for block in blocks}]
    if missing:
        raise UnsupportedError(f"practise needs convolutional blocks, but {missing[0]} has no convolution; use ttmpd")
    return blocks


def _insert_adaptors(pruned: nn.Module, unit: Unit, blocks: list[_Block]) -> None:
    """Put identity 1x1 convolutions around the removed block.

    After the last convolution of earlier blocks of the stage (and their shortcut's); before the first convolution of
    later ones, up to and including the first block of the next stage (and its shortcut's).
    """
    place = next(i for i, block in enumerate(blocks) if block.path == unit.path)
    for block in reversed(blocks[:place]):
        if block.shape != unit.shape:
            break
        for path in filter(None, (block.last, block.shortcut)):
            _wrap(pruned, path, before=False)
    for block in blocks[place + 1 :]:
        same_stage = block.shape == unit.shape
        for path in filter(None, (block.first, None if same_stage else block.shortcut)):
            _wrap(pruned, path, before=True)
        if not same_stage:
            break


def _wrap(model: nn.Module, path: str, before: bool) -> None:
    conv = module_at(model, path)
    assert isinstance(conv, nn.Conv2d)
    width = conv.in_channels if before else conv.out_channels
    with torch.random.fork_rng():
        adaptor = nn.Conv2d(width, width, 1, bias=False).to(conv.weight.device)
    nn.init.dirac_(adaptor.weight)
    replace_module(model, path, nn.Sequential(adaptor, conv) if before else nn.Sequential(conv, adaptor))
