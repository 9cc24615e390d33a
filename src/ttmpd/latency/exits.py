"""Milliseconds of a model with exits, measured in turn with the model without."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.errors import UnsupportedError
from ttmpd.latency.device import synchronize
from ttmpd.latency.timing import Timings, interleaved, quartiles, time_models
from ttmpd.models.run import evaluating
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager
from ttmpd.surgery.exits.model import EarlyExitModel

MAX_BYTES = 1 << 26
"""Most bytes of inputs that are prepared before latency is measured."""
SECONDS = 10.0
"""About how long one measurement of the mean takes."""
PASSES = 5
"""Times that each batch is run to measure the mean."""
_FEWEST = 4

Batches = list[tuple[Tensor, Tensor]]
"""(inputs, exit of each sample)."""


def check_runtime(runtime: Runtime) -> None:
    """Raise :class:`UnsupportedError` unless a model with exits can be timed in this runtime."""
    if not isinstance(runtime, Eager):
        raise UnsupportedError(
            "a model with exits must run in eager PyTorch, since the data decide which of its layers run, but got the "
            f"runtime {runtime.name!r}; leave the runtime out"
        )


def exit_ms(
    original: nn.Module, model: EarlyExitModel, samples: Samples, batch_size: int, *, rounds: int = 15
) -> tuple[float, tuple[float, ...]]:
    """Milliseconds of the model without exits, and of a batch that leaves at each exit and at the end, whole.

    Args:
        original: the model without exits.
        model: the same with exits.
        samples: what to run; in every round all candidates get the same batch.
        batch_size: samples per batch; fewer samples are repeated.
        rounds: see :func:`ttmpd.latency.timing.interleaved`.
    """
    end = len(model.heads)
    order = torch.arange(max(batch_size, min(len(samples), 64 * batch_size))) % len(samples)
    batches = [inputs for inputs, _ in _prepared(model, samples, order, torch.zeros_like(order), batch_size)]
    calls = {"original": _cycled(original, [(inputs,) for inputs in batches])}
    for number in range(end + 1):
        prescribed = [(inputs, torch.full((len(inputs),), number, device=inputs.device)) for inputs in batches]
        calls[str(number)] = _cycled(model.answer_at, prescribed)
    with evaluating(original), evaluating(model):
        timings = interleaved(calls, rounds=rounds, warmup=3, min_seconds=2.0, max_seconds=SECONDS)
    median = {name: timings.timing(name).median_ms for name in calls}
    return median["original"], tuple(median[str(number)] for number in range(end + 1))


def mean_timings(
    original: nn.Module, model: EarlyExitModel, samples: Samples, depths: Tensor, batch_size: int, ms_per_batch: float
) -> Timings:
    """Mean milliseconds per batch of "original" and "compressed" over several passes through the same samples.

    Every batch runs on both models in turn. Each sample leaves at the exit that ``depths`` says, so samples count on
    which exits were trained, and would now leave too early.

    Args:
        original: the model without exits.
        model: the same with exits.
        samples: from the place of use; a part of them, evenly over the depths, where all would take too long.
        depths: (N,) exit of each sample.
        batch_size: samples per batch.
        ms_per_batch: about what both models together take.
    """
    n = round(1e3 * SECONDS / PASSES / max(ms_per_batch, 1e-3)) * batch_size
    n = max(batch_size, min(len(samples), max(n, _FEWEST * batch_size)))
    # Evenly over the depths, then mixed, so that batches are what they will be.
    ordered = depths.cpu().argsort(stable=True)
    chosen = ordered[(torch.arange(n) * len(ordered) / n).long()]
    chosen = chosen[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    batches = _prepared(model, samples, chosen, depths.cpu()[chosen], batch_size)
    warmup = min(len(batches), 3)
    calls = {
        "original": _cycled(original, [(inputs,) for inputs, _ in batches], -warmup),
        "compressed": _cycled(model.answer_at, batches, -warmup),
    }
    with evaluating(original), evaluating(model):
        timings = interleaved(calls, rounds=PASSES * len(batches), warmup=warmup)
    return Timings({name: tuple(_means(values, len(batches))) for name, values in timings.ms.items()})


def routed_timings(original: nn.Module, model: EarlyExitModel, samples: Samples, batch_size: int) -> Timings:
    """Mean milliseconds as in :func:`mean_timings`, each sample leaving where the model's threshold lets it leave.

    Args:
        original: the model without exits.
        model: the same with exits.
        samples: such as the exits were not trained on.
        batch_size: samples per batch.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        depths = torch.cat([model.depths(batch).cpu() for batch in samples.batches(64, device)])
    first = samples.trimmed(torch.arange(batch_size) % len(samples), device)
    original_ms = time_models({"original": original}, first, rounds=3, min_seconds=0.2).timing("original").median_ms
    return mean_timings(original, model, samples, depths, batch_size, 2 * original_ms)


def speedup_of(timings: Timings) -> tuple[float, float, float]:
    """(low, median, high) quartiles of how many times faster a pass through the samples is with exits."""
    pairs = zip(timings.ms["original"], timings.ms["compressed"], strict=True)
    return quartiles([slow / fast for slow, fast in pairs])


def _prepared(model: nn.Module, samples: Samples, chosen: Tensor, depths: Tensor, batch_size: int) -> Batches:
    """Full batches of the chosen samples on the device, as many as may be kept."""
    device = next(model.parameters()).device
    size = max(1, samples.inputs[0].numel() * (8 if samples.is_text else 4) * batch_size)
    most = max(1, min(len(chosen) // batch_size, MAX_BYTES // size))
    batches = []
    for number in range(most):
        part = slice(number * batch_size, (number + 1) * batch_size)
        inputs = samples.trimmed(chosen[part], device)
        batches.append((inputs, depths[part].to(device)))
    return batches


def _cycled(run: Callable[..., object], arguments: Sequence[tuple[Tensor, ...]], start: int = 0) -> Callable[[], None]:
    """A call that takes the next arguments every time, and waits for the device."""

    def following() -> Iterator[tuple[Tensor, ...]]:
        number = start
        while True:
            yield arguments[number % len(arguments)]
            number += 1

    source = following()

    def call() -> None:
        inputs = next(source)
        with torch.no_grad():
            run(*inputs)
        synchronize(inputs[0].device)

    return call


def _means(values: Sequence[float], size: int) -> list[float]:
    """Mean of each pass through ``size`` batches."""
    return [math.fsum(values[i : i + size]) / size for i in range(0, len(values), size)]
