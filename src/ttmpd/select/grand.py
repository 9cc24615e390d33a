"""Gradient norm of the last layer: EL2N times the length of the features."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.errors import UnsupportedError
from ttmpd.models.modules import module_at
from ttmpd.select.base import Selector, answers, error_norm, head_tap, top_n


class GraNd(Selector):
    """The highest norms of the cross entropy's gradient by the last layer: EL2N times the length of its input."""

    source: ClassVar[str] = (
        "Paul et al., NeurIPS 2021 (arXiv 2107.07075), definition 2.1, for the last layer alone as in DeepCore; one "
        "trained teacher, not the mean over ten networks early in training; without labels its answer is the label"
    )

    def choose(
        self, teacher: nn.Module, pool: Samples, n: int, labels: Tensor | None, *, batch_size: int, seed: int
    ) -> Iterable[int]:
        """Cost: one forward pass per sample; the norm has a closed form.

        Raises:
            UnsupportedError: no single layer gives the logits.
        """
        tap = head_tap(teacher, pool)
        if tap is None:
            raise UnsupportedError(
                f"{type(teacher).__name__} must have one layer that gives the logits, but none was found; "
                "select by el2n, which needs none"
            )
        logits, features = answers(teacher, pool, tap, batch_size)
        has_bias = getattr(module_at(teacher, tap.path), "bias", None) is not None
        # d CE / d W = (p - y) h^T and d CE / d b = p - y, so the norm of both together factors.
        length = (features.square().sum(-1) + float(has_bias)).sqrt()
        return top_n(error_norm(logits, labels) * length, n)
