"""Read plans of format 1, which did not say everything; ``format_1_report`` reads its reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ttmpd.errors import CheckpointError
from ttmpd.records import ACTIONS, Folded, Removal


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of an artifact of format 1 in the words of format 2.

    What was folded stays open: only the weights tell it, see :func:`folded_in`.

    Args:
        data: what ``plan.json`` holds; it is not changed.

    Raises:
        CheckpointError: it holds a 3x3 replacement, which no longer exists.
        KeyError, TypeError, AttributeError: a value is missing or of another kind.
    """
    removals, exits = data["plan"]["removals"], data.get("early_exit")
    kind = "exits" if exits else "compressed" if removals else "adapted"  # each command leaves something else behind
    plan = {**data["plan"], "removals": [_removal(row) for row in removals]}
    return {**data, "kind": kind, "plan": plan, "early_exit": None if exits is None else _exits(exits)}


def _removal(row: Mapping[str, Any]) -> dict[str, Any]:
    """One record served units with members and those without."""
    if row.get("action") == "conv":
        raise CheckpointError(
            f"action of {row.get('path')!r} must be one of {', '.join(ACTIONS)}, but got 'conv': 3x3 replacements were "
            "dropped; ttmpd 0.1.0 still reads this artifact, or compress the model again"
        )
    old = {"members": 0, "feeders": [], "widths": [], "kept": [], "form": "plain", **row}
    n_members, producers, widths = old.pop("members"), old.pop("feeders"), old.pop("widths")
    if not n_members:
        return old | {"branch": False, "upstream": []}
    old.pop("activation", None)
    return old | {
        "n_members": n_members,
        "producers": producers,
        "consumers": [old.get("path")],
        "widths": [width for width in widths if width < n_members],
    }


def _exits(data: Mapping[str, Any]) -> dict[str, Any]:
    """Two keys had other names."""
    old = dict(data)
    return {"exits": old.pop("places"), "saved_shares": old.pop("saves"), **old}


def folded_in(stock: nn.Module, removals: Sequence[Removal], state: Mapping[str, Tensor]) -> Folded:
    """What was folded, as the names of the weights tell it.

    Args:
        stock: the original model.
        removals: what was made of it.
        state: weights of the student.
    """
    chosen = [removal.unit.path for removal in removals if removal.action == "linear"]
    replacements = tuple(path for path in chosen if not any(key.startswith(f"{path}.") for key in state))
    layers = [(path, module) for path, module in stock.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    biases = tuple(path for path, layer in layers if layer.bias is None and f"{path}.bias" in state)
    return Folded(replacements, biases)
