"""One forward pass of a model with exits: hooks read blocks, send samples out, and let the batch shrink.

The model runs the code that it always ran. The hooks are inert unless a pass of the model they belong to is under way
in the same thread.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ttmpd.data.tokenization import token_mask
from ttmpd.models.run import StopForwardError, first_tensor
from ttmpd.records import Layout
from ttmpd.surgery.exits.pooling import Pool, pooled
from ttmpd.surgery.exits.spec import ExitPredictions, Exits


class Owner(Protocol):
    """The model that a pass belongs to."""

    key: object
    heads: nn.ModuleList
    spec: Exits


class EveryoneLeftError(StopForwardError):
    """Ends a forward pass once every sample has left it; ``of`` is that pass."""

    def __init__(self, of: "Pass") -> None:
        super().__init__()
        self.of = of


class Rule(Protocol):
    """Decides which samples leave at an exit."""

    asks: bool
    """False when the heads of the exits are not run at all."""

    def leaves(self, number: int, confidence: Tensor, rows: Tensor | None) -> Tensor:
        """(b,) for each of the samples that are still there; ``rows`` are their numbers, None for all."""


class ThresholdRule:
    """Samples leave whose confidence reaches the threshold of the exit."""

    asks = True

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        self.thresholds = thresholds

    def leaves(self, number: int, confidence: Tensor, rows: Tensor | None) -> Tensor:
        """Those whose confidence reaches the threshold."""
        return confidence >= self.thresholds[number]


class PrescribedRule:
    """Each sample leaves at a prescribed exit."""

    asks = True

    def __init__(self, exits: Tensor) -> None:
        self.exits = exits

    def leaves(self, number: int, confidence: Tensor, rows: Tensor | None) -> Tensor:
        """Those whose exit this is."""
        # Compared like a threshold, so that it costs the same.
        return (self.exits if rows is None else self.exits[rows]) == number


class NoExit:
    """Routing rule under which no sample exits; records the features that exits would read."""

    asks = False

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}

    def leaves(self, number: int, confidence: Tensor, rows: Tensor | None) -> Tensor:
        """No sample."""
        return torch.zeros_like(confidence, dtype=torch.bool)


class Pass:
    """The state of one forward pass: the samples still in it, and the predictions of those that left."""

    def __init__(self, owner: "Owner", rule: Rule, batch: Tensor) -> None:
        self.key, self.spec, self.rule = owner.key, owner.spec, rule
        self.heads = tuple(owner.heads.children())
        self.n, self.device = len(batch), batch.device
        mask = token_mask(batch, owner.spec.padding)
        self.token_mask = None if mask is None or bool(mask.all()) else mask
        self.features: dict[str, Tensor] = rule.features if isinstance(rule, NoExit) else {}
        self.rows: Tensor | None = None  # numbers of those that are computed, ascending; None for all
        self.levels: dict[int, Tensor] = {}  # size of an earlier batch -> its rows
        self.gone: Tensor | None = None  # where the batch does not shrink: the samples that left
        self.left: list[tuple[Tensor | None, Tensor, int]] = []  # (rows, logits, exit)

    def behind(self, hook: "ExitHook", output: Any) -> Any:
        """The block's output for the samples that stay; None leaves the output as it is."""
        value = first_tensor(output)
        assert value is not None
        read = pooled(value, hook.pool, hook.layout, self.token_mask)
        if hook.shared or not self.rule.asks:
            self.features[hook.path] = read
        if hook.exit is None or not self.rule.asks:
            return None
        earlier = self.spec.exits[hook.exit].reads[:-1]
        read = torch.cat([*(self.features[path] for path in earlier), read], 1) if earlier else read
        logits: Tensor = self.heads[hook.exit](read)
        go = self.rule.leaves(hook.exit, logits.softmax(-1).amax(-1), self.rows)
        if self.gone is not None:
            go = go & ~self.gone
        n_leaving = int(go.sum()) if len(go) > 1 else int(go)
        if not n_leaving:
            return None
        if n_leaving == len(go):
            self.left.append((self.rows, logits, hook.exit))
            raise EveryoneLeftError(self)
        return self._split(output, logits, go, hook.exit)

    def _split(self, output: Any, logits: Tensor, go: Tensor, number: int) -> Any:
        rows = torch.arange(self.n, device=go.device) if self.rows is None else self.rows
        self.left.append((rows[go], logits[go], number))
        if not self.spec.compact:
            self.gone = go if self.gone is None else self.gone | go
            if bool(self.gone.all()):
                raise EveryoneLeftError(self)
            return None
        stay = (~go).nonzero().flatten()
        self.levels[len(rows)], self.rows = rows, rows[stay]
        self.token_mask = None if self.token_mask is None else self.token_mask[stay]
        self.features = {path: value[stay] for path, value in self.features.items()}

        def cut(name: str, value: Tensor) -> Tensor:
            is_per_sample = value.dim() and len(value) == len(rows) and name not in self.spec.fixed
            return _picked(value, stay) if is_per_sample else value

        return changed(output, cut, "output")

    def before(self, args: Any, kwargs: Any) -> Any:
        """The block's arguments, cut to the samples that are still in the pass; None leaves them as they are."""
        if self.rows is None:
            return None
        rows = self.rows

        def cut(name: str, value: Tensor) -> Tensor:
            level = None if name in self.spec.fixed or not value.dim() else self.levels.get(len(value))
            return value if level is None else _picked(value, torch.searchsorted(level, rows))

        args = tuple(changed(value, cut, str(number)) for number, value in enumerate(args))
        return args, {name: changed(value, cut, name) for name, value in kwargs.items()}

    def joined(self, final: Tensor | None) -> ExitPredictions:
        """Predictions in the order of the batch; ``final`` are the model's logits, None when every sample left."""
        end = len(self.spec.exits)
        like = final if final is not None else self.left[-1][1]
        if not self.left:
            return ExitPredictions(like, torch.full((self.n,), end, device=self.device))
        if len(self.left) == 1 and self.left[0][0] is None:
            return ExitPredictions(like, torch.full((self.n,), self.left[0][2], device=self.device))
        logits = like.new_empty(self.n, self.spec.n_classes)
        exits = torch.full((self.n,), end, device=self.device)
        if final is not None:
            if self.rows is None:
                logits.copy_(final)
            else:
                logits[self.rows] = final
        for rows, answers, number in self.left:
            assert rows is not None
            logits[rows], exits[rows] = answers.to(logits.dtype), number
        return ExitPredictions(logits, exits)


