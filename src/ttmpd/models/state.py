"""The tensors of a model's state, without what modules keep as plain data beside them (``get_extra_state``)."""

from collections.abc import Mapping

from torch import Tensor, nn


def tensor_state(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight or buffer, the model's own tensors.

    Data of other types are no part of it: they are not trained, every copy of the model carries them, and a file that
    holds them would have to be unpickled.

    Example:
        >>> list(tensor_state(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def load_tensor_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all weights and buffers of a model, in place; data of other types stay as they are.

    Args:
        model: of the same structure as that of :func:`tensor_state`.
        state: all of its tensors.

    Raises:
        RuntimeError: the names or shapes are others (torch's own message names them).
    """
    others = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict({**state, **others})
