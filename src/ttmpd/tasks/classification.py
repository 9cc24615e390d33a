"""One class per sample."""

from typing import ClassVar, Literal, Self

from torch import Tensor

from ttmpd.errors import InvalidValueError
from ttmpd.tasks._outputs import all_rows, as_rows
from ttmpd.tasks.base import Clues, OneOf, check_one_class


class Classification(OneOf):
    """One class for each sample; of several heads one class each."""

    class_labels: ClassVar[bool] = True
    source: ClassVar[str] = "soft labels of Hinton et al., 2015 (arXiv 1503.02531)"

    @classmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """Any output of two or more class scores per sample."""
        if clues.text in ("token", "next"):
            return None
        if clues.problem_type == "single_label_classification":
            return "config", cls()
        return ("shape", cls()) if all_rows(clues.raw, 2) else None

    def check_labels(self, labels: Tensor, n_samples: int) -> None:
        """One class index per sample; of several heads there is no such label."""
        check_one_class(self, "a model that is trained on labels", "wrap it so that it answers with one tensor")
        if labels.shape != (n_samples,) or labels.is_floating_point():
            raise InvalidValueError(
                f"labels must be one class index per sample, ({n_samples},), but got {labels.dtype} of the shape "
                f"{tuple(labels.shape)}"
            )
        n_classes = self.widths[0]
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
            raise InvalidValueError(
                f"labels must be class indices from 0 to {n_classes - 1}, since the student has {n_classes} outputs, "
                f"but got {int(labels.min())} to {int(labels.max())}; number the classes in the order of the outputs"
            )

    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(B, n_classes) as it is."""
        return as_rows(value, self.name)
