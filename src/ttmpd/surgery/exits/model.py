"""A model with early exits: confident samples leave behind a block, the others go on, within one forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.errors import InvalidValueError, ModelError, UnsupportedError
from ttmpd.models.modules import clone, module_at
from ttmpd.models.run import first_tensor
from ttmpd.surgery.exits.routing import (
    PASS,
    EveryoneLeftError,
    ExitHook,
    NoExit,
    Pass,
    PrescribedRule,
    Rule,
    SubsetHook,
    ThresholdRule,
)
from ttmpd.surgery.exits.spec import NEVER, ExitPredictions, Exits


class ExitHead(nn.Module):
    """A linear classifier whose logits are calibrated: ``temperature`` is in the weights, and kept for the record."""

    temperature: Tensor

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_classes, n_features))
        self.bias = nn.Parameter(torch.zeros(n_classes))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_classes) calibrated logits of (B, n_features)."""
        return F.linear(x, self.weight, self.bias)


class EarlyExitModel(nn.Module):
    """A classifier that stops early for confident samples; an ordinary module that returns (B, n_classes) logits.

    A sample leaves behind the first block whose exit gives its answer a probability of at least ``threshold`` (or more:
    see :meth:`Exits.thresholds`); who does not leave gets the model's own answer. The batch shrinks on the way. Above 1
    no sample leaves: the answers are those of the model, bit for bit. Several threads may run it at once.

    Args:
        backbone: the model; hooks are put on its blocks, nothing else is changed.
        exits: where samples may leave.
        threshold: may be changed at any time.
    """

    def __init__(self, backbone: nn.Module, exits: Exits, threshold: float = NEVER) -> None:
        super().__init__()
        if any(isinstance(module, EarlyExitModel) for module in backbone.modules()):
            raise InvalidValueError("a model must have exits once, but this one has some already; take it without them")
        self.backbone, self.spec, self.threshold = backbone, exits, threshold
        device = next(backbone.parameters()).device
        self.heads = nn.ModuleList(ExitHead(place.n_features, exits.n_classes).to(device) for place in exits.exits)
        self.key = object()  # deepcopy gives the copies of the hooks the key of the copy
        numbers = {place.path: number for number, place in enumerate(exits.exits)}
        shared = {path for place in exits.exits for path in place.reads[:-1]}
        readers = {path: exit_ for exit_ in exits.exits for path in exit_.reads}
        for path, exit_ in readers.items():
            hook = ExitHook(self.key, path, exit_.pool, exit_.layout, numbers.get(path), path in shared)
            module_at(backbone, path).register_forward_hook(hook)
        if exits.compact:
            for path in exits.followers:
                module_at(backbone, path).register_forward_pre_hook(SubsetHook(self.key), with_kwargs=True)
        if isinstance(config := getattr(backbone, "pretrained_cfg", None), Mapping):
            self.pretrained_cfg = dict(config)
        self.train(backbone.training)

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, n_classes) logits; arguments as those of the backbone."""
        if self.threshold > 1:
            return _logits(self.backbone, self.backbone(batch, *args, **kwargs))
        return self._passed(ThresholdRule(self.spec.thresholds(self.threshold)), batch, args, kwargs).logits

    def answer(self, batch: Tensor, *args: Any, **kwargs: Any) -> ExitPredictions:
        """The logits, and where each sample left."""
        return self._passed(ThresholdRule(self.spec.thresholds(self.threshold)), batch, args, kwargs)

    def depths(self, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B,) number of the exit where each sample leaves, counted from 0; the number of exits for the end."""
        return self.answer(batch, *args, **kwargs).exits

    def answer_at(self, batch: Tensor, exits: Tensor) -> ExitPredictions:
        """Logits with the exit of each sample prescribed: (B,) numbers, the number of exits for the end.

        All that an exit computes is computed, so that it takes as long as a sample that leaves there by itself.
        """
        return self._passed(PrescribedRule(exits), batch, (), {})

    def features(self, batch: Tensor) -> tuple[list[Tensor], Tensor]:
        """For each exit (B, n_blocks, width) what its head reads, one vector per block; and the model's own logits."""
        rule = NoExit()
        predictions = self._passed(rule, batch, (), {})
        return [
            torch.stack([rule.features[path] for path in place.reads], 1) for place in self.spec.exits
        ], predictions.logits

    def exit_logits(self, features: Sequence[Tensor]) -> Tensor:
        """(n_exits, B, n_classes) calibrated answers of all exits to :meth:`features`."""
        return torch.stack([head(x.flatten(1)) for head, x in zip(self.heads, features, strict=True)])

    def _passed(self, rule: Rule, batch: Tensor, args: Any, kwargs: Any) -> ExitPredictions:
        now = Pass(self, rule, batch)
        token = PASS.set(now)
        try:
            return now.joined(_logits(self.backbone, self.backbone(batch, *args, **kwargs)))
        except EveryoneLeftError as left:
            if left.of is not now:
                raise
            return now.joined(None)
        finally:
            PASS.reset(token)


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = first_tensor(output)
    if logits is None:
        raise ModelError(f"{type(model).__name__} must answer with a tensor, but answered without one")
    return logits


def with_only(model: EarlyExitModel, numbers: Sequence[int], saved_shares: Sequence[float] = ()) -> EarlyExitModel:
    """A copy with some of the exits alone, at the same threshold; ``saved_shares`` as in :class:`Exits`."""
    copy = cast(EarlyExitModel, clone(model))
    for module in copy.backbone.modules():
        for hooked, flags in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooked.items() if isinstance(hook, ExitHook | SubsetHook)]:
                del hooked[key]
                flags.pop(key, None)
    exits = tuple(model.spec.exits[number] for number in numbers)
    spec = replace(model.spec, exits=exits, saved_shares=tuple(saved_shares))
    fewer = EarlyExitModel(copy.backbone, spec, model.threshold)
    for head, number in zip(fewer.heads, numbers, strict=True):
        head.load_state_dict(copy.heads[number].state_dict())
    return fewer.requires_grad_(False)


def check_without_exits(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` when the model has exits: what changes its blocks comes before them."""
    if isinstance(model, EarlyExitModel):
        raise UnsupportedError(
            "the model must have no exits yet, but has some; exits come last: give the model that they were put on"
        )


def exits_data(model: nn.Module) -> dict[str, Any]:
    """The exits and their threshold as an artifact's ``early_exit`` entry; empty for a model without exits."""
    if not isinstance(model, EarlyExitModel):
        return {}
    return {"early_exit": model.spec.to_dict() | {"threshold": model.threshold}}


def restore_exits(backbone: nn.Module, exits: Exits, threshold: float, heads: Mapping[str, Tensor]) -> EarlyExitModel:
    """Put trained exits on a backbone, as an artifact describes them.

    Raises:
        InvalidValueError: the backbone has no such blocks.
        RuntimeError: the weights do not fit (torch's own message names the keys).
    """
    model = EarlyExitModel(backbone, exits, threshold)
    model.heads.load_state_dict(dict(heads))
    return model.requires_grad_(False)
