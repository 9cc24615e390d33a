"""Train a student on a part of the labelled samples; a teacher that learned from all of them makes up for the rest."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.errors import InvalidValueError, ModelError
from ttmpd.method import method_of
from ttmpd.models.modules import clone, has_nan, to_fast_format, to_plain_format
from ttmpd.models.run import predict, predictions_of
from ttmpd.pipeline.stages import Stages
from ttmpd.storage import fingerprint, weights_fingerprint
from ttmpd.students.adversarial import adversarial_loss, pixels_of
from ttmpd.students.recipe import Recipe, recipe_of
from ttmpd.students.training_set import DistillationSet, choose, prepare, steps_per_epoch
from ttmpd.tasks.base import Task, check_one_class
from ttmpd.tasks.classification import Classification
from ttmpd.training.loop import Loop, TrainingResult, batch_order, train
from ttmpd.training.task import assign_task, check_structure, task_of, train_norms

CLASSES = Classification()
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
    task: Task | str | None = None,
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
        labels: (N,) classes, in the order of the student's outputs; of a regression (N, n) numbers, of several labels
            (N, n) zeros and ones.
        teacher: scores the samples for the selector, answers, and gives the margins of an attack's rule.
        teacher_samples: the same samples as the teacher wants them; ``samples`` when None.
        folder: finished stages and the state of the training are kept in its sub-folder ``.work``, and the same call
            goes on there after a kill. None keeps nothing.
        task: what both models predict; None detects it.
        **settings: fields of :class:`ttmpd.students.recipe.Recipe`.

    Raises:
        InvalidValueError: a setting is unknown or out of its range, labels or classes do not fit, or there is no
            teacher for what needs one.
        ModelError: the training ran away.
        UnsupportedError: the task has no labels, or the selector, the balance or the attack cannot treat it.

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
    n_selected = _count(samples, teacher_samples, recipe.fraction)
    model, note = clone(student), ""
    teacher = None if teacher is None else clone(teacher)
    _assign(labels, task, recipe, [(model, samples), *([] if teacher is None else [(teacher, teacher_samples)])])
    with _stages(folder, _fingerprint(student, teacher, samples, labels, recipe)) as stages:
        if teacher is not None:
            with stages.timed("adapt"):
                adapted = recipe.adapt.adapt(teacher, teacher_samples, batch_size=recipe.batch_size, seed=recipe.seed)
            teacher, note = adapted.model, adapted.note
        scorer = model if teacher is None else teacher  # a blind selector asks neither
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
    outputs: Tensor, labels: Tensor, *, teacher: Tensor | None, alpha: float, temperature: float, task: Task = CLASSES
) -> Tensor:
    """(1 - alpha) times the task's loss against labels + alpha times that against the teacher, means over the batch.

    Of classes these are the cross entropy and temperature^2 KL(teacher || student). What has no weight is not
    computed: then neither wrong labels nor the teacher matter.

    Args:
        outputs: (B, values) of the student.
        labels: (B, ...) as the task takes them.
        teacher: (B, values) of the teacher for the same views; None stands for an alpha of 0.
        alpha: from 0 (labels alone) to 1 (teacher alone).
        temperature: of both predictions in the divergence.
        task: what both predict.
    """
    if alpha == 0 or teacher is None:
        return task.label_loss(outputs, labels)
    soft = task.loss(outputs, teacher, temperature)  # temperature^2 is in it
    return soft if alpha == 1 else (1 - alpha) * task.label_loss(outputs, labels) + alpha * soft


def _count(samples: Samples, teacher_samples: Samples, fraction: float) -> int:
    """Check that both hold the same samples; the number of samples that are selected."""
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


def _assign(labels: Tensor, task: Task | str | None, recipe: Recipe, models: list[tuple[nn.Module, Samples]]) -> None:
    """Let student and teacher carry what they predict; both must predict the same, and what the labels are of."""
    chosen = cast(Task, method_of("task", task)) if isinstance(task, str) else task
    tasks = []
    for model, samples in models:
        batch = samples.first(2).trimmed(slice(None), next(model.parameters()).device)
        tasks.append(assign_task(model, batch, chosen))
    first, last = tasks[0], tasks[-1]
    if type(first) is not type(last) or first.widths != last.widths:
        raise InvalidValueError(
            f"student and teacher must have the same classes, but have {sum(first.widths)} and {sum(last.widths)} "
            f"outputs ({first.name}, {last.name}); choose a student with as many outputs as the teacher"
        )
    first.check_labels(labels, len(models[0][1]))
    if recipe.balanced:
        check_one_class(first, "a balanced selection", "leave balanced off")
    if recipe.attack is not None:
        check_one_class(first, "an attack", "train without one")


def _fingerprint(
    student: nn.Module, teacher: nn.Module | None, samples: Samples, labels: Tensor, recipe: Recipe
) -> str:
    models = [weights_fingerprint(model) for model in (student, teacher) if model is not None]
    values = labels.double() if labels.is_floating_point() else labels.long()
    truth = hashlib.blake2b(values.numpy().tobytes(), digest_size=12).hexdigest()
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

    to_fast_format(student)
    check_structure(student, training_set.samples.first(2).trimmed(slice(None), device))
    train_norms(student)
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
    pixels, task = pixels_of(training_set.samples, device), task_of(student)

    def loss_of(batch: Tensor, index: Tensor, view: int) -> Tensor:
        labels = training_set.labels[index].to(device)
        answers = None if training_set.answers is None else training_set.answers[view, index].to(device)
        if recipe.attack is None or training_set.radius is None:
            return distillation_loss(
                predict(student, batch), labels, teacher=answers, alpha=training_set.alpha,
                temperature=recipe.temperature, task=task,
            )  # fmt: skip
        radius = training_set.radius[index]
        hard = adversarial_loss(student, batch, labels, radius=radius, attack=recipe.attack, pixels=pixels)
        if answers is None:
            return hard
        soft = task.loss(predict(student, batch), answers, recipe.temperature)
        return (1 - training_set.alpha) * hard + training_set.alpha * soft

    return loss_of
