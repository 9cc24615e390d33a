"""The records that move between the stages: frozen data that checks itself."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol, get_args

from ttmpd.errors import InvalidValueError

Action = Literal["drop", "linear", "narrow"]
ACTIONS: tuple[Action, ...] = ("drop", "linear", "narrow")
Layout = Literal["channels_first", "channels_last"]
RefitScope = Literal["all_later_layers", "removed_only", "rescale"]
"""Which layers are fitted after a removal: all from the first removal on but the output layer; only the linear
replacements and the layers that read narrowed members; or one factor for each member that stays."""
Scope = Literal["depth", "width"]
"""Depth units are removed as a whole, width units member by member."""
Form = Literal["plain", "arguments", "tuple", "pair"]
"""Arguments and outputs of a module, see :class:`DepthUnit`."""


def _finite(name: str, value: float, low: float = -math.inf) -> None:
    if not (math.isfinite(value) and value >= low):
        rule = "be finite" if low == -math.inf else f"be finite and at least {low:g}"
        raise InvalidValueError(f"{name} must {rule}, but got {value!r}")


class Location(Protocol):
    """A location in a model whose output is read position by position: a unit, or a layer that is refitted."""

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
        """The axis that holds the channels, see ``Layout``."""

    @property
    def channels(self) -> int:
        """Width of the output."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a model that can be removed: a :class:`DepthUnit` or a :class:`WidthUnit`.

    Args:
        kind: name of the kind of unit that found it.
        path: a module's path in the model, as in ``named_modules``; which module, is said by each of the two.
        module: the class name of the module.
        shape: shape of the output at ``path`` for one sample, without the batch dimension.
        layout: which axis of the output holds the channels.
        n_params: number of parameters that go with the whole unit.
        macs: multiply-accumulate operations per sample that go with the whole unit.
    """

    kind: str
    path: str
    module: str
    shape: tuple[int, ...]
    layout: Layout
    n_params: int
    macs: int

    def __post_init__(self) -> None:
        if not self.kind or not isinstance(self.path, str):
            raise InvalidValueError(f"a unit must have a kind and a path, but got {self.kind!r} and {self.path!r}")
        if not self.shape or math.prod(self.shape) < 1:
            raise InvalidValueError(f"shape of {self.path!r} must hold a value, but got {self.shape}")
        _check_word("layout", self.path, self.layout, Layout)

    @property
    def channels(self) -> int:
        """Width of the output at ``path``."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]

    @property
    def id(self) -> str:
        """Name of the unit, unique within a model."""
        return f"{self.kind}:{self.path}"

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules that a removal changes."""
        return (self.path,)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`unit_from_dict` turns back into an equal unit."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DepthUnit(Unit):
    """A part that is removed or kept as a whole: a block, or a sublayer of one. ``path`` is its last module.

    Args:
        activation: "relu" or "relu6" when the output went through it, else "".
        form: "plain" where the module maps one tensor to one tensor, "arguments" where it takes more of them, "tuple"
            where it returns a tuple of one, "pair" where it returns the tensor and something that may be left out.
        branch: true where the module's output is added to a shortcut; without the unit zeros are added. False where
            the module holds the shortcut itself; without the unit its input is passed on.
        upstream: (path, form) of modules that serve this unit alone; they are removed with it and pass on their input.
    """

    activation: str = ""
    form: Form = "plain"
    branch: bool = False
    upstream: tuple[tuple[str, Form], ...] = ()

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is a new class, and super() would refer to the one it was made from.
        Unit.__post_init__(self)
        if self.activation not in ("", "relu", "relu6"):
            raise InvalidValueError(
                f"activation of {self.path!r} must be relu, relu6 or empty, but got {self.activation!r}"
            )
        _check_word("form", self.path, self.form, Form)

    @property
    def id(self) -> str:
        """The path; behind the name of the kind where it is the branch beside a shortcut."""
        return f"{self.kind}:{self.path}" if self.branch else self.path

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules that go."""
        return (*(path for path, _ in self.upstream), self.path)


