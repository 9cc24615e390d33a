"""The contract of a runtime."""

import abc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ttmpd.method import Method


class Runtime(Method, abc.ABC):
    """Runs a model; latency is measured through it, and the report names it with its version.

    Only whole models are timed by it. The latencies of single units are measured in eager PyTorch, since a runtime may
    merge what lies on both sides of a unit's border.
    """

    @property
    @abc.abstractmethod
    def version(self) -> str:
        """Version of the software that runs the model, as text; milliseconds of two versions are not compared."""

    @abc.abstractmethod
    def prepare(self, module: nn.Module, batch: Tensor) -> Callable[[Tensor], Any]:
        """A function that runs the module on a batch, prepared once and called many times.

        Whatever is slow and done once (tracing, compiling, converting) belongs here and not into that function.

        Args:
            module: on the device of the batch, in eval mode; it is left as it is.
            batch: (B, ...) inputs of the shape and type that the function will get.

        Returns:
            A function that takes a batch and returns what ``module(batch)`` returns. It may return before an
            accelerator has finished: the caller synchronises the device.

        Raises:
            UnsupportedError: this runtime cannot run the module; the message says why.
            MissingPackageError: a package is missing.
        """
