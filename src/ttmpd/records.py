"""The records that move between the stages: frozen data that checks itself."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ttmpd.errors import InvalidValueError

Action = Literal["drop", "linear", "narrow"]


ACTIONS: tuple[Action, ...] = ("drop", "linear", "narrow")


Layout = Literal["channels_first", "channels_last"]


Repair = Literal["behind", "removed", "rescaled"]
"""What is fitted again after a removal: all layers behind the first; stand-ins and what reads narrowed members alone;
or one factor for each member that is kept."""


Form = Literal["plain", "arguments", "tuple", "pair"]


def _finite(name: str, value: float, low: float = -math.inf) -> None:
    if not (math.isfinite(value) and value >= low):
        rule = "be finite" if low == -math.inf else f"be finite and at least {low:g}"
        raise InvalidValueError(f"{name} must {rule}, but got {value!r}")


class Place(Protocol):
    """A place in a model whose output is looked at position by position: a unit, or a layer that is fitted."""

    @property
    def id(self) -> str:
        """Its name, unique within a model."""

    @property
    def path(self) -> str:
        """Path of the module whose output it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output for one sample."""

    @property
    def layout(self) -> Layout:
        """Which axis holds the channels."""

    @property
    def channels(self) -> int:
        """Width of the output."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a model that can be removed.

    Args:
        kind: the file in ``ttmpd/surgery/units`` that found it.
        path: the module's path in the model, as in ``named_modules``.
        module: the class name of the module.
        shape: shape of its output for one sample, without the batch dimension.
        layout: which axis of the output holds the channels.
        activation: "relu" or "relu6" when the unit's output went through it, else "".
        n_params: number of parameters that go when it is dropped.
        macs: multiply-accumulate operations per sample that go when it is dropped.
        form: "plain" when it maps one tensor to one tensor, "arguments" when it is called with more of them, "tuple"
            when it answers with a tuple; of heads "pair" when their attention hands on its weights, too.
        members: heads, neurons or channels of a narrowed unit, 0 for one that goes as a whole; ``path`` then names the
            layer that reads them, and ``n_params`` and ``macs`` are what goes with all of them.
        feeders: paths of the layers that make the members.
        widths: numbers of members that are worth keeping, most first, fewer than there are.
    """

    kind: str
    path: str
    module: str
    shape: tuple[int, ...]
    layout: Layout
    activation: str
    n_params: int
    macs: int
    form: Form = "plain"
    members: int = 0
    feeders: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        """Width of the unit's output."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]

    @property
    def id(self) -> str:
        """Name of the unit, unique within a model."""
        return self.path if self.kind == "block" else f"{self.kind}:{self.path}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median and quartiles over interleaved rounds."""

    median_ms: float
    low_ms: float
    high_ms: float
    n_rounds: int

    def __post_init__(self) -> None:
        _finite("median_ms", self.median_ms, 0.0)

    @property
    def error_ms(self) -> float:
        """Standard error of the median, if rounds differ as normal noise does.

        Example:
            >>> round(Timing(10.0, 9.5, 10.5, 25).error_ms, 3)
            0.186
        """
        deviation = (self.high_ms - self.low_ms) / 1.349
        return math.sqrt(math.pi / 2) * deviation / math.sqrt(self.n_rounds)


@dataclass(frozen=True, slots=True)
class Saving:
    """Milliseconds per batch that one removal saves; more is better, and a stand-in may even cost time."""

    unit: str
    action: Action
    saved_ms: float

    def __post_init__(self) -> None:
        _finite("saved_ms", self.saved_ms)


@dataclass(frozen=True, slots=True)
class Score:
    """How much one removal is predicted to hurt; higher hurts more.

    ``parts`` holds the quantities the harm was made of, for the report; ``kept`` the members that stay where the unit
    is narrowed.
    """

    unit: str
    action: Action
    harm: float
    parts: Mapping[str, float] = field(default_factory=dict)
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _finite("harm", self.harm)