@dataclass(frozen=True, slots=True)
class WidthUnit(Unit):
    """A part with members of which some are kept: heads, neurons or channels. ``path`` is its first consumer.

    Args:
        n_members: number of members.
        producers: paths of the layers that make the members, or work on each of them alone.
        consumers: paths of the layers that read them, each the same number of inputs from every member.
        widths: numbers of members that may be kept, most first, all below ``n_members``.
        form: "pair" where the members' module returns something beside its output.
    """

    n_members: int = 0
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    form: Form = "plain"

    def __post_init__(self) -> None:
        Unit.__post_init__(self)
        if self.n_members < 1:
            raise InvalidValueError(f"n_members of {self.id!r} must be at least 1, but got {self.n_members}")
        if not self.consumers or self.consumers[0] != self.path:
            raise InvalidValueError(f"consumers of {self.id!r} must begin with its path, but got {self.consumers}")
        if any(not 0 <= width < self.n_members for width in self.widths):
            raise InvalidValueError(f"widths of {self.id!r} must lie below {self.n_members}, but got {self.widths}")
        _check_word("form", self.path, self.form, Form)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all layers that are narrowed."""
        return (*self.producers, *self.consumers)


def _around(path: str) -> set[str]:
    """The path, and those of all modules that hold the one there."""
    return set(itertools.accumulate(path.split("."), lambda outer, name: f"{outer}.{name}"))


def touching(units: Sequence[Unit]) -> Iterator[tuple[Unit, DepthUnit]]:
    """Every (unit, depth unit) of which one takes modules of the other along: they cannot both be removed."""
    owners: dict[str, list[DepthUnit]] = {}
    for owner in (unit for unit in units if isinstance(unit, DepthUnit)):
        for path in owner.paths:
            owners.setdefault(path, []).append(owner)
    for unit in units:
        around = sorted({outer for path in unit.paths for outer in _around(path)})
        others = dict.fromkeys(owner for outer in around for owner in owners.get(outer, ()))
        yield from ((unit, other) for other in others if other != unit)


def check_apart(units: Sequence[Unit]) -> None:
    """Raise :class:`InvalidValueError` when a unit, or some of its modules, go with another of the units."""
    for unit, other in touching(units):
        raise InvalidValueError(f"removed units must lie apart, but {unit.id} goes with {other.id}; leave one out")


def _check_word(field_name: str, owner: str, value: str, words: Any) -> None:
    if value not in get_args(words):
        raise InvalidValueError(
            f"{field_name} of {owner!r} must be one of {', '.join(get_args(words))}, but got {value!r}"
        )


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list | tuple) else value


def unit_from_dict(data: Mapping[str, Any]) -> Unit:
    """The unit that ``to_dict`` described: a width unit where the data have ``n_members``, else a depth unit.

    Raises:
        InvalidValueError: a key is missing or unknown, or a value breaks a rule.
    """
    record = WidthUnit if "n_members" in data else DepthUnit
    keys = {item.name for item in fields(record)}
    if keys != set(data):
        differing = ", ".join(sorted(keys ^ set(data)))
        raise InvalidValueError(f"a unit must have the keys of {record.__name__}, but differs in {differing}")
    values = {key: _tupled(value) for key, value in data.items()}
    for key in ("n_params", "macs", "n_members"):
        if key in values and (not isinstance(values[key], int) or values[key] < 0):
            raise InvalidValueError(f"{key} of a unit must be a number from 0, but got {values[key]!r}")
    return record(**values)


@dataclass(frozen=True, slots=True)
class Score:
    """Predicted harm of one removal; higher hurts more.

    ``parts`` holds the quantities that the harm was computed from, for the report; ``kept`` the members that stay where
    the unit is narrowed.
    """

    unit_id: str
    action: Action
    harm: float
    parts: Mapping[str, float] = field(default_factory=dict)
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_action(self.unit_id, self.action, self.kept)
        _finite("harm", self.harm)


@dataclass(frozen=True, slots=True)
class Option:
    """One removal with its harm and its saving: what a planner chooses from.

    ``holders`` are the ids of the units that this one is a part of, outermost first, as a block and the attention in it
    hold its heads: a plan has one of them, or units inside, never both.
    """

    unit_id: str
    action: Action
    harm: float
    saved_ms: float
    kept: tuple[int, ...] = ()
    holders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_action(self.unit_id, self.action, self.kept)
        _finite("harm", self.harm)
        _finite("saved_ms", self.saved_ms)
        if self.unit_id in self.holders:
            raise InvalidValueError(f"holders of {self.unit_id!r} must be other units, but hold the unit itself")

    def excludes(self, other: "Option") -> bool:
        """Whether a plan that has this option cannot have the other: they are of one unit, or one holds the other."""
        return other.unit_id in (self.unit_id, *self.holders) or self.unit_id in other.holders


def _check_action(unit_id: str, action: Action, kept: tuple[int, ...]) -> None:
    _check_word("action", unit_id, action, Action)
    if kept and action != "narrow":
        raise InvalidValueError(f"only a unit that is narrowed keeps members, but {unit_id!r} is to {action}")


@dataclass(frozen=True, slots=True)
class Removal:
    """One decision of a plan; ``kept`` are the members that stay, in their order, where the unit is narrowed."""

    unit: Unit
    action: Action
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_action(self.unit.id, self.action, self.kept)
        if isinstance(self.unit, WidthUnit):
            if self.action != "narrow":
                raise InvalidValueError(f"{self.unit.id} has members and must be narrowed, but got {self.action!r}")
            inside = all(0 <= member < self.unit.n_members for member in self.kept)
            if not inside or any(first >= second for first, second in itertools.pairwise(self.kept)):
                raise InvalidValueError(
                    f"kept members of {self.unit.id} must rise and lie below {self.unit.n_members}, but got {self.kept}"
                )
        elif self.action == "narrow":
            raise InvalidValueError(f"{self.unit.id} goes as a whole and cannot be narrowed: it has no members")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` turns back into an equal removal."""
        return self.unit.to_dict() | {"action": self.action, "kept": list(self.kept)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Removal":
        """The removal that :meth:`to_dict` described.

        Raises:
            InvalidValueError: a key is missing or unknown, or a value breaks a rule.
        """
        rest = dict(data)
        try:
            action, kept = rest.pop("action"), rest.pop("kept")
        except KeyError as error:
            raise InvalidValueError(f"a removal must have the key {error}, but has {', '.join(data)}") from None
        return cls(unit_from_dict(rest), action, tuple(map(int, kept)))


@dataclass(frozen=True, slots=True)
class Plan:
    """Removals in the order of the network, with their predicted harm and latency.

    Args:
        removals: units with their actions.
        harm: predicted harm, in the scorer's own scale.
        original_ms: measured latency of the unpruned model, milliseconds per batch.
        budget_ms: the target latency.
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
        check_apart([removal.unit for removal in self.removals])
        for name in ("harm", "original_ms", "budget_ms", "predicted_ms"):
            _finite(name, getattr(self, name))

    @property
    def actions(self) -> dict[str, Action]:
        """Action per unit id."""
        return {removal.unit.id: removal.action for removal in self.removals}


@dataclass(frozen=True, slots=True)
class Lossless:
    """Changes that make a model faster without changing its outputs.

    Args:
        folded: (path of a layer, path of the batch norm behind it) that are merged into one layer.
        channels_last: true where convolutions store their weights in the channels_last memory format.
    """

    folded: tuple[tuple[str, str], ...] = ()
    channels_last: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` turns back into an equal record."""
        return {"folded": [list(pair) for pair in self.folded], "channels_last": self.channels_last}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Lossless":
        """The record that :meth:`to_dict` described; without keys there is no change."""
        return cls(tuple(map(tuple, data.get("folded", ()))), bool(data.get("channels_last", False)))

    def __or__(self, other: "Lossless") -> "Lossless":
        """The changes of both, one after the other."""
        return Lossless((*self.folded, *other.folded), self.channels_last or other.channels_last)

    def __str__(self) -> str:
        words = [f"{len(self.folded)} batch norms folded"] if self.folded else []
        return ", ".join(words + (["channels_last"] if self.channels_last else [])) or "nothing"


UNCHANGED = Lossless()
"""No change."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Linear replacements that artifacts of format 1 merged into the layer behind them.

    Later versions merge none (docs/decisions), so this is recorded only where such an artifact is compressed again.

    Args:
        replacements: paths of the units in whose place an identity stands, although a replacement was chosen.
        biases: paths of the layers that have a bias, which they lack in the original model.
    """

    replacements: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


NOTHING_FOLDED = Folded()
"""No replacement was merged."""
