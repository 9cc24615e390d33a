"""Progress of long stages: silent unless somebody watches."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Watcher = Callable[[str, int, int], None]
"""Called as ``watcher(stage, done, total)``."""
StageWatcher = Callable[[str, Path], None]
"""Called as ``on_stage(name, path)`` as soon as the file of a finished stage is whole."""

_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("ttmpd_progress", default=None)
_on_stage: contextvars.ContextVar[StageWatcher | None] = contextvars.ContextVar("ttmpd_on_stage", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher, on_stage: StageWatcher | None = None) -> Iterator[None]:
    """Report every step of every stage while the block runs, in this thread.

    Args:
        watcher: called after every step. What it raises ends the work at that step: a caller stops a long run so.
        on_stage: called when a stage is finished, or was by an earlier run, with the file that holds its result.
    """
    tokens = _watcher.set(watcher), _on_stage.set(on_stage)
    try:
        yield
    finally:
        _watcher.reset(tokens[0])
        _on_stage.reset(tokens[1])


def tell(stage: str, done: int, total: int) -> None:
    """Report that ``done`` of ``total`` steps of a stage are finished; a total of 0 is unknown.

    What the watcher raises passes through here, so hold nothing that must be given back without a ``with``.
    """
    watcher = _watcher.get()
    if watcher is not None:
        watcher(stage, done, total)


def tell_stage(name: str, path: Path) -> None:
    """Report that the file of a stage is whole."""
    on_stage = _on_stage.get()
    if on_stage is not None:
        on_stage(name, path)


def track(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
    """Yield the items and report after each how many are done."""
    for number, item in enumerate(items):
        yield item
        tell(stage, number + 1, total)
