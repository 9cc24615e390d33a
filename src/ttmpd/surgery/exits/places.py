"""Where exits may stand: behind the blocks of a model, those that change the shape included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ttmpd.errors import UnsupportedError
from ttmpd.models.modules import module_at
from ttmpd.models.run import OTHER_BATCH_SIZE, evaluating, predict, same_outputs
from ttmpd.models.trace import ModuleCall, trace
from ttmpd.records import DepthUnit, Layout
from ttmpd.surgery.exits.model import EarlyExitModel
from ttmpd.surgery.exits.pooling import choose_pool, width
from ttmpd.surgery.exits.routing import changed
from ttmpd.surgery.exits.spec import NEVER, Exit, Exits
from ttmpd.surgery.find import find_units, kinds_of
from ttmpd.surgery.reasons import Reason

_BLOCKS_ALL_THE_SAME = (Reason.NEEDED, Reason.WRITES_INPUT, Reason.OUTPUT_WRITTEN)
"""Why a block cannot be removed although it is one: as a place for an exit it is as good as others."""


@dataclass(frozen=True, slots=True)
class ExitLocation:
    """A block that may carry an exit.

    Args:
        path: of the block.
        shape: of its output for one sample.
        layout: which axis of that holds the channels.
        n_arguments: that it is called with.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout
    n_arguments: int = 1


@dataclass(frozen=True, slots=True)
class _Watched:
    """What one run showed of a module: number of calls, arguments, shape of the output, first axis of all tensors."""

    count: int
    n_arguments: int
    shape: tuple[int, ...]
    sizes: Mapping[str, int]


def find_places(model: nn.Module, batch: Tensor) -> tuple[tuple[ExitLocation, ...], tuple[str, ...]]:
    """The blocks in calling order, and the names of their arguments whose first axis is not that of the samples.

    Blocks are the removable ones, those that hold their shortcut, and all others of the same class:
    those that change the shape, or that the model does not run without. The model is run on two and on three samples;
    what has another first axis then belongs to the samples.

    Args:
        model: left untouched.
        batch: two samples or more on its device; fewer are repeated.

    Raises:
        UnsupportedError: there is no row of blocks.
    """
    search = find_units(model, batch[:2], kinds_of("depth"))
    blocks = [unit.path for unit in search.units if isinstance(unit, DepthUnit) and not unit.branch]
    blocks += [path for path, refusal in search.not_removable.items() if refusal.reason in _BLOCKS_ALL_THE_SAME]
    classes = {type(module_at(model, path)) for path in blocks}
    paths = [path for path, module in model.named_modules() if path and type(module) in classes]
    two, three = (_watched(model, paths, _repeated(batch, n)) for n in (2, 3))
    good = [
        path
        for path, module in two.items()  # in calling order
        if module.count == 1
        and len(module.shape) > 1
        and module.shape[0] == 2
        and three[path].shape == (3, *module.shape[1:])
    ]
    outer = [path for path in good if not any(path.startswith(f"{other}.") for other in good)]
    if len(outer) < 2:
        reasons = "; ".join(f"{path} {refusal}" for path, refusal in list(search.not_removable.items())[:3])
        raise UnsupportedError(
            f"{type(model).__name__} must have a row of blocks for exits to stand behind, but {len(outer)} were found"
            f"{': ' + reasons if reasons else ''}; `ttmpd inspect` lists what it has"
        )
    places = tuple(
        ExitLocation(path, shape, _layout(module_at(model, path), shape), two[path].n_arguments)
        for path, shape in ((path, two[path].shape[1:]) for path in outer)
    )
    fixed = {name for path in outer for name, size in two[path].sizes.items() if three[path].sizes.get(name) == size}
    return places, tuple(sorted(fixed))


def _layout(module: nn.Module, shape: tuple[int, ...]) -> Layout:
    """Which axis of the output holds the channels, read off the layers that make them; ``shape`` is for one sample."""
    if len(shape) == 1:
        return "channels_last"
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.out_channels == shape[0]:
            return "channels_first"
        if isinstance(layer, nn.Linear) and layer.out_features == shape[-1]:
            return "channels_last"
    return "channels_first" if len(shape) == 3 else "channels_last"


