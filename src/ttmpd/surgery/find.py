"""All removable units of a model, and which kind a unit is of."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ttmpd.method import method_class, names
from ttmpd.models.run import output_tensors
from ttmpd.models.tokens import carried_task
from ttmpd.models.trace import trace
from ttmpd.records import DepthUnit, Scope, Unit, WidthUnit, touching
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.reasons import Reason, Refusal
from ttmpd.surgery.units.base import DepthUnits, UnitFinder, UnitSearch, WidthUnits
from ttmpd.tasks.base import Task, predicted_tensors

ALL_OF_IT = 0.9
"""A part that holds so much of a larger unit's parameters is that unit over again."""


def kind_of(name: str) -> UnitFinder:
    """The kind of unit of that name."""
    return cast(UnitFinder, method_class("units", name)())


def default_kinds() -> tuple[str, ...]:
    """Names of the kinds that are looked for unless others are named."""
    return tuple(name for name in names("units") if kind_of(name).default)


def scope_of(kind: UnitFinder) -> Scope:
    """Whether units of the kind go as a whole, "depth", or member by member, "width"."""
    return "depth" if isinstance(kind, DepthUnits) else "width"


def kinds_of(*scopes: Scope) -> tuple[str, ...]:
    """Names of the kinds that are on by default, of those scopes."""
    return tuple(name for name in default_kinds() if scope_of(kind_of(name)) in scopes)


def depth_kind(unit: Unit) -> DepthUnits:
    """The kind of a unit that goes as a whole."""
    return cast(DepthUnits, kind_of(unit.kind))


def width_kind(unit: Unit) -> WidthUnits:
    """The kind of a unit with members."""
    return cast(WidthUnits, kind_of(unit.kind))


def find_units(model: nn.Module, batch: Tensor, kinds: Sequence[str] | None = None) -> UnitSearch:
    """The units of several kinds, in the order in which the network runs them.

    Args:
        model: left untouched.
        batch: a few samples on the model's device.
        kinds: names of kinds; those that are on by default when not given.

    Raises:
        ModelError: the model cannot be run on the batch or answers with NaN.

    Cost: four forward passes for all kinds together (calls, operations, the output layer, a single sample), and what
    each kind needs to prove that its units can go.
    """
    observation = Observation(model, batch)
    searches = [kind_of(name).search(observation) for name in (default_kinds() if kinds is None else kinds)]
    units = [unit for search in searches for unit in search.units]
    order, refusals = _looked_at(observation, units)
    units = _nested([unit for unit in units if unit.path not in refusals], refusals)
    units.sort(key=lambda unit: (order[unit.path], isinstance(unit, WidthUnit), unit.kind))
    not_removable = {path: refusal for search in searches for path, refusal in search.not_removable.items()}
    return UnitSearch(tuple(units), not_removable | refusals)


def _looked_at(observation: Observation, units: Sequence[Unit]) -> tuple[dict[str, int], dict[str, Refusal]]:
    """(path -> place in calling order, path -> why it cannot be removed after all)."""
    paths, batch, whole = {unit.path for unit in units}, observation.batch, observation.trace
    outputs = {path: calls[0].output for path, calls in whole.by_path().items() if path in paths}
    refusals: dict[str, Refusal] = {}
    if len(batch) > 1:
        for call in trace(observation.model, batch[:1], paths=paths).calls:
            single, several = call.output, outputs[call.path]
            if single is not None and several is not None and several.shape[0] != len(batch) * single.shape[0]:
                refusals[call.path] = Refusal(Reason.MIXED_SAMPLES, f"it has the shape {several.shape}")
    leads_out = _ancestors(tensor.grad_fn for tensor in output_tensors(whole.output))
    predicted = _ancestors(tensor.grad_fn for tensor in _predicted(observation.model, whole.output))
    for path, output in outputs.items():
        if output is not None and output.node is not None and output.node not in predicted:
            reason = Reason.FEEDS_UNPREDICTED if output.node in leads_out else Reason.FEEDS_NOTHING
            refusals.setdefault(path, Refusal(reason))
    return {path: whole.order.index(path) for path in paths}, refusals


def _predicted(model: nn.Module, raw: Any) -> Sequence[Tensor]:
    """The tensors of an output by which units are scored: those that the task predicts, all where none is carried."""
    task = cast(Task | None, carried_task(model))
    return output_tensors(raw) if task is None else predicted_tensors(raw, task.parts)


def _ancestors(nodes: Iterable[Any]) -> set[Any]:
    """The nodes of the autograd graph from which the given ones are computed, and these themselves."""
    stack, visited = [node for node in nodes if node is not None], set()
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            stack += [parent for parent, _ in node.next_functions if parent is not None]
    return visited


def holds(outer: Unit, unit: Unit) -> bool:
    """Whether every module of ``unit`` goes with ``outer``, a unit that goes as a whole."""
    if not isinstance(outer, DepthUnit) or outer == unit:
        return False
    return all(any(path == p or path.startswith(f"{p}.") for p in outer.paths) for path in unit.paths)


def is_within(unit: Unit, other: Unit) -> bool:
    """Whether everything of ``unit`` goes with ``other``; a branch is the inner one of two units with the same modules.

    Example:
        >>> from ttmpd.models.tiny import tiny_tokens, tiny_transformer
        >>> block, heads = find_units(tiny_transformer(), tiny_tokens(), ["block", "head"]).units[:2]
        >>> is_within(heads, block), is_within(block, heads)
        (True, False)
    """
    return holds(other, unit) and (not holds(unit, other) or _rank(unit) < _rank(other))


def _rank(unit: Unit) -> tuple[bool, str]:
    return isinstance(unit, DepthUnit) and not unit.branch, unit.id


def holders_of(units: Sequence[Unit]) -> dict[str, tuple[str, ...]]:
    """Unit id -> ids of the units that hold it, outermost first: where one of them goes, it goes, too.

    Example:
        >>> from ttmpd.models.tiny import tiny_tokens, tiny_transformer
        >>> holders_of(find_units(tiny_transformer(), tiny_tokens(), ["block", "head"]).units[:2])
        {'blocks.0': (), 'head:blocks.0.attention.proj': ('blocks.0',)}
    """
    holders: dict[str, list[str]] = {unit.id: [] for unit in units}
    for unit, other in touching(units):
        if is_within(unit, other):
            holders[unit.id].append(other.id)
    return {name: tuple(sorted(ids, key=lambda holder: len(holders[holder]))) for name, ids in holders.items()}


def _nested(units: Sequence[Unit], refusals: dict[str, Refusal]) -> list[Unit]:
    """Those of the units of which one lies within the other or apart from it; why others are left out is noted.

    A branch that has nearly all of the parameters of a unit around it is left out: it is that unit again.
    """
    out: set[str] = set()
    for unit, other in touching(units):
        if is_within(unit, other):
            if isinstance(unit, DepthUnit) and unit.branch and unit.n_params >= ALL_OF_IT * other.n_params:
                out.add(unit.id)
        elif not is_within(other, unit) and not out.intersection((unit.id, other.id)):
            first, second = sorted((unit, other), key=lambda unit: (isinstance(unit, DepthUnit), unit.n_params))
            out.add(first.id)
            refusals[first.path] = Refusal(Reason.OVERLAPS, second.id)
    return [unit for unit in units if unit.id not in out]
