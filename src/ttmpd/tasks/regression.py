"""Numbers per sample."""

from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ttmpd.errors import InvalidValueError
from ttmpd.method import check_fields
from ttmpd.tasks._measures import r_squared
from ttmpd.tasks._outputs import as_rows, predicted_tensors
from ttmpd.tasks.base import Clues, Task


class Regression(Task):
    """One number or more for each sample."""

    source: ClassVar[str] = "mean squared error in units of the teacher's variance"
    same: ClassVar[str] = "numbers within the tolerance, in standard deviations of the teacher's"
    reason_not_to_adapt: ClassVar[str] = "a number does not say how sure it is"
    tolerance: float = 0.1
    """Two numbers are the same when they differ by no more than this share of the teacher's standard deviation."""

    def __post_init__(self) -> None:
        check_fields(self, tolerance=0.0)

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """A configuration that says so, or a single number per sample."""
        if clues.problem_type == "regression":
            return "config", cls()
        if clues.problem_type or clues.text in ("token", "next"):
            return None
        try:
            values = predicted_tensors(clues.raw, ())
        except Exception:  # unclear: no claim
            return None
        single = len(values) == 1 and (values[0].dim() == 1 or tuple(values[0].shape[1:]) == (1,))
        return ("shape", cls()) if single else None

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(B, n_numbers) as it is; (B,) as one column."""
        return as_rows(value, self.name)

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """Mean squared error over the variance of the teacher's numbers in these rows."""
        return ((student.float() - teacher.float()) / _spread(teacher)).square().mean()

    def alike(self, student: Tensor, teacher: Tensor) -> Tensor:
        """1 where all numbers lie within the tolerance."""
        apart = ((student.float() - teacher.float()) / _spread(teacher)).abs()
        return (apart <= self.tolerance).all(-1).float()

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """None: a number does not say how sure it is."""
        return None

    def check_labels(self, labels: Tensor, n_samples: int) -> None:
        """As many numbers per sample as the model predicts, all of them finite."""
        n_numbers = sum(self.widths)
        if len(labels) != n_samples or labels.numel() != n_samples * n_numbers or not bool(labels.isfinite().all()):
            raise InvalidValueError(
                f"labels must be {n_numbers} finite numbers per sample, ({n_samples}, {n_numbers}), but got the shape "
                f"{tuple(labels.shape)}{'' if bool(labels.isfinite().all()) else ' with NaN or infinity'}"
            )

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs, labels.to(outputs).reshape(outputs.shape))

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """R2 and mean absolute error; ``labels`` is (rows, n_numbers)."""
        labels = labels.double().reshape(outputs.shape)
        error = (outputs.double() - labels).abs().mean()
        return {"r2": r_squared(outputs, labels), "mean_absolute_error": float(error)}


def _spread(teacher: Tensor) -> Tensor:
    """(1, n_numbers) standard deviation over the rows, never zero."""
    values = teacher.float()
    spread = values.std(0, keepdim=True, unbiased=False) if len(values) > 1 else torch.ones_like(values[:1])
    return torch.where(spread > 1e-6, spread, torch.ones_like(spread))
