"""Models from a user's own code: ``path/to/file.py:factory`` or ``package.module:factory``."""

import contextlib
import difflib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ttmpd.errors import ModelError, cause


def is_factory(model_id: str) -> bool:
    """Whether an id has the form ``path/to/file.py:factory`` or ``package.module:factory``."""
    place, _, factory = model_id.rpartition(":")
    named = place.endswith(".py") or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place) is not None
    return factory.isidentifier() and named


def call_factory(model_id: str) -> nn.Module:
    """The model that the function (or the module itself) behind a factory's id gives.

    Raises:
        ModelError: the file or package cannot be imported, has no such name, or gives no model.
    """
    place, _, factory = model_id.rpartition(":")
    is_file = place.endswith(".py")
    with _importable(Path(place).parent if is_file else None):
        holder = _import_file(Path(place)) if is_file else _import_module(place)
        made = getattr(holder, factory, None)
        if made is None:
            callables = [name for name, value in vars(holder).items() if callable(value) and not name.startswith("_")]
            close = ", ".join(difflib.get_close_matches(factory, callables, 3, 0.3) or callables[:3])
            raise ModelError(f"{place} must hold {factory!r}, but holds no such name; it has {close or 'no functions'}")
        if not isinstance(made, nn.Module):
            try:
                made = made()
            except Exception as error:
                raise ModelError(
                    f"{model_id} must return a model when called without arguments, but raised {cause(error)}"
                ) from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"{model_id} must return an nn.Module, but returned {type(made).__name__}")
    return made


@contextlib.contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Let a file import what lies beside it, as Python does for a script."""
    added = [] if folder is None else [str(folder.expanduser().resolve())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(path)


def _import_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ModelError(f"a factory's file must exist, but got {str(path)!r}; check the path")
    name = f"ttmpd_file_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"a factory's file must be importable, but got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelError(f"{path.name} must be importable, but raised {cause(error)}; run it on its own") from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(
            f"{name} must be importable, but raised {cause(error)}; install it, set PYTHONPATH, or name its file.py"
        ) from error
