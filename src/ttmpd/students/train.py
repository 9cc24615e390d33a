"""Train a student on a part of the labelled samples; a teacher that learned from all of them makes up for the rest."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.errors import InvalidValueError, ModelError
from ttmpd.models.modules import clone, has_nan, to_fast_format, to_plain_format
from ttmpd.models.run import predict, predictions_of
from ttmpd.pipeline.stages import Stages
from ttmpd.storage import fingerprint, weights_fingerprint
from ttmpd.students.adversarial import adversarial_loss, pixels_of
from ttmpd.students.recipe import Recipe, recipe_of
from ttmpd.students.training_set import DistillationSet, choose, prepare, steps_per_epoch
from ttmpd.training.loop import Loop, TrainingResult, batch_order, train
from ttmpd.training.losses import soft_label_loss

WORK = ".work"
"""Sub-folder in which finished stages are kept."""


@dataclasses.dataclass(frozen=True, eq=False)
class StudentResult:
    """A trained student, and what came of the choices.

    Args:
        model: in eval mode, on the device of the one that was passed in.
        recipe: how it was trained.
        selected: positions of the samples that it learned from, ascending.
        alpha: weight of the teacher's answers.
        n_views: fixed views that were shown; the teacher passed that often over each kept sample, unless alpha is 0.
        fit: what the training did.
        seconds: of each stage.
        teacher: after adaptation; None when there is none.
        adapt_note: one line: what adaptation did.
    """

    model: nn.Module
    recipe: Recipe
    selected: tuple[int, ...]
    alpha: float
    n_views: int
    fit: TrainingResult
    seconds: Mapping[str, float]
    teacher: nn.Module | None = None
    adapt_note: str = ""


def train_student(
    student: nn.Module,
    samples: Samples,
    labels: Tensor,
    *,
    teacher: nn.Module | None = None,
    teacher_samples: Samples | None = None,
    folder: Path | None = None,
    **settings: Any,
) -> StudentResult:
    """A copy of ``student``, trained on a part of the labelled samples for a fixed number of steps.

    The teacher answers once for fixed views of the kept samples, and the student learns each answer on the very view
    that was asked about. A live teacher could answer for fresh views, but at the cost of a pass per step; here the
    cost is known before the start, and a resumed run sees what the killed one saw. No held-out samples are looked at:
    what the last step leaves is kept, so that those which the caller holds back can judge it.

    Args:
        student: usually with random weights; on the device where it shall be trained; left as it is.
        samples: all that may be trained on, as the student wants them.
        labels: (N,) classes, in the order of the student's outputs.
        teacher: scores the samples for the selector, answers, and gives the margins of an attack's rule.
        teacher_samples: the same samples as the teacher wants them; ``samples`` when None.
        folder: finished stages and the state of the training are kept in its sub-folder ``.work``, and the same call
            goes on there after a kill. None keeps nothing.
        **settings: fields of :class:`ttmpd.students.recipe.Recipe`.

    Raises:
        InvalidValueError: a setting is unknown or out of its range, labels or classes do not fit, or there is no
            teacher for what needs one.
        ModelError: the training ran away.
        UnsupportedError: the selector or the attack cannot treat a model.

    Example:
        >>> import torch
        >>> from ttmpd.data.open import open_samples
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> samples, labels = open_samples(torch.rand(40, 3, 8, 8), None), torch.arange(40) % 4
        >>> trained = train_student(tiny_model(), samples, labels, fraction=0.5, steps=2, batch_size=8)
        >>> len(trained.selected)
        20

    Source: Ben-Baruch et al., ICML 2025 (arXiv 2403.07854), on fixed views; temperature and alpha are this project's.
    Cost: a forward and a backward pass per step, ``attack.steps`` more of them with an attack; ``views`` teacher passes
        per kept sample, none when alpha is 0; and what the selector and the adapter cost.
    """
    recipe = recipe_of(settings)
    alpha = recipe.weight(teacher)
    teacher_samples, labels = teacher_samples or samples, labels.cpu()
    n_selected = _count(samples, teacher_samples, labels, recipe.fraction)
    _check_classes(labels, [(student, samples), *([] if teacher is None else [(teacher, teacher_samples)])])
    model, note = clone(student), ""
    with _stages(folder, _fingerprint(student, teacher, samples, labels, recipe)) as stages:
        if teacher is not None:
            with stages.timed("adapt"):
                adapted = recipe.adapt.adapt(teacher, teacher_samples, batch_size=recipe.batch_size, seed=recipe.seed)
            teacher, note = adapted.model, adapted.note
        scorer = student if teacher is None else teacher  # a blind selector asks neither
        selected = stages.json("select", lambda: choose(scorer, teacher_samples, labels, n_selected, recipe))
        training_set = prepare(
            teacher,
            (samples.subset(selected), teacher_samples.subset(selected)),
            labels[list(selected)],
            recipe,
            stages,
        )
        with stages.timed("train"):
            fit = _fit(model, training_set, recipe, stages.folder / "training.safetensors")
        seconds = stages.seconds()
    return StudentResult(model, recipe, tuple(selected), alpha, training_set.n_views, fit, seconds, teacher, note)


def distillation_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, alpha: float, temperature: float
) -> Tensor:
    """(1 - alpha) CE(student, labels) + alpha temperature^2 KL(teacher || student), the mean over the batch.

    What has no weight is not computed: then neither wrong labels nor the teacher matter.

    Args:
        logits: (B, n_classes) of the student.
        labels: (B,) classes.
        teacher: (B, n_classes) logits of the teacher on the same views; None stands for an alpha of 0.
        alpha: from 0 (labels alone) to 1 (teacher alone).
        temperature: of both answers in the divergence.
    """
    if alpha == 0 or teacher is None:
        return F.cross_entropy(logits, labels)
    soft = soft_label_loss(logits, teacher, temperature)  # temperature^2 is in it
    return soft if alpha == 1 else (1 - alpha) * F.cross_entropy(logits, labels) + alpha * soft


def _count(samples: Samples, teacher_samples: Samples, labels: Tensor, fraction: float) -> int:
    """Check that samples and labels belong together; the number of samples that are selected."""
    if labels.shape != (len(samples),) or labels.is_floating_point():
        raise InvalidValueError(
            f"labels must be one class index per sample, ({len(samples)},), but got {labels.dtype} of the shape "
            f"{tuple(labels.shape)}"
        )
    if teacher_samples.ids != samples.ids:
        raise InvalidValueError(
            "teacher_samples must be the samples in the same order, but their ids differ; open both from the same data"
        )
    n_selected = round(fraction * len(samples))
    if n_selected < 2:
        raise InvalidValueError(
            f"fraction must keep at least 2 samples, but {fraction:g} of {len(samples)} are {n_selected}; raise it"
        )
    return n_selected


def _check_classes(labels: Tensor, models: list[tuple[nn.Module, Samples]]) -> None:
    """Student, teacher and labels must speak of the same classes."""
    outputs = [predictions_of(model, samples.first(2), 2).shape[-1] for model, samples in models]
    if len(set(outputs)) > 1:
        raise InvalidValueError(
            f"student and teacher must have the same classes, but have {outputs[0]} and {outputs[1]} outputs; choose a "
            "student with as many outputs as the teacher"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= outputs[0]:
        raise InvalidValueError(
            f"labels must be class indices from 0 to {outputs[0] - 1}, since the student has {outputs[0]} outputs, but "
            f"got {int(labels.min())} to {int(labels.max())}; number the classes in the order of the outputs"
        )


def _fingerprint(
    student: nn.Module, teacher: nn.Module | None, samples: Samples, labels: Tensor, recipe: Recipe
) -> str:
    models = [weights_fingerprint(model) for model in (student, teacher) if model is not None]
    truth = hashlib.blake2b(labels.long().numpy().tobytes(), digest_size=12).hexdigest()
    return fingerprint(models, samples.ids, samples.mean, samples.std, truth, recipe.to_dict())


@contextmanager
def _stages(folder: Path | None, run: str) -> Iterator[Stages]:
    if folder is not None:
        yield Stages(folder / WORK, run, resume=True)
        return
    with tempfile.TemporaryDirectory(prefix="ttmpd-") as temporary:
        yield Stages(Path(temporary) / WORK, run)


def _fit(student: nn.Module, training_set: DistillationSet, recipe: Recipe, state: Path) -> TrainingResult:
    """Train all parameters in place; the student is left in eval mode."""
    device, n = next(student.parameters()).device, len(training_set.samples)
    per_epoch = steps_per_epoch(n, recipe.batch_size)
    loss_of = _loss(student, training_set, recipe)

    def loss_at(step: int) -> Tensor:
        index, view = batch_order(n, recipe.batch_size, step, recipe.seed), step // per_epoch % training_set.n_views
        return loss_of(
            fixed_view(training_set.samples.trimmed(index, device), index, view, recipe.seed, n), index, view
        )

    to_fast_format(student).train()
    fit = train(student, loss_at, recipe.schedule, Loop(state=state, stage="train"))
    to_plain_format(student).eval()
    if has_nan(predictions_of(student, training_set.samples.first(recipe.batch_size), recipe.batch_size)):
        raise ModelError(
            f"training must end with finite answers, but {type(student).__name__} ran away at a learning rate of "
            f"{recipe.lr:g}; lower lr"
        )
    return fit


def _loss(student: nn.Module, training_set: DistillationSet, recipe: Recipe) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The loss of a batch, given the positions of its samples and the number of their view."""
    device = next(student.parameters()).device
    pixels = pixels_of(training_set.samples, device)

    def loss_of(batch: Tensor, index: Tensor, view: int) -> Tensor:
        labels = training_set.labels[index].to(device)
        answers = None if training_set.answers is None else training_set.answers[view, index].to(device)
        if recipe.attack is None or training_set.radius is None:
            return distillation_loss(predict(student, batch), labels, answers, training_set.alpha, recipe.temperature)
        radius = training_set.radius[index]
        hard = adversarial_loss(student, batch, labels, radius=radius, attack=recipe.attack, pixels=pixels)
        if answers is None:
            return hard
        soft = soft_label_loss(predict(student, batch), answers, recipe.temperature)
        return (1 - training_set.alpha) * hard + training_set.alpha * soft

    return loss_of