PASS: ContextVar[Pass | None] = ContextVar("ttmpd_early_exit", default=None)


@dataclass(eq=False, slots=True)
class ExitHook:
    """Forward hook on a block whose output exits read."""

    key: object
    path: str
    pool: Pool
    layout: Layout
    exit: int | None
    shared: bool

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Let samples leave here."""
        now = PASS.get()
        return None if now is None or now.key is not self.key else now.behind(self, output)


@dataclass(eq=False, slots=True)
class SubsetHook:
    """Forward pre-hook on a block that may be called with fewer samples than the model was."""

    key: object

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give the block the samples that are still there."""
        now = PASS.get()
        return None if now is None or now.key is not self.key else now.before(args, kwargs)


def changed(value: Any, change: Callable[[str, Tensor], Tensor], name: str) -> Any:
    """``value`` with every tensor in its plain tuples, lists and dicts changed; ``change`` gets its name, too.

    The name of a tensor is that of the argument, or its number among those without a name, or "output"; within a
    container the number or key follows behind a dot.
    """
    if isinstance(value, Tensor):
        return change(name, value)
    if type(value) in (tuple, list):
        return type(value)(changed(item, change, f"{name}.{number}") for number, item in enumerate(value))
    if type(value) is dict:
        return {key: changed(item, change, f"{name}.{key}") for key, item in value.items()}
    return value


def _picked(value: Tensor, index: Tensor) -> Tensor:
    """The samples at ``index``, in the memory format in which all of them are."""
    part = value[index]
    if value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part
