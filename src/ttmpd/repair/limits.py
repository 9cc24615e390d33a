"""Which layers are fitted at all: those whose normal equations this machine can hold and solve in good time.

No width is too large by itself. What a fit takes follows from its sizes and from how fast the device multiplies and
factorises, which is measured once; score and repair ask the same question, so that no repair is predicted that is not
made.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttmpd.surgery.layers import is_convolution, is_layer, matrix_of

ROWS = 1 << 15
"""Rows of every fit."""
MAX_SECONDS = 300.0
"""Of the fit of one layer. A layer that reads 8,192 values takes about a minute on two cores."""
MEMORY_SHARE = 0.4
"""Of the memory of the device that the fit of one layer may take."""
SOLVES = 8
"""Factorisations of one fit: a strength of the ridge each, and the last one."""
_PROBE = 1024
"""Width of the matrices on which the device is measured."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a device is.

    Args:
        products: multiply-adds per second of products in single precision.
        factors: multiply-adds per second of factorisations in double precision.
    """

    products: float
    factors: float


@dataclass(frozen=True, slots=True)
class FitCost:
    """What the fit of one layer takes."""

    seconds: float
    n_bytes: int


def fit_cost(n_inputs: int, n_outputs: int, n_rows: int, speed: Speed) -> FitCost:
    """What it takes to fit a layer: sums over the rows, factorisations of their square, and what all of these hold.

    Args:
        n_inputs: values that the layer reads.
        n_outputs: values that it answers with.
        n_rows: of the fit.
        speed: of the device.

    Example:
        >>> cost = fit_cost(8192, 2048, 32768, Speed(products=5e10, factors=1e10))
        >>> round(cost.seconds), round(cost.n_bytes / 2**30, 1)
        (216, 4.0)
    """
    sums = n_rows * n_inputs * (n_inputs / 2 + n_outputs)
    solves = SOLVES * (n_inputs**3 / 6 + n_inputs**2 * n_outputs)
    n_bytes = 3 * 8 * n_inputs**2 + 4 * 8 * n_inputs * n_outputs + 2 * 4 * n_rows * n_inputs
    return FitCost(sums / speed.products + solves / speed.factors, n_bytes)


def too_large_to_fit(layer: nn.Module) -> str:
    """Why a layer is not fitted on this device, with its numbers; "" where it is.

    Args:
        layer: a matrix or convolution with weights, on its device.
    """
    matrix = matrix_of(layer)
    n_outputs, n_inputs = matrix.shape
    if n_inputs <= _PROBE:  # never too large, and nothing has to be measured to know it
        return ""
    cost, room = (
        fit_cost(n_inputs, n_outputs, ROWS, device_speed(matrix.device)),
        MEMORY_SHARE * memory_of(matrix.device),
    )
    if cost.n_bytes > room:
        return f"reads {n_inputs} values: its fit takes {cost.n_bytes / 2**30:.1f} of {room / 2**30:.1f} GiB"
    if cost.seconds > MAX_SECONDS:
        return f"reads {n_inputs} values: its fit takes {cost.seconds:.0f} s, more than {MAX_SECONDS:.0f}"
    return ""


def layers_too_large(model: nn.Module) -> dict[str, str]:
    """Path -> reason of every layer that is never fitted on this device, see :func:`too_large_to_fit`."""
    layers = {path: module for path, module in model.named_modules() if is_layer(module) or is_convolution(module)}
    reasons = {path: too_large_to_fit(layer) for path, layer in layers.items()}
    return {path: reason for path, reason in reasons.items() if reason}


@functools.cache
def device_speed(device: torch.device) -> Speed:
    """The speed of a device, measured once per process in about a tenth of a second."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(_PROBE, _PROBE, generator=generator).to(device)
    on = torch.device("cpu") if device.type == "mps" else device  # which has no double precision
    square = (matrix @ matrix.T).to(on, torch.float64) + _PROBE * torch.eye(_PROBE, device=on, dtype=torch.float64)
    return Speed(
        _PROBE**3 / _seconds(lambda: matrix @ matrix, device),
        _PROBE**3 / 6 / _seconds(lambda: torch.linalg.cholesky_ex(square)[0], on),
    )


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The fastest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)


@functools.cache
def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all: what is free at a moment would make runs differ."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 8 << 30
