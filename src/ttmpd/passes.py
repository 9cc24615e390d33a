"""Learn from a fixed set of unlabelled samples in several passes; a guard, without labels, goes back on collapse."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ttmpd.adaptation import Adaptation, check_optimizer, pieces
from ttmpd.guard import logits_of
from ttmpd.losses import entropy_of, mutual_information
from ttmpd.method import check_range
from ttmpd.modules import call, clone, evaluating, has_nan
from ttmpd.norms import norm_parameters, using_batch_statistics
from ttmpd.progress import track
from ttmpd.records import Samples
from ttmpd.training import batch_order

MIN_SPREAD = 0.9
"""Answers have collapsed when the entropy of their mean falls below this share of what it was at the start."""
MIN_INFORMATION = 0.95
"""The same for mutual information; a method that makes unsure answers less sure may lose a little of it."""


class Recipe(Protocol):
    """The hyper-parameters of an adapter that makes several passes."""

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def optimizer(self) -> str:
        """One of :data:`ttmpd.adaptation.OPTIMIZERS`."""

    @property
    def epochs(self) -> int:
        """Passes over the samples."""

    @property
    def batch(self) -> int:
        """Samples per step."""

    @property
    def batch_statistics(self) -> bool:
        """Whether steps use the statistics of the batch."""

    @property
    def max_samples(self) -> int:
        """Only so many samples are used."""


class Mixed(Protocol):
    """What comes of mixing the statistics of batch normalisation: see :class:`ttmpd.adapt.base.Adapted`."""

    @property
    def model(self) -> nn.Module:
        """With mixed statistics, or the model itself where it has none."""

    @property
    def note(self) -> str:
        """What was done."""

    @property
    def facts(self) -> dict[str, float]:
        """Numbers; none where nothing was done."""


Mix = Callable[[nn.Module, Samples], Mixed]
Begin = Callable[[nn.Module, Samples], Adaptation]
Outcome = tuple[nn.Module, str, dict[str, float]]


def check_recipe(name: str, recipe: Recipe) -> None:
    """Raise :class:`ttmpd.errors.InvalidValueError` when a hyper-parameter of the method ``name`` is out of range."""
    check_range(f"{name}.lr", recipe.lr, 0.0)
    check_optimizer(f"{name}.optimizer", recipe.optimizer)
    check_range(f"{name}.epochs", recipe.epochs, 1)
    check_range(f"{name}.batch", recipe.batch, 2)
    check_range(f"{name}.max_samples", recipe.max_samples, 2)


def adapt_in_passes(
    recipe: Recipe, teacher: nn.Module, samples: Samples, mix: Mix, begin: Begin, *, batch_size: int, seed: int
) -> Outcome:
    """A copy of the teacher that learned from the samples, a line on what was done, and numbers.

    Statistics are mixed before the first step; where steps use those of the batch, after the last one.

    Args:
        recipe: how often and in which batches the samples are passed.
        teacher: stays as it is, and is handed on where nothing can be done.
        samples: at least two are needed.
        mix: mixes the statistics of a model, as the adapter `norm` does.
        begin: says what a step does; it may change the model that it is given.
        batch_size: of passes without gradients.
        seed: of the order of the samples.

    Returns:
        Model, note and facts: ``selected_share`` of the samples that steps saw, forward and backward passes per sample
        (those for mixing left out), ``epochs`` that were kept, ``rolled_back`` 0 or 1, and the facts of mixing.
    """
    if not norm_parameters(teacher):
        return teacher, "nothing to do: the model has no normalisation layer with scale and shift", {}
    if len(samples) < 2:
        return teacher, "nothing done: whether answers stay varied cannot be seen in one sample", {}
    few = samples.subset(range(min(len(samples), recipe.max_samples)))
    mixed = mix(teacher, few)
    adaptation = begin(clone(teacher if recipe.batch_statistics else mixed.model), few)
    kept, reason = _pass(adaptation, recipe, few, batch_size, seed)
    if recipe.batch_statistics:
        mixed, kept, reason = _mixed_again(mixed, mix(adaptation.model, few), few, batch_size, kept, reason)
    model = mixed.model if recipe.batch_statistics else adaptation.model
    facts = mixed.facts | _counts(adaptation, few) | {"epochs": float(kept), "rolled_back": float(bool(reason))}
    return model, _note(mixed, kept, reason), facts


def collapse(start: Tensor, now: Tensor) -> str:
    """Why the answers have got worse as a whole, judged without labels; "" when they have not.

    Args:
        start: (N, n_classes) logits before adaptation.
        now: the same after it.
    """
    if has_nan(now):
        return "answers were not finite"
    spread, spread_start = (float(entropy_of(logits.softmax(-1).mean(0))) for logits in (now, start))
    if spread < MIN_SPREAD * spread_start:
        return "answers gathered in few classes"
    if mutual_information(now) < MIN_INFORMATION * mutual_information(start):
        return "answers told less of the samples"
    return ""


def _pass(adaptation: Adaptation, recipe: Recipe, samples: Samples, batch_size: int, seed: int) -> tuple[int, str]:
    """At the first sign of collapse back to the last good epoch; the number of epochs kept, and why no more."""
    n, device = len(samples), adaptation.parameters[0].device
    start, good = _answers(adaptation, samples, batch_size), adaptation.state()
    per_epoch = max(1, n // recipe.batch)
    for epoch in track(range(recipe.epochs), "adapt", recipe.epochs):
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            adaptation.step(samples.batch(batch_order(n, recipe.batch, step, seed), device))
        reason = collapse(start, _answers(adaptation, samples, batch_size))
        if reason:
            adaptation.load(good)
            return epoch, f"rolled back after epoch {epoch + 1}: {reason}"
        good = adaptation.state()
    return recipe.epochs, ""


def _answers(adaptation: Adaptation, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits in the configuration in which steps are made, on the CPU."""
    adaptation.n_forward += len(samples)
    model = adaptation.model
    if not adaptation.batch_statistics:
        return logits_of(model, samples, batch_size)
    device = adaptation.parameters[0].device
    with evaluating(model), using_batch_statistics(model):
        answers = [call(model, samples.batch(index, device)) for index in pieces(len(samples), batch_size)]
    return torch.cat(answers).float().cpu()


def _mixed_again(
    before: Mixed, after: Mixed, samples: Samples, batch_size: int, kept: int, reason: str
) -> tuple[Mixed, int, str]:
    """What was learned with batch statistics must hold with mixed ones too."""
    answers = [logits_of(mixed.model, samples, batch_size) for mixed in (before, after)]
    worse = collapse(answers[0], answers[1])
    return (before, 0, f"rolled back, for with mixed statistics {worse}") if worse else (after, kept, reason)


def _counts(adaptation: Adaptation, samples: Samples) -> dict[str, float]:
    return {
        "selected_share": adaptation.n_selected / max(1, adaptation.n_seen),
        "forward_per_sample": adaptation.n_forward / len(samples),
        "backward_per_sample": adaptation.n_backward / len(samples),
    }


def _note(mixed: Mixed, kept: int, reason: str) -> str:
    parts = [mixed.note] if mixed.facts else []
    parts += [f"scale and shift trained without labels, epochs: {kept}" if kept else "scale and shift left alone"]
    return "; ".join([*parts, reason] if reason else parts)