@dataclass(frozen=True, slots=True)
class Option:
    """One removal with its harm and its saving: what a planner chooses from.

    ``whole`` names the larger unit that this one is a part of, "" when there is none: one of them goes, or the other.
    """

    unit: str
    action: Action
    harm: float
    saved_ms: float
    kept: tuple[int, ...] = ()
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Removal:
    """One decision of a plan; ``kept`` are the members that stay, in their order, where the unit is narrowed."""

    unit: Unit
    action: Action
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (self.unit.kind != "block") == bool(self.unit.members) == (self.action == "narrow"):
            raise InvalidValueError(
                f"{self.unit.id} must be narrowed if and only if it has members, but got {self.action!r}"
            )
        inside = all(0 <= member < max(1, self.unit.members) for member in self.kept)
        if not inside or any(a >= b for a, b in itertools.pairwise(self.kept)):
            raise InvalidValueError(f"kept members of {self.unit.id} must rise and lie below {self.unit.members}")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is removed, in the order of the network, and what that was predicted to bring.

    Args:
        removals: units with their actions.
        harm: predicted harm, in the scorer's own scale.
        original_ms: measured latency of the unpruned model, milliseconds per batch.
        budget_ms: the latency that was asked for.
        predicted_ms: predicted latency of the pruned model.
    """

    removals: tuple[Removal, ...]
    harm: float
    original_ms: float
    budget_ms: float
    predicted_ms: float

    def __post_init__(self) -> None:
        ids = [removal.unit.id for removal in self.removals]
        if len(set(ids)) != len(ids):
            raise InvalidValueError(f"a plan must name each unit once, but got {ids}")
        for name in ("harm", "original_ms", "budget_ms", "predicted_ms"):
            _finite(name, getattr(self, name))

    @property
    def actions(self) -> dict[str, Action]:
        """Action per unit id."""
        return {removal.unit.id: removal.action for removal in self.removals}


@dataclass(frozen=True, slots=True)
class Lossless:
    """What makes a model faster and leaves its answers as they are.

    Args:
        folded: (path of a layer, path of the batch norm behind it) that become one layer.
        channels_last: whether convolutions keep their weights in the channels_last memory format.
    """

    folded: tuple[tuple[str, str], ...] = ()
    channels_last: bool = False

    def __str__(self) -> str:
        words = [f"{len(self.folded)} batch norms folded"] if self.folded else []
        return ", ".join(words + (["channels_last"] if self.channels_last else [])) or "nothing"


UNCHANGED = Lossless()
"""Nothing is done."""


@dataclass(frozen=True, slots=True)
class Folded:
    """What artifacts of format 1 did with linear replacements: some became a part of the layer behind them.

    No version since folds any (docs/decisions), so it is written down only where such an artifact is compressed again.

    Args:
        replacements: paths of the units in whose place an identity stands, although a replacement was chosen.
        biases: paths of the layers that have a bias, which they lack in the original model.
    """

    replacements: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


NOTHING_FOLDED = Folded()
"""Every chosen replacement is there."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A place in a model where a tensor is read: the first input or the output of a module.

    Of a tensor with an axis of tokens, ``token`` "last" reads the last one that is no padding, (B, S, ...) to (B, ...),
    and "each" those of which the model's answers count, (B, S, ...) to (M, ...).
    """

    path: str
    side: Literal["input", "output"]
    token: Literal["all", "last", "each"] = "all"


@dataclass(frozen=True, slots=True)
class Fit:
    """What a training run did.

    Args:
        steps: optimizer steps that were done.
        stopped: why it ended: "finished", "time budget", "no progress"; "nothing removed" where it did not begin.
        rolled_back: true if the start was better and was restored.
        best_step: the step whose weights were kept; 0 is the start.
        losses: mean training loss between evaluations.
        checks: (step, agreement share, held-out loss) at every evaluation.
        mixed: the share of the start in the weights that were kept.
    """

    steps: int
    stopped: str
    rolled_back: bool
    best_step: int
    losses: tuple[float, ...] = ()
    checks: tuple[tuple[int, float, float], ...] = ()
    mixed: float = 0.0
