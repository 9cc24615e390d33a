"""Cut a model by a list of removals, and build the student of a plan."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import count_parameters, module_at, to_fast_format
from ttmpd.models.state import load_tensor_state
from ttmpd.records import NOTHING_FOLDED, UNCHANGED, DepthUnit, Folded, Lossless, Removal, Unit, WidthUnit, check_apart
from ttmpd.surgery.find import depth_kind, holds, width_kind
from ttmpd.surgery.layers import matrix_of
from ttmpd.surgery.lossless import apply, with_norms_gone
from ttmpd.surgery.replacements import as_identity, copied_without, put


def cut(model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    """A new model without the units, and with the kept members alone where one is narrowed; no replacements yet.

    Raises:
        InvalidValueError: a unit goes with another one, see :func:`ttmpd.records.check_apart`.
    """
    check_apart([removal.unit for removal in removals])
    student = copied_without(model, [removal.unit for removal in removals if isinstance(removal.unit, DepthUnit)])
    for removal in removals:
        remove(student, removal.unit, removal.kept)
    return student


def remove(student: nn.Module, unit: Unit, kept: Sequence[int] = ()) -> None:
    """Take a unit out of ``student``, in place; of one with members all but ``kept``."""
    if isinstance(unit, WidthUnit):
        width_kind(unit).narrow(student, unit, kept)
    elif isinstance(unit, DepthUnit):
        depth_kind(unit).drop(student, unit)


def replacement(unit: Unit) -> nn.Module:
    """An untrained linear replacement of a depth unit."""
    assert isinstance(unit, DepthUnit)
    return depth_kind(unit).replacement(unit)


def has_replacement(unit: Unit) -> bool:
    """Whether a linear map can take the unit's place."""
    return isinstance(unit, DepthUnit) and "linear" in depth_kind(unit).actions


def joined(earlier: Sequence[Removal], later: Sequence[Removal]) -> tuple[Removal, ...]:
    """The removals of a model that was compressed, and those of a second run: what went with a larger unit is left out.

    Example:
        A block whose channels were narrowed first and which is dropped now is one removal: the block.
    """
    return (*(removal for removal in earlier if not any(holds(r.unit, removal.unit) for r in later)), *later)


def check_units(model: nn.Module, units: Sequence[Unit]) -> None:
    """Raise :class:`InvalidValueError` when a unit does not belong to the stock ``model``.

    A unit may be smaller than the model's: it was found where something had been removed from it before.
    """
    for unit in units:
        module = module_at(model, unit.path)
        n_params = sum(count_parameters(module_at(model, path)) for path in unit.paths)
        if isinstance(unit, WidthUnit):
            n_inputs = matrix_of(module).shape[1]
            if n_inputs < unit.n_members:
                raise InvalidValueError(
                    f"unit {unit.id} must have {unit.n_members} members, but the model's layer reads {n_inputs} "
                    "inputs; the plan belongs to another model"
                )
        elif n_params < unit.n_params:
            raise InvalidValueError(
                f"unit {unit.id} must have at least {unit.n_params} parameters, but the model's has {n_params}; "
                "the plan belongs to another model"
            )


def build(model: nn.Module, removals: Sequence[Removal], folded: Folded = NOTHING_FOLDED) -> nn.Module:
    """The student of a plan before any repair: the cut model with linear replacements that hand on their input.

    Every student is made here: that of a plan, one whose latency is measured, and that of an artifact.

    Args:
        model: left untouched.
        removals: in the order in which they are made.
        folded: see there.

    Returns:
        A new model in eval mode, on the device of ``model``.
    """
    student = cut(model, removals)
    for removal in removals:
        if removal.action == "linear" and removal.unit.path not in folded.replacements:
            put(student, removal.unit, as_identity(replacement(removal.unit)))
    for path in folded.biases:
        layer = module_at(student, path)
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return student.to(next(model.parameters()).device).eval()


def replay(
    model: nn.Module,
    removals: Sequence[Removal],
    state: Mapping[str, Tensor],
    lossless: Lossless = UNCHANGED,
    folded: Folded = NOTHING_FOLDED,
) -> nn.Module:
    """A copy of the stock model with the removals made and the weights in ``state`` loaded: how artifacts come back.

    Args:
        model: left untouched.
        removals: in the order in which they were made.
        state: weights of the student.
        lossless: the changes that were made to the student.
        folded: what became of its replacements.

    Raises:
        RuntimeError: the weights do not fit (torch's own message names the keys).
    """
    student = with_norms_gone(build(model, removals, folded), lossless)
    load_tensor_state(student, state)
    return to_fast_format(student) if lossless.channels_last else student


def skeleton(model: nn.Module, removals: Sequence[Removal], lossless: Lossless = UNCHANGED) -> nn.Module:
    """The student of a plan before any repair, with the lossless changes: as fast as the trained student will be."""
    return apply(build(model, removals), lossless)
