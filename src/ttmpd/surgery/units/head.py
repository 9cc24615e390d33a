"""Attention heads, with the key and value head that a group of queries shares."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ttmpd.method import check_fields
from ttmpd.models.modules import module_at, replace_module
from ttmpd.models.run import first_tensor
from ttmpd.models.tiny import tiny_tokens, tiny_transformer
from ttmpd.records import WidthUnit
from ttmpd.surgery.layers import is_layer, matrix_of, n_axes, spread_out, take_inputs, take_outputs
from ttmpd.surgery.masks import proven
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.reasons import Reason, Refusal
from ttmpd.surgery.units.base import UnitSearch, WidthUnits

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_SIZES = ("all_head_size", "attn_dim", "split_size", "inner_dim", "all_head_dim")
"""Attributes in which attention modules keep how many heads there are, and how wide all of them are together."""


class Silent(nn.Module):
    """Stands where an attention was of which no head is left, as in artifacts of before attentions were units.

    Args:
        name: of that layer, "" where it lies outside and is called by others.
        reader: the layer, which has no inputs left.
        as_pair: answer as attentions do that also hand on their weights.
    """

    def __init__(self, name: str = "", reader: nn.Module | None = None, as_pair: bool = False) -> None:
        super().__init__()
        self.name, self.as_pair = name, as_pair
        if reader is not None:
            self.add_module(name, reader)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the reader makes of no inputs, for every token of the first argument; without a reader, no features."""
        x = first_tensor(args or kwargs)
        assert x is not None
        answer = self.get_submodule(self.name)(x[..., :0]) if self.name else x[..., :0]
        return (answer, None) if self.as_pair else answer


