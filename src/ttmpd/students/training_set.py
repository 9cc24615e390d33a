"""The set that a student learns from: selected samples and the teacher's answers to them, asked for once."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.models.run import evaluating, predict
from ttmpd.pipeline.stages import Stages
from ttmpd.progress import track
from ttmpd.quality.margins import DeepFoolConfig, margins, radii
from ttmpd.students.adversarial import Attack
from ttmpd.students.recipe import Recipe
from ttmpd.training.task import task_of
from ttmpd.training.teacher_outputs import (
    TeacherOutputs,
    TeacherOutputsWriter,
    load_teacher_outputs,
    save_teacher_outputs,
)


@dataclass(frozen=True, eq=False)
class DistillationSet:
    """All that a student learns from; the teacher is not part of it.

    Args:
        samples: the kept ones.
        labels: (n,) their classes.
        alpha: weight of the answers.
        n_views: fixed views of each sample.
        answers: (n_views, n, n_classes) logits of the teacher; None when they have no weight.
        radius: (n,) of the attack on each sample; None without an attack.
    """

    samples: Samples
    labels: Tensor
    alpha: float
    n_views: int
    answers: Tensor | None = None
    radius: Tensor | None = None


def choose(model: nn.Module, pool: Samples, labels: Tensor, n: int, recipe: Recipe) -> tuple[int, ...]:
    """Positions in the pool of the ``n`` samples that the recipe's selector keeps, ascending.

    Args:
        model: scores the samples, for a selector that looks at them.
        pool: as ``model`` wants it.
        labels: (N,) classes.
        n: how many are kept.
        recipe: selector, balance, seed.
    """

    def select(part: Samples, truth: Tensor | None, quota: int) -> tuple[int, ...]:
        truth = truth if task_of(model).class_labels else None
        return recipe.select.select(model, part, quota, labels=truth, batch_size=recipe.batch_size, seed=recipe.seed)

    if not recipe.balanced:
        return select(pool, labels, n)
    selected: list[int] = []
    for label, quota in quotas(labels, n).items():
        members = (labels == label).nonzero().squeeze(-1).tolist()
        selected += [members[place] for place in select(pool.subset(members), labels[members], quota)]
    return tuple(sorted(selected))


def quotas(labels: Tensor, n: int) -> dict[int, int]:
    """Numbers of samples per class that add up to ``n``, as evenly as the classes allow; large classes take the rest.

    Example:
        >>> quotas(torch.tensor([0, 1, 1, 1, 2, 2, 2, 2]), 6)
        {0: 1, 1: 2, 2: 3}
    """
    counts = sorted(Counter(labels.tolist()).items(), key=lambda item: (item[1], item[0]))
    left, shares = min(n, len(labels)), {}
    for number, (label, count) in enumerate(counts):
        quota = min(count, left // (len(counts) - number))
        left -= quota
        if quota:
            shares[label] = quota
    return shares


def prepare(
    teacher: nn.Module | None,
    selected: tuple[Samples, Samples],
    labels: Tensor,
    recipe: Recipe,
    stages: Stages,
) -> DistillationSet:
    """The training_set on the kept samples; the only call of the teacher after these are chosen.

    Args:
        teacher: None where nothing needs one.
        selected: the samples as the student wants them, and the same as the teacher wants them.
        labels: (n,) their classes.
        recipe: weight and number of answers, the attack.
        stages: keep the answers.

    Cost: exactly ``n_views`` teacher passes per sample if the answers have a weight; margins if the attack needs them.
    """
    samples, teacher_samples = selected
    alpha = recipe.weight(teacher)
    epochs = math.ceil(recipe.steps / steps_per_epoch(len(samples), recipe.batch_size))
    n_views = min(recipe.views, epochs) if samples.is_image else 1
    answers = radius = None
    if teacher is not None and alpha > 0:
        with stages.timed("teacher"):
            answers = _answers(teacher, teacher_samples, n_views, recipe, stages.folder / "answers")
    attack = recipe.attack
    if attack is not None:
        radius = stages.tensors(
            "radii", lambda: ({"radius": _radius(teacher, teacher_samples, labels, attack, recipe.batch_size)}, None)
        )[0]["radius"]
    return DistillationSet(samples, labels, alpha, n_views, answers, radius)


def steps_per_epoch(n_samples: int, batch: int) -> int:
    """Steps until every sample has been shown once, but for those that make no full batch."""
    return max(1, n_samples // min(batch, n_samples))


def _answers(teacher: nn.Module, samples: Samples, n_views: int, recipe: Recipe, folder: Path) -> Tensor:
    """(n_views, n, n_classes) logits, memory-mapped under ``folder``."""
    stored = load_teacher_outputs(folder)
    if stored is not None:
        return stored.logits
    device, n = next(teacher.parameters()).device, len(samples)
    store, starts = TeacherOutputsWriter(folder, n_views, n), range(0, n, recipe.batch_size)
    with evaluating(teacher):
        for view in range(n_views):
            for start in track(starts, f"teacher view {view + 1}/{n_views}", len(starts)):
                index = torch.arange(start, min(start + recipe.batch_size, n))
                batch = fixed_view(samples.trimmed(index, device), index, view, recipe.seed, n)
                store.write(view, start, None, predict(teacher, batch))
    logits = store.finish()[1]
    save_teacher_outputs(
        TeacherOutputs(tap=None, features=None, logits=logits, feature_variance=1.0, held_out=torch.empty(0)), folder
    )
    return logits


def _radius(teacher: nn.Module | None, samples: Samples, labels: Tensor, attack: Attack, batch_size: int) -> Tensor:
    """(n,) how far each sample may be moved: not beyond its margin under the teacher, where the rule says so."""
    if attack.rule == "eps" or teacher is None:
        return torch.full((len(samples),), attack.eps)
    margin = margins(teacher, samples, DeepFoolConfig(norm=attack.norm), labels=labels, batch_size=batch_size)
    return radii(margin, attack.eps, rule=attack.rule)
