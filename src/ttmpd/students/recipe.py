"""Settings for training a student on a part of the labelled samples: every choice that a user has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ttmpd.adapt.base import Adapter
from ttmpd.adapt.none import NoAdaptation
from ttmpd.errors import InvalidValueError
from ttmpd.method import check_fields, check_range, named
from ttmpd.pipeline import defaults
from ttmpd.select.base import Selector
from ttmpd.select.random import Random
from ttmpd.students.adversarial import Attack
from ttmpd.training.loop import Schedule


def alpha_for(fraction: float) -> float:
    """The weight of the teacher's answers when a share of the samples is kept: 1 - fraction / 2, from 0.5 to 0.98.

    The fewer labels are left, the more the teacher knows beyond them. With all samples kept, labels and teacher count
    alike; up to a share of 0.04 the labels keep 2 %, since a teacher may be wrong where a label is right.

    Example:
        >>> [alpha_for(fraction) for fraction in (0.01, 0.04, 0.1, 1.0)]
        [0.98, 0.98, 0.95, 0.5]

    Source: the shape is that of Ben-Baruch et al. (ICML 2025, arXiv 2403.07854); the constants are this project's own.
    """
    check_range("fraction", fraction, 0.0, 1.0)
    return min(0.98, max(0.5, 1 - 0.5 * fraction))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings for training a student.

    Args:
        fraction: share of the samples that is *kept*; many papers state the share that is removed.
        select: chooses them, by the teacher and the labels.
        balanced: as evenly from all classes as these allow, each sample chosen among its own class.
        adapt: moves the teacher to the samples, without labels, before it is asked for anything.
        alpha: weight of the teacher's answers beside the labels; "auto" is :func:`alpha_for` of the fraction, and 0
            without a teacher.
        temperature: of both answers in the divergence.
        views: fixed views per sample, one an epoch in turn; no more than there are epochs. They are shifted and
            mirrored: 1 where a mirrored sample is another thing, as a digit is.
        steps: optimizer steps, whatever the fraction: steps cost time, and with equal epochs a small part would also be
            trained for less of it.
        batch_size: samples per step, and per pass of the teacher.
        lr: peak learning rate of SGD with Nesterov's momentum of 0.9: a warm-up over the first fifth, then a cosine.
        weight_decay: on every parameter.
        seed: of the choice, the views and the order; the student comes with its own first weights.
        attack: trains against attacked samples, in the place of plain cross entropy.
    """

    fraction: float = defaults.STUDENT_FRACTION
    select: Selector = Random()
    balanced: bool = False
    adapt: Adapter = dataclasses.field(default_factory=NoAdaptation)
    alpha: float | str = defaults.STUDENT_ALPHA
    temperature: float = defaults.STUDENT_TEMPERATURE
    views: int = defaults.STUDENT_VIEWS
    steps: int = defaults.STUDENT_STEPS
    batch_size: int = defaults.STUDENT_BATCH_SIZE
    lr: float = defaults.STUDENT_LR
    weight_decay: float = 5e-4
    seed: int = 0
    attack: Attack | None = None

    def __post_init__(self) -> None:
        check_fields(
            self, fraction=(0.0, 1.0), temperature=1e-3, views=1, steps=1, batch_size=2, lr=0.0, weight_decay=0.0
        )  # fmt: skip
        if self.alpha != "auto":
            if isinstance(self.alpha, str):
                raise InvalidValueError(f'alpha must be "auto" or from 0 to 1, but got {self.alpha!r}')
            check_fields(self, alpha=(0.0, 1.0))
        if self.balanced and "training" in self.select.needs:
            raise InvalidValueError(
                f"balanced must be off for {self.select.name}, which learns to tell the classes apart and cannot be "
                "run on one class at a time; choose another selector"
            )
        if self.attack is not None and self.alpha == 1:
            raise InvalidValueError(
                "alpha must be below 1 with an attack, since that stands in the place of the labels"
            )

    def weight(self, teacher: nn.Module | None) -> float:
        """Alpha as a number.

        Raises:
            InvalidValueError: there is no teacher, but something needs one.
        """
        if teacher is not None:
            return alpha_for(self.fraction) if isinstance(self.alpha, str) else float(self.alpha)
        for needed, words in (
            (self.select.uses_teacher, f"select {self.select.name}"),
            (self.alpha not in ("auto", 0), f"an alpha of {self.alpha}"),
            (self.attack is not None and self.attack.rule != "eps", "an attack with radii by margins"),
        ):
            if needed:
                raise InvalidValueError(f"{words} must have a teacher, but got none; pass one")
        return 0.0

    @property
    def schedule(self) -> Schedule:
        """Optimizer and learning rate over the steps."""
        return Schedule(steps=self.steps, lr=self.lr, optimizer="nesterov", weight_decay=self.weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: methods under their verbs."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        attack = None if self.attack is None else dataclasses.asdict(self.attack)
        return plain | {"select": self.select.to_dict(), "adapt": self.adapt.to_dict(), "attack": attack}


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from keyword arguments, with a clear error for unknown ones."""
    names = {item.name for item in dataclasses.fields(Recipe)}
    for name in settings:
        if name not in names:
            raise InvalidValueError(f"a setting must be one of {', '.join(sorted(names))}, but got {name!r}")
    return Recipe(**named(settings))