class Head(WidthUnits):
    """Attention heads; where several queries share a key and a value, the whole group is one member.

    An attention module is known by its number of heads and by its layers: those it holds itself make queries, keys and
    values (in one matrix or in several), and the first layer behind them reads the heads.
    """

    source: ClassVar[str] = "Michel et al. (NeurIPS 2019), Kwon et al. (NeurIPS 2022); found here by structure"
    parts: int = 12
    """Into how many widths an attention is divided at most."""

    def __post_init__(self) -> None:
        check_fields(self, parts=1)

    def search(self, observation: Observation) -> UnitSearch:
        """Every attention of two or more heads or groups, in the order of the network."""
        model = observation.model
        layers = {path for path, module in model.named_modules() if is_layer(module)}
        notes = observation.trace.calls
        calls = [note.path for note in notes if note.path in layers]
        shapes = {note.path: note.output.shape[1:] for note in notes if note.path in layers and note.output}
        tuples = {note.path for note in notes if issubclass(note.output_type, tuple)}
        units: list[WidthUnit] = []
        refused: dict[str, Refusal] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                refused[path] = Refusal(Reason.FUSED_HEADS, "torch's MultiheadAttention")
                continue
            layers_of_heads = _layers(path, module, calls, model)
            if layers_of_heads is not None:
                unit = _unit(model, path, layers_of_heads, shapes, observation.macs)
                units.append(dataclasses.replace(unit, form="pair") if path in tuples else unit)
            elif _is_silent(path, module, shapes):
                refused[path] = Refusal(Reason.HIDDEN_LAYERS)
        units = [self._sized(unit) for unit in units if unit.n_members > 1]
        removable, unproven = proven(self.narrow, model, units, observation.batch[:2])
        return UnitSearch(tuple(removable), refused | unproven)

    def _sized(self, unit: WidthUnit) -> WidthUnit:
        """With every number of heads down to one, or equal steps where there are many."""
        counts = (round(unit.n_members * (self.parts - i) / self.parts) for i in range(1, self.parts))
        return dataclasses.replace(unit, widths=tuple(dict.fromkeys(n for n in counts if 0 < n < unit.n_members)))

    def example(self, n: int = 4) -> tuple[nn.Module, Tensor]:
        """Two transformer blocks, and tokens for them."""
        return tiny_transformer(), tiny_tokens(n)

    def narrow(self, student: nn.Module, unit: WidthUnit, kept_members: Sequence[int]) -> None:
        """Rows of queries, keys and values, columns of the layer behind them, and what else there is once per head.

        Without any head, which no unit offers, the layer behind it is left with its bias.
        """
        if not kept_members:
            return _silence(student, unit)
        attention = module_at(student, unit.producers[0].rpartition(".")[0])
        reader = module_at(student, unit.path)
        n_inputs = matrix_of(reader).shape[1]
        for path in unit.producers:
            _take_rows(module_at(student, path), unit, kept_members, n_inputs)
        for owner, name, axis, index in _per_head(attention, unit, kept_members, n_inputs):
            _set(owner, name, axis, index)
        _count(attention, n_inputs, unit.n_members, len(kept_members))
        take_inputs(reader, spread_out(kept_members, n_inputs // unit.n_members))


def _silence(student: nn.Module, unit: WidthUnit) -> None:
    home = unit.producers[0].rpartition(".")[0]
    reader = module_at(student, unit.path)
    take_inputs(reader, spread_out((), 1))
    name = unit.path.removeprefix(f"{home}.") if unit.path.startswith(f"{home}.") else ""
    replace_module(student, home, Silent(name, reader if name else None, unit.form == "pair"))


def _attribute(module: nn.Module, names: Sequence[str]) -> int:
    """The first of the attributes that is there, 0 when none is; Llama keeps its numbers in its config alone."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _layers(path: str, module: nn.Module, calls: list[str], model: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """(layers that make queries, keys and values; the layer that reads the heads), None when this is no attention."""
    heads = _attribute(module, _COUNTS)
    layers = [f"{path}.{name}" if path else name for name, child in module.named_children() if is_layer(child)]
    layers = [name for name in layers if calls.count(name) == 1]
    if heads < 2 or not layers:
        return None
    layers.sort(key=calls.index)
    behind = calls[calls.index(layers[-1]) + 1 :][:1]
    # The last of its own layers reads the heads, or else the layer that runs next.
    for reader, makers in ((layers[-1], layers[:-1]), *((name, layers) for name in behind)):
        if makers and calls.count(reader) == 1 and _fits(model, makers, reader, heads):
            return tuple(makers), reader
    return None


def _fits(model: nn.Module, makers: Sequence[str], reader: str, heads: int) -> bool:
    """Whether what is made is as wide as what is read: three times in one matrix, or queries, keys and values."""
    n_inputs = matrix_of(module_at(model, reader)).shape[1]
    made = [matrix_of(module_at(model, name)).shape[0] for name in makers]
    if n_inputs % heads:
        return False
    size = n_inputs // heads
    fused = made[0] == 3 * n_inputs and all(n == n_inputs for n in made[1:])
    apart = len(made) >= 3 and max(made) == n_inputs and all(n % size == 0 and n_inputs % n == 0 for n in made)
    return fused or apart


def _is_silent(path: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether it has heads and three layers' worth of weights that never run as modules."""
    layers = [f"{path}.{name}" for name, child in module.named_children() if is_layer(child)]
    return _attribute(module, _COUNTS) > 1 and len(layers) > 1 and any(name not in shapes for name in layers)


def _unit(
    model: nn.Module,
    path: str,
    layers_of_heads: tuple[tuple[str, ...], str],
    shapes: dict[str, tuple[int, ...]],
    macs: dict[str, int],
) -> WidthUnit:
    makers, reader = layers_of_heads
    attention, layer = module_at(model, path), module_at(model, reader)
    n_inputs = matrix_of(layer).shape[1]
    heads = _attribute(attention, _COUNTS)
    members = min(heads, *(matrix_of(module_at(model, name)).shape[0] // (n_inputs // heads) for name in makers))
    within = reader.startswith(f"{path}.")
    unit = WidthUnit(
        kind="head",
        path=reader,
        module=type(attention).__name__,
        shape=shapes[reader],
        layout="channels_first" if n_axes(layer) else "channels_last",
        n_params=sum(p.numel() for name in makers for p in module_at(model, name).parameters(recurse=False)),
        macs=macs.get(path, 0) + (0 if within else macs.get(reader, 0)),
        n_members=members,
        consumers=(reader,),
        producers=makers,
    )
    parts = _per_head(attention, unit, range(members), n_inputs)
    owned = sum(value.numel() for o, n, *_ in parts if isinstance(value := getattr(o, n), nn.Parameter))
    return dataclasses.replace(unit, n_params=unit.n_params + matrix_of(layer).numel() + owned)


def _take_rows(layer: nn.Module, unit: WidthUnit, kept_members: Sequence[int], n_inputs: int) -> None:
    n_outputs = matrix_of(layer).shape[0]
    n_parts = 3 if n_outputs == 3 * n_inputs else 1
    size = n_outputs // n_parts
    index = spread_out(kept_members, size // unit.n_members)
    take_outputs(layer, torch.cat([index + part * size for part in range(n_parts)]))


def _per_head(
    attention: nn.Module, unit: WidthUnit, kept_members: Sequence[int], n_inputs: int
) -> Iterator[tuple[nn.Module, str, int, Tensor]]:
    """(module, name, axis, index) of parameters and buffers that hold something for each head: tables, biases."""
    heads = _attribute(attention, _COUNTS)
    for name, value in [*attention.named_parameters(recurse=False), *attention.named_buffers(recurse=False)]:
        for size in dict.fromkeys((heads, n_inputs)):
            axes = [axis for axis, n in enumerate(value.shape) if n == size]
            if len(axes) == 1 and value.is_floating_point():
                yield attention, name, axes[0], spread_out(kept_members, size // unit.n_members)
                break


def _set(owner: nn.Module, name: str, axis: int, index: Tensor) -> None:
    value = getattr(owner, name)
    values = value.detach().index_select(axis, index.to(value.device)).clone()
    setattr(owner, name, nn.Parameter(values, value.requires_grad) if isinstance(value, nn.Parameter) else values)


def _count(attention: nn.Module, n_inputs: int, before: int, now: int) -> None:
    """Numbers of heads and widths in the module's own attributes."""
    size = n_inputs // _attribute(attention, _COUNTS)
    rate = now / before
    for name in (*_COUNTS, *_GROUPS, *_SIZES):
        value: Any = attention.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            whole = name in _SIZES
            if not whole or value in (n_inputs, before * size):
                setattr(attention, name, round(value * rate))
