"""Whether answers tell that a model reads the data better than another does: without labels, with an error."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ttmpd.tasks.base import OneOf, Task

GROUPS = 20
"""Parts of the data that are left out in turn, to see how far a difference depends on which samples there are."""
SURE = 0.9
"""Confidence from which the original counts as sure of a sample."""
LISTED = 3
"""Classes that are named of those predicted most often."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers to the samples, and how much of it they explain.

    Args:
        task: of the model.
        outputs: (rows, values) of the model.
        reference: (rows, values) whose variety counts: the outputs themselves, or those of a model that is known not
            to make answers more varied than the data are.
    """

    task: Task
    outputs: Tensor
    reference: Tensor

    def explained(self, rows: Tensor | slice = slice(None)) -> float:
        """1 - mean entropy of the answers / entropy of the mean answer: the share of variety that samples explain.

        Neither answers that are sure but all the same, nor answers that are varied but unsure, make it high, and a
        mixture of few classes does not make it low: both entropies fall. With the variety of another model it is the
        mean entropy alone that counts.

        Source: the uncertainty coefficient of Theil, 1970: information maximisation (Krause et al., 2010), scaled.
        """
        task, reference = self.task, self.reference[rows]
        variety = float(task.information(reference) + task.uncertainty(reference).mean())
        share = (variety - float(task.uncertainty(self.outputs[rows]).mean())) / max(variety, 1e-6)
        return share if math.isfinite(share) else -math.inf

    @functools.cached_property
    def spread(self) -> tuple[float, ...]:
        """:meth:`explained` with each of the groups of samples left out."""
        n = len(self.outputs)
        groups = torch.arange(n) * GROUPS // max(n, 1)
        return tuple(self.explained(groups != group) for group in range(GROUPS))

    def gain(self, other: "Answers") -> tuple[float, float]:
        """(by how much more is explained than by the other's answers to the same samples, standard error of that).

        Source: the delete-a-group jackknife; the two are compared on the same groups.
        """
        pairs = zip(self.spread, other.spread, strict=True)
        differences = torch.tensor([mine - theirs for mine, theirs in pairs], dtype=torch.float64)
        error = math.sqrt((GROUPS - 1) * float(differences.var(correction=0)))
        return self.explained() - other.explained(), error

    def parted_beyond_doubt(self, other: "Answers", certainty: float) -> bool:
        """Whether the two answer differently more often than both together say that they are wrong.

        Of two different answers one is wrong, so the share of such samples is at most the sum of the two shares of
        errors. Where it is larger than the sum of what both say of themselves, at least one is surer than it may be,
        and being sure proves nothing.

        Args:
            other: answers to the same samples.
            certainty: standard errors by which it must be larger.
        """
        mine, theirs = (self.task.confidence(outputs) for outputs in (self.outputs, other.outputs))
        if mine is None or theirs is None or len(mine) < 2:
            return False
        beyond = (1 - self.task.alike(self.outputs, other.outputs)) - (1 - mine) - (1 - theirs)
        return float(beyond.mean()) > certainty * float(beyond.std()) / math.sqrt(len(beyond))


@dataclass(frozen=True)
class Told:
    """What a user should know of the answers: words behind a note, and numbers."""

    note: str
    facts: dict[str, float]


def parting(original: Tensor, adapted: Tensor, task: Task) -> Told:
    """Which classes are predicted, how far the adapted model agrees with the original, and a warning where it must be.

    The warning is given when the two part on more of the samples that the original is sure of than its own confidence
    allows for, by two standard errors: one of them is wrong there, and only a look at such samples tells which.

    Args:
        original: (rows, values) of the model as it came.
        adapted: (rows, values) for the same samples.
        task: of the model.
    """
    same = task.alike(adapted, original)
    facts = {"agreement_with_original": float(same.mean())}
    note = f"{_classes(adapted, task)}; agrees with the original on {facts['agreement_with_original']:.0%}"
    confidence = task.confidence(original)
    if confidence is None or not bool((sure := confidence >= SURE).any()):
        return Told(note, facts)
    doubt = float(1 - confidence[sure].mean())
    facts["parted_where_sure"] = share = float(1 - same[sure].mean())
    if share > doubt + 2 * math.sqrt(max(doubt * (1 - doubt), 1e-9) / int(sure.sum())):
        note += (
            f"; WARNING: answers otherwise on {share:.0%} of the samples of which the original was at least {SURE:.0%} "
            "sure: look at some of them before you use it"
        )
    return Told(note, facts)


def _classes(outputs: Tensor, task: Task) -> str:
    """The classes that are predicted most often, with their shares; "" where no class is predicted."""
    if not isinstance(task, OneOf):
        return ""
    predicted = task.split(outputs)[0].argmax(-1)
    counts = torch.bincount(predicted).double() / len(predicted)
    top = counts.topk(min(LISTED, len(counts)))
    shares = [f"{i} ({share:.0%})" for share, i in zip(top.values.tolist(), top.indices.tolist(), strict=True) if share]
    return f"; classes predicted most: {', '.join(shares)}"