def _repeated(batch: Tensor, n: int) -> Tensor:
    return batch[torch.arange(n, device=batch.device) % len(batch)]


def _watched(model: nn.Module, paths: Sequence[str], batch: Tensor) -> dict[str, _Watched]:
    """What a run shows of the modules, in calling order: shape of the output, first axis of all tensors by name."""
    calls = trace(model, batch, paths=paths, values=True).by_path()
    return {path: _watched_module(calls[path]) for path in calls}


def _watched_module(calls: Sequence[ModuleCall]) -> _Watched:
    sizes: dict[str, int] = {}

    def note_size(name: str, value: Tensor) -> Tensor:
        if value.dim():
            sizes[name] = len(value)
        return value

    for module_call in calls:
        arguments = {str(i): value for i, value in enumerate(module_call.args)} | dict(module_call.kwargs)
        for name, value in (*arguments.items(), ("output", module_call.result)):
            changed(value, note_size, name)
    output = calls[-1].output
    return _Watched(len(calls), calls[-1].n_arguments, () if output is None else output.shape, sizes)


def spread(n_places: int, n_exits: int) -> tuple[int, ...]:
    """Numbers of places, from 0, evenly over the depth; the last place is left out: the model's own answer is near.

    Example:
        >>> spread(6, 5), spread(27, 3), spread(2, 5)
        ((0, 1, 2, 3, 4), (6, 13, 19), (0,))
    """
    n = min(n_exits, n_places - 1)
    return tuple(int((i + 1) * n_places / (n + 1) + 0.5) - 1 for i in range(n))


def exits_at(
    places: Sequence[ExitLocation],
    chosen: Sequence[int],
    n_classes: int,
    *,
    mix: bool,
    fixed: Sequence[str],
    padding: int | None,
) -> Exits:
    """Exits behind the places numbered ``chosen``; with ``mix`` each reads all places up to it that are as wide."""
    exits = []
    for number in chosen:
        place = places[number]
        pool = choose_pool(place.shape, place.layout, n_classes)
        n_features = width(pool, place.shape, place.layout)
        alike = [
            p.path for p in places[:number] if (p.layout, _read(p, n_classes)) == (place.layout, (pool, n_features))
        ]
        reads = (*(alike if mix else ()), place.path)
        exits.append(Exit(place.path, reads, pool, place.layout, len(reads) * n_features))
    behind = places[min(chosen) + 1 :]
    followers = tuple(place.path for place in behind if place.n_arguments > 1)
    paths = tuple(place.path for place in places)
    return Exits(tuple(exits), paths, n_classes, followers, tuple(fixed), padding)


def _read(place: ExitLocation, n_classes: int) -> tuple[str, int]:
    pool = choose_pool(place.shape, place.layout, n_classes)
    return pool, width(pool, place.shape, place.layout)


def proven(model: nn.Module, exits: Exits, batch: Tensor) -> Exits:
    """The exits, with ``compact`` off where the model does not run on, or answers others, when its batch shrinks.

    For each exit every other sample is sent out there, and those that stay must get the answers of the whole model.

    Args:
        model: hooks are put on it; pass a copy.
        exits: as they shall be.
        batch: a few samples.
    """
    whole = EarlyExitModel(model, exits, NEVER).eval()
    batch, end = _repeated(batch, 5), len(exits.exits)
    with evaluating(whole):
        predictions = predict(model, batch)
        for number in range(end):
            # Two sizes on the way: what was cut once must be cut again.
            leaving = torch.tensor([number, end, min(number + 1, end), end, end], device=batch.device)
            try:
                early = whole.answer_at(batch, leaving)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                return replace(exits, compact=False)
            stay = leaving == end
            if not same_outputs(early.logits[stay], predictions[stay], OTHER_BATCH_SIZE):
                return replace(exits, compact=False)
    return exits
