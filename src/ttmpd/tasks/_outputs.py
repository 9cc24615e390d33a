"""The predicted tensors in what a model returned: a tensor, tuple, dict or dataclass."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ttmpd.errors import ModelError
from ttmpd.method import names

NAMED_OUTPUTS = ("logits", "prediction_logits", "out", "scores")
"""Names under which models give their predictions in a dict or a dataclass, the likeliest first."""


def next_step(shape: Sequence[int]) -> str:
    """What to do about an output of this shape, which no task claims."""
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return "wrap the model so that it answers with .flatten(1)"
    if len(shape) == 4:
        return "where it gives a class for each pixel, say task=segmentation (--task segmentation)"
    return f"name its task: one of {', '.join(names('tasks'))} (task=, or --task)"


def named_values(raw: Any) -> dict[str, Any]:
    """The entries of a tuple, dict or dataclass by name; of a tensor "" alone."""
    if isinstance(raw, Tensor):
        return {"": raw}
    if isinstance(raw, Mapping):
        return {str(key): value for key, value in raw.items()}
    if isinstance(raw, Sequence) and not isinstance(raw, str | bytes):
        return {str(number): value for number, value in enumerate(raw)}
    values = getattr(raw, "__dict__", None) or {name: getattr(raw, name) for name in getattr(raw, "__slots__", ())}
    return dict(values)


def default_parts(raw: Any) -> tuple[str, ...]:
    """Names of what is predicted where nobody says so.

    The only tensor; else the first of ``NAMED_OUTPUTS``; of a tuple all tensors, if each is (B, n), or the one that is.

    Raises:
        ModelError: several tensors are equally likely.
    """
    values = {name: value for name, value in named_values(raw).items() if isinstance(value, Tensor)}
    if not values:
        raise ModelError(f"a model must answer with a tensor, but answered with {type(raw).__name__} without one")
    if len(values) == 1:
        return tuple(values)
    usual = next((name for name in NAMED_OUTPUTS if name in values), None)
    if usual is not None:
        return (usual,)
    flat = tuple(name for name, value in values.items() if value.dim() == 2)
    if isinstance(raw, Sequence) and flat and (len(flat) == len(values) or len(flat) == 1):
        return flat
    keys = ", ".join(values)
    raise ModelError(
        f"it must be clear which tensor is predicted, but the output has {keys}; name them, as in "
        f"task=Classification(parts=({', '.join(map(repr, values))})) or --task classification:{','.join(values)}, "
        "or wrap the model so that it answers with one tensor"
    )


def predicted_tensors(raw: Any, parts: Sequence[str]) -> list[Tensor]:
    """The tensors of that name in a model's output, in this order; the usual ones where no name is given.

    Raises:
        ModelError: there is no tensor of that name.
    """
    values, tensors = named_values(raw), []
    for name in parts or default_parts(raw):
        if not isinstance(values.get(name), Tensor):
            there = ", ".join(name or "a single tensor" for name, value in values.items() if isinstance(value, Tensor))
            raise ModelError(f"a model's output must have the part {name!r}, but has {there or 'no tensor'}")
        tensors.append(values[name])
    return tensors


def all_rows(raw: Any, least: int) -> bool:
    """Whether every predicted tensor is (B, n) with at least so many columns; False where it is unclear."""
    try:
        tensors = predicted_tensors(raw, ())
    except ModelError:
        return False
    return all(value.dim() == 2 and value.shape[1] >= least for value in tensors)


def as_rows(value: Tensor, task: str) -> Tensor:
    """The tensor itself, if it is (B, n), or (B,) as one column.

    Raises:
        ModelError: it has another shape.
    """
    if value.dim() == 1:
        return value[:, None]
    if value.dim() != 2:
        raise ModelError(
            f"a model for {task} must predict one row per sample, but its output has the shape {tuple(value.shape)}; "
            f"{next_step(value.shape)}"
        )
    return value
