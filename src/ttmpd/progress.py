"""Progress of long stages: silent unless somebody watches."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Watcher = Callable[[str, int, int], None]
"""Called as ``watcher(stage, done, total)``."""

_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("ttmpd_progress", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While active, ``watcher`` hears of every step of every stage."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(stage: str, done: int, total: int) -> None:
    """Say that ``done`` of ``total`` steps of a stage are finished; a total of 0 is unknown."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(stage, done, total)


def track(items: Iterable[T], stage: str, total: int) -> Iterator[T]:
    """Hand on the items and tell how many are done."""
    for number, item in enumerate(items):
        yield item
        tell(stage, number + 1, total)
