"""The same student as a plain Hugging Face directory, where the library's own configuration can say what is left of it.

That is so when whole layers are gone, and when every layer was narrowed alike. Whether it is so is settled by numbers:
a model built from the new configuration must take the weights and answer like the student.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.preprocessing import Preparation
from ttmpd.data.tokenization import Tokenization, hide_progress_bars, load_tokenizer
from ttmpd.models.run import evaluating, predict, same_outputs
from ttmpd.models.state import tensor_state
from ttmpd.models.tokens import mask_padding, random_ids
from ttmpd.records import Removal, WidthUnit

_HIDDEN = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads")


def stock_model(
    student: nn.Module, removals: Sequence[Removal], how: Preparation | None, shape: Sequence[int]
) -> nn.Module | None:
    """A model of the same class, built from a configuration of its library, with the student's weights.

    Args:
        student: on the CPU; a transformers model of which parts are gone.
        removals: that made it.
        how: its preprocessing.
        shape: of one sample.

    Returns:
        None for any other model, and where no configuration says what is left.
    """
    config = getattr(student, "config", None)
    if not removals or not shape or not hasattr(student, "save_pretrained") or config is None:
        return None
    if any(True for r in removals if r.action != "narrow" for _ in student.get_submodule(r.unit.path).parameters()):
        return None  # a stand-in
    try:
        fresh = _rebuilt(student, copy.deepcopy(config), removals)
        return fresh if fresh is not None and _alike(student, fresh, how, shape) else None
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return None  # a configuration that says other things in other words: the artifact itself says it all


def _rebuilt(student: nn.Module, config: Any, removals: Sequence[Removal]) -> nn.Module | None:
    layers = _layers(removals)
    if layers is None or not _narrowed(config, removals, layers):
        return None
    if layers.gone:
        _shortened(config, layers)
    with torch.random.fork_rng():
        fresh: nn.Module = type(student)._from_config(config).float().eval()  # type: ignore[attr-defined]
    state = tensor_state(student)
    fresh.load_state_dict({layers.renamed(key): value for key, value in state.items() if not layers.is_gone(key)})
    return fresh


def save_stock(fresh: nn.Module, how: Preparation | None, folder: Path) -> None:
    """Write the model, and its tokenizer where it has one, as ``from_pretrained`` reads them."""
    with hide_progress_bars():
        fresh.save_pretrained(folder)  # type: ignore[operator]
    if isinstance(how, Tokenization) and how.tokenizer:
        load_tokenizer(how.tokenizer).save_pretrained(folder)


class _Layers:
    """The numbered layers of a model, and which of them are gone."""

    def __init__(self, path: str, gone: Sequence[int]) -> None:
        self.path, self.gone = path, set(gone)

    def _number(self, key: str) -> int | None:
        first = key.removeprefix(f"{self.path}.").partition(".")[0] if key.startswith(f"{self.path}.") else ""
        return int(first) if first.isdigit() else None

    def is_gone(self, key: str) -> bool:
        """Whether the path lies in a layer that is gone."""
        return self._number(key) in self.gone

    def renamed(self, key: str) -> str:
        """The path once the layers that are left are numbered anew."""
        number = self._number(key)
        if number is None:
            return key
        rest = key.removeprefix(f"{self.path}.").partition(".")[2]
        return f"{self.path}.{number - sum(gone < number for gone in self.gone)}.{rest}"


def _layers(removals: Sequence[Removal]) -> _Layers | None:
    """The list of layers from which some are gone; None where something else than such layers is gone."""
    whole = [removal.unit.path.rpartition(".") for removal in removals if removal.action != "narrow"]
    parts = [removal.unit.path.split(".") for removal in removals if removal.action == "narrow"]
    homes = {home for home, _, _ in whole} | {
        ".".join(path[: next(i for i, name in enumerate(path) if name.isdigit())])
        for path in parts
        if any(name.isdigit() for name in path)
    }
    if len(homes) != 1 or not all(name.isdigit() for _, _, name in whole):
        return None
    return _Layers(homes.pop(), [int(name) for _, _, name in whole])


def _shortened(config: Any, layers: _Layers) -> None:
    """Say that some layers are gone; lists with an entry a layer lose theirs."""
    n_layers = int(config.num_hidden_layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, name, [item for number, item in enumerate(value) if number not in layers.gone])
    config.num_hidden_layers = n_layers - len(layers.gone)


def _narrowed(config: Any, removals: Sequence[Removal], layers: _Layers) -> bool:
    """Say how wide all layers are now; False where they differ, or where there is no word for it."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    for removal in removals:
        if isinstance(removal.unit, WidthUnit) and not layers.is_gone(removal.unit.path):
            sizes.setdefault(removal.unit.kind, []).append((removal.unit.n_members, len(removal.kept)))
    for cut in sorted(sizes.values(), reverse=True):  # the larger numbers are those of neurons
        if len(set(cut)) != 1 or len(cut) != int(config.num_hidden_layers) - len(layers.gone):
            return False
        members, kept = cut[0]
        if not _set_hidden(config, members, kept) and not _set_heads(config, members, kept):
            return False
    return True


def _set_hidden(config: Any, members: int, kept: int) -> bool:
    for name in _HIDDEN:
        if hasattr(config, name) and getattr(config, name) in (members, None):
            setattr(config, name, kept)
            return True
    return False


def _set_heads(config: Any, members: int, kept: int) -> bool:
    """Only where the size of a head is a word of its own: else it would follow from their number."""
    size = getattr(config, "head_dim", None)
    if size is None or kept < 1:
        return False
    for name in _HEADS:
        if hasattr(config, name):
            setattr(config, name, int(getattr(config, name)) * kept // members)
    return True


def _alike(student: nn.Module, fresh: nn.Module, how: Preparation | None, shape: Sequence[int]) -> bool:
    batch: Tensor
    if isinstance(how, Tokenization):
        batch = random_ids(student, how, (2, *shape))
        fresh = mask_padding(copy.deepcopy(fresh), how)
    else:
        batch = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with evaluating(student), evaluating(fresh):
        return same_outputs(predict(fresh, batch), predict(student, batch))
