"""Milliseconds on this device: warm-up, interleaved rounds, medians with their quartiles.

Single runs lie on busy machines. Whatever is to be compared runs in the same rounds, one call each per round in a
seeded order, so that a slow moment hits all candidates alike; ratios are taken round by round and their median quoted.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError
from ttmpd.latency.device import synchronize
from ttmpd.latency.memory import release_freed_memory
from ttmpd.models.run import evaluating
from ttmpd.progress import tell
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call: median and quartiles over interleaved rounds."""

    median_ms: float
    low_ms: float
    high_ms: float
    n_rounds: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.median_ms) and self.median_ms >= 0):
            raise InvalidValueError(f"median_ms must be finite and at least 0, but got {self.median_ms!r}")

    @property
    def error_ms(self) -> float:
        """Standard error of the median, if rounds differ as normal noise does.

        Example:
            >>> round(Timing(10.0, 9.5, 10.5, 25).error_ms, 3)
            0.186
        """
        deviation = (self.high_ms - self.low_ms) / 1.349
        return math.sqrt(math.pi / 2) * deviation / math.sqrt(self.n_rounds)


_FEWEST = 5  # rounds with which quartiles begin to mean something


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of several candidates: one value per round; value i of all of them is from the same round."""

    ms: Mapping[str, tuple[float, ...]]

    def timing(self, name: str) -> Timing:
        """Median and quartiles of one candidate."""
        low, median, high = quartiles(self.ms[name])
        return Timing(median, low, high, len(self.ms[name]))

    def ratio(self, slow: str, fast: str) -> Timing:
        """How many times faster ``fast`` is than ``slow``: median and quartiles of the round-by-round ratios."""
        low, median, high = quartiles([a / b for a, b in zip(self.ms[slow], self.ms[fast], strict=True)])
        return Timing(median, low, high, len(self.ms[slow]))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
    precision: float = math.inf,
    clock: Clock = time.perf_counter,
    seed: int = 0,
) -> Timings:
    """Time all candidates in turn, round after round.

    Args:
        candidates: name -> call without arguments; a call must not return before its work is done.
        rounds: counted rounds; at least this many.
        warmup: rounds that are run and thrown away.
        min_seconds: go on (up to 20 times ``rounds``) until the counted rounds have taken this long: fast calls need
            more of them.
        max_seconds: stop after this long with fewer rounds, but not before the fifth: slow calls need fewer.
        precision: go on, for twice ``max_seconds`` at most, until the ratios to the first candidate are known to this
            (their standard errors over them): busy machines need more rounds.
        clock: returns seconds; injected by tests.
        seed: of the order within a round.

    Raises:
        InvalidValueError: there is nothing to time or no round.
    """
    if not candidates or rounds < 1 or warmup < 0:
        raise InvalidValueError(f"timing must have candidates and rounds >= 1, but got {len(candidates)} and {rounds}")
    release_freed_memory()  # what other work left in pieces would be added to the peak of this one
    order, shuffle = list(candidates), random.Random(seed)
    ms: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + 20 * rounds):
        shuffle.shuffle(order)
        for name in order:
            start = clock()
            candidates[name]()
            if number >= warmup:
                ms[name].append((clock() - start) * 1e3)
        done, spent = number + 1 - warmup, sum(map(sum, ms.values())) / 1e3
        if done > 0:
            expected = math.ceil(done * min_seconds / spent) if spent > 0 else rounds
            tell("timing", done, min(20 * rounds, max(rounds, expected)))
        enough = (done >= rounds and spent >= min_seconds) or (done >= _FEWEST and spent >= max_seconds)
        if enough and (spent >= 2 * max_seconds or _is_precise(ms, precision)):
            break
    return Timings({name: tuple(values) for name, values in ms.items()})


def _is_precise(ms: Mapping[str, Sequence[float]], precision: float) -> bool:
    """True when the standard error of every ratio to the first candidate is at most this share of the ratio."""
    if precision == math.inf:
        return True
    timings = Timings({name: tuple(values) for name, values in ms.items()})
    first, *candidates = ms
    ratios = [timings.ratio(first, name) for name in candidates]
    return all(ratio.error_ms <= precision * ratio.median_ms for ratio in ratios)


def forward_call(model: nn.Module, batch: Tensor, *, runtime: Runtime = Eager()) -> Callable[[], object]:
    """A call that runs one forward pass without gradients and waits for the device.

    Args:
        model: in eval mode; prepared for the runtime here, outside of what is timed.
        batch: what the model is run on.
        runtime: runs the model.
    """
    with torch.no_grad():
        prepared = runtime.prepare(model, batch)

    def run() -> None:
        with torch.no_grad():
            prepared(batch)
        synchronize(batch.device)

    return run


def time_models(
    models: Mapping[str, nn.Module],
    batch: Tensor,
    *,
    rounds: int = 15,
    min_seconds: float = 2.0,
    max_seconds: float = 10.0,
    precision: float = math.inf,
    runtime: Runtime = Eager(),
    clock: Clock = time.perf_counter,
) -> Timings:
    """Interleaved forward passes of several models on the same batch, in eval mode.

    Args:
        models: name -> model.
        batch: what all of them are run on.
        rounds: see :func:`interleaved`, as are all that are not named here.
        min_seconds: of the counted rounds together.
        max_seconds: of the counted rounds together.
        precision: of the ratios to the first model.
        runtime: runs the models; preparing them is not timed.
        clock: returns seconds; injected by tests.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        calls = {name: forward_call(model, batch, runtime=runtime) for name, model in models.items()}
        return interleaved(
            calls, rounds=rounds, min_seconds=min_seconds, max_seconds=max_seconds, precision=precision, clock=clock
        )
