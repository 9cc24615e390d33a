"""Open a model by id, with its own preprocessing; nothing is unpickled and no remote code is run."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, ModelError, cause
from ttmpd.models.admission import admitted
from ttmpd.models.config import preprocessing_of
from ttmpd.models.factory import call_factory, is_factory
from ttmpd.models.hub import _BUILDERS, _refuse_keys, _require
from ttmpd.models.modules import clone
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import mask_of, mask_padding

_log = logging.getLogger(__name__)

FORMS = (
    "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/local/directory, path/to/file.py:factory or package.module:factory"
)


def open_model(model: str | nn.Module, *, weights: Path | None = None, pretrained: bool = True) -> OpenedModel:
    """The model that an id names, on the CPU, with its preprocessing.

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME``, ``hf:/directory``, ``path/to/file.py:factory``,
            ``package.module:factory``, or a module, which is used as it is (a copy of one that takes text).
        weights: a safetensors file to load instead of the published weights.
        pretrained: load the published weights; a factory decides this for itself.

    Raises:
        InvalidValueError: the id has none of these forms, or ``weights`` is no safetensors file.
        MissingPackageError: the package that knows the id is not installed.
        ModelError: the model cannot be built, downloaded, or does not fit ``weights``.
        UnsupportedError: it is no classifier of images or text, and no decoder of text.

    Example:
        >>> opened = open_model("ttmpd.demo:demo_model")
        >>> opened.module.training
        False
    """
    if weights is not None:
        _check_weights(Path(weights))
    if isinstance(model, nn.Module):
        opened = _from_module(model)
    else:
        scheme, _, name = model.partition(":")
        builder = _BUILDERS.get(scheme)
        published = pretrained and weights is None
        opened = builder(name, published) if builder is not None and name else _from_factory(model)
        opened.module.eval()
    if weights is not None:
        _load_weights(opened.module, Path(weights))
    return opened


def _from_module(module: nn.Module, model_id: str = "") -> OpenedModel:
    """A module of the user's own code; it is left as it is, so one that takes text gets its mask on a copy."""
    module = admitted(module)
    preparation = preprocessing_of(module)
    if isinstance(preparation, Tokenization) and mask_of(module) is None:
        module = mask_padding(clone(module), preparation)
    return OpenedModel(module, model_id, is_rebuildable(model_id), preparation)


def is_rebuildable(model_id: str) -> bool:
    """Whether the id alone is enough to build the model again, without running code that it names."""
    scheme, _, name = model_id.partition(":")
    return (scheme in _BUILDERS and bool(name)) or model_id == "ttmpd.demo:demo_model"


def _from_factory(model_id: str) -> OpenedModel:
    if not is_factory(model_id):
        raise InvalidValueError(f"a model id must be one of {FORMS}, but got {model_id!r}{_hint(model_id)}")
    return _from_module(call_factory(model_id), model_id)


def _hint(name: str) -> str:
    """A suggestion for a bare name; timm is asked only when it is installed."""
    if importlib.util.find_spec("timm") is not None and ":" not in name and _require("timm", "timm").is_model(name):
        return f"; did you mean timm:{name}?"
    return "; put one of these prefixes before the name"


def _check_weights(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise InvalidValueError(
            f"weights must be a .safetensors file, but got {path.name!r}; pickled files can run code when opened: "
            "convert it with safetensors.torch.save_file"
        )
    if not path.is_file():
        raise InvalidValueError(f"weights must be an existing file, but got {str(path)!r}; check the path")


def _load_weights(module: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:
        raise ModelError(f"{path.name} must be a readable safetensors file, but got {cause(error)}") from error
    expected = module.state_dict()
    state = _without_prefix(state, expected, path.name)
    present = {expected[key].data_ptr() for key in state if key in expected}  # tied tensors are stored once
    missing = [key for key, value in expected.items() if key not in state and value.data_ptr() not in present]
    extra = [
        f"{key} {tuple(state[key].shape)}"
        for key in state
        if key not in expected or expected[key].shape != state[key].shape
    ]
    _refuse_keys(path.name, [key for key in missing if not key.endswith(".num_batches_tracked")], extra)
    module.load_state_dict(state, strict=False)


PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "student.", "teacher.")
"""What training code puts before every name."""


def _without_prefix(state: dict[str, Tensor], expected: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The weights without what a wrapper has put before all of their names, as far as that makes more of them fit."""
    while prefix := next((each for each in PREFIXES if state and all(name.startswith(each) for name in state)), ""):
        shorter = {name.removeprefix(prefix): value for name, value in state.items()}
        if len(expected.keys() & shorter.keys()) <= len(expected.keys() & state.keys()) and not any(
            name.startswith(PREFIXES) for name in shorter
        ):
            break
        _log.warning("%r before every name in %s is taken off", prefix, source)
        state = shorter
    return state
