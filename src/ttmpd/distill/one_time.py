"""TT-MPD's distillation: the teacher runs once on fixed views of the samples, and never again."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.distill.base import Distiller, FitContext
from ttmpd.method import check_fields
from ttmpd.models.batch_size import measure_activations
from ttmpd.models.modules import has_batch_norm, to_fast_format, to_plain_format
from ttmpd.models.run import evaluating, predict
from ttmpd.models.state import tensor_state
from ttmpd.models.taps import Tap, find_feature_tap, tapped
from ttmpd.models.tokens import prediction_offsets
from ttmpd.progress import track
from ttmpd.training.freeze import freeze
from ttmpd.training.held_out import held_out_check, mix_with_start
from ttmpd.training.loop import Check, Loop, Schedule, TrainingResult, autocast, batch_order, choose_amp, train
from ttmpd.training.losses import feature_loss, feature_variance
from ttmpd.training.task import task_of, train_norms
from ttmpd.training.teacher_outputs import TeacherOutputs, TeacherOutputsWriter

MIN_BATCH = 8
"""Gradients of fewer samples are noise; twice as many where batch statistics are made of them."""

FEWEST_STEPS = 50
"""Least number of steps, however long they take."""

STEP_PASSES = 4.0
"""Cost of a training step in forward passes, data loading and checks included."""

STORE = 1 << 30
"""Bytes of disk that the features of all views may fill."""


class OneTime(Distiller):
    """Feature loss before the head plus soft-label loss, on teacher outputs that were computed once and lie on disk."""

    source: ClassVar[str] = (
        "TT-MPD (arXiv 2412.07114): pseudo labels made one time; features before pooling as in MiR "
        "(arXiv 2201.02620); number of views, weights and guard are this project's own"
    )
    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    one_time: ClassVar[bool] = True
    steps: int = 400
    damaged: float = 0.8
    """Agreement with the teacher on the held-out samples below which steps and views grow: twice as many at 0.2 less.

    More training only moves a nearly correct student away from its weights; a student that lost much keeps improving,
    but not on few views, which it would overfit.
    """
    seconds: float = 60.0
    """Approximate limit on the training time, twice as long for a `damaged` student; 0 for no limit.

    A slow student makes fewer steps. Their number follows from the time of a forward pass that was measured before, so
    that a resumed run makes as many.
    """
    lr: float = 1e-3
    """Peak learning rate of AdamW for networks with batch normalisation, whose weights have no scale of their own."""
    lr_damaged: float = 0.03
    """Peak learning rate of SGD, momentum 0.9, for networks with batch normalisation whose agreement is 0.1 below
    `damaged`: it moves them further from their start.
    """
    lr_without_norm: float = 1e-4
    """Peak learning rate of AdamW for networks without batch normalisation: transformers, or folded convolutions."""
    views: int = 16
    """Fixed views per sample: the sample itself, crops and shifted copies, mirrored. Each is a teacher pass.

    Fewer where the steps are too few to use them all, more for `damaged` students.
    """
    smallest_crop: float = 0.25
    """The smallest share of the area that a crop keeps; 1 for no crops."""
    batch_size: int = 32
    """Samples per step; fewer, down to `MIN_BATCH`, where their activations take too much memory."""
    soft_weight: float = 0.2
    """Weight of the soft-label loss beside the feature loss."""
    temperature: float = 4.0
    clip: float = 5.0
    start_share: float = 0.25
    """Weight of the repaired parameters in the average that is kept after training (WiSE-FT)."""
    train_norm: bool = True
    """Let batch normalisation use and update batch statistics while training."""
    patience: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            steps=0,
            damaged=(0.0, 1.0),
            seconds=0.0,
            lr=0.0,
            lr_damaged=0.0,
            lr_without_norm=0.0,
            views=1,
            smallest_crop=(0.01, 1.0),
            batch_size=2,
            soft_weight=0.0,
            temperature=1e-3,
            start_share=(0.0, 1.0),
        )

    def prepare(self, teacher: nn.Module, samples: Samples, held_out: Samples, context: FitContext) -> TeacherOutputs:
        """Features and logits of the fixed views, memory-mapped under ``context.folder``.

        Cost: exactly one teacher pass per view of a sample (``views`` of them, up to twice as many for a damaged
        student, fewer where the steps are too few to use them all) and one per held-out sample.
        """
        device = next(teacher.parameters()).device
        size = self._step_size(teacher, samples, context)
        example = samples.batch(slice(0, 2), device)
        tap = find_feature_tap(teacher, example)
        more = self._times(context.agreement, len(samples), _n_values(teacher, example, tap))
        n_useful = math.ceil(self._n_steps(more, size, context) * size / len(samples)) if samples.is_image else 1
        n_views = max(1, min(round(more * self.views), n_useful))
        places = prediction_offsets(teacher, samples.inputs)
        store = TeacherOutputsWriter(context.folder, n_views, int(places[-1]))
        starts = range(0, len(samples), context.batch_size)
        with evaluating(teacher):
            for view in range(n_views):
                for start in track(starts, f"teacher view {view + 1}/{n_views}", len(starts)):
                    index = torch.arange(start, min(start + context.batch_size, len(samples)))
                    batch = self._view(samples, index, device, view, context.seed)
                    store.write(view, int(places[start]), *_outputs(teacher, batch, tap))
        features, logits = store.finish()
        first = features[0] if features is not None else logits[0]
        held_out_logits = context.held_out_predictions(teacher, held_out)
        return TeacherOutputs(
            tap=tap,
            features=features,
            logits=logits,
            feature_variance=feature_variance(first),
            held_out=held_out_logits,
        )

    def fit(
        self, student: nn.Module, samples: Samples, held_out: Samples, targets: TeacherOutputs, context: FitContext
    ) -> TrainingResult:
        """Train the student on the stored targets; the head and what runs before the first removed unit stay frozen."""
        device = next(student.parameters()).device
        to_fast_format(student)
        train_norms(student, self.train_norm)
        frozen = freeze(student, context.first, samples.batch(slice(0, 2), device))
        n_views, n, places = len(targets.logits), len(samples), prediction_offsets(student, samples.inputs)
        size = self._step_size(student, samples, context)

        def loss_with(step: int, amp: bool) -> Tensor:
            index = batch_order(n * n_views, size, step, context.seed)
            index = index[(index // n).argsort(stable=True)]  # view by view
            numbers = sorted(set((index // n).tolist()))
            views = [self._view(samples, index[index // n == view] % n, device, view, context.seed) for view in numbers]
            batch = torch.cat(views)
            with autocast(device, amp):
                return self._loss(student, batch, targets, *_prediction_rows(index // n, index % n, places))

        amp = self.steps > 0 and _faster_with_amp(student, loss_with, context.amp)
        n_values = 0 if targets.features is None else targets.features[0, 0].numel()
        steps = self._n_steps(self._times(context.agreement, n, n_values), size, context)
        start = {name: value.detach().clone() for name, value in tensor_state(student).items()}
        check = held_out_check(student, held_out, targets, context.batch_size)
        fit = train(
            student,
            lambda step: loss_with(step, amp),
            self._schedule(student, steps, context.agreement),
            Loop(
                check=check,
                check_every=max(1, steps // 10),
                patience=self.patience,
                deadline=context.deadline,
                state=context.folder / "distill.safetensors",
            ),
        )
        if check and 0 < fit.best_step == fit.steps:
            end = Check(*fit.checks[-1][1:], len(held_out))
            moved = mix_with_start(student, start, self.start_share, check, end)
            fit = dataclasses.replace(fit, start_weight=self.start_share if moved else 0.0)
        for parameter in frozen:
            parameter.requires_grad_(True)
        to_plain_format(student).eval()
        return fit

    def _schedule(self, student: nn.Module, steps: int, agreement: float) -> Schedule:
        if not has_batch_norm(student):
            return Schedule(steps=steps, lr=self.lr_without_norm, optimizer="adamw", clip=self.clip)
        if agreement <= self.damaged - 0.1:
            return Schedule(steps=steps, lr=self.lr_damaged, optimizer="sgd", clip=self.clip)
        return Schedule(steps=steps, lr=self.lr, optimizer="adamw", clip=self.clip)

    def _n_steps(self, times: float, size: int, context: FitContext) -> int:
        """Number of steps of ``size`` samples: ``times`` the usual number, or as many as there is time for."""
        n_steps, step_ms = round(times * self.steps), STEP_PASSES * size * context.sample_ms
        if not (self.seconds and step_ms):
            return n_steps
        return min(n_steps, max(FEWEST_STEPS, round(1e3 * times * self.seconds / step_ms)))

    def _times(self, agreement: float, n_samples: int, n_values: int) -> float:
        """Factor on steps and views, 1 to 2, limited by the disk space that features may fill."""
        room = STORE / max(1, self.views * n_samples * 2 * n_values)  # half precision
        return max(1.0, min(2.0, room, 1 + (self.damaged - agreement) / 0.2))

    def _view(self, samples: Samples, index: Tensor, device: torch.device, view: int, seed: int) -> Tensor:
        batch = samples.trimmed(index, device)
        return fixed_view(batch, index, view, seed, len(samples), self.smallest_crop)

    def _step_size(self, model: nn.Module, samples: Samples, context: FitContext) -> int:
        """Samples per step, by the memory that their activations take."""
        pair = samples.batch(slice(0, 2), next(model.parameters()).device)
        least = 2 * MIN_BATCH if has_batch_norm(model) else MIN_BATCH
        memory = context.memory or measure_activations(model, pair)
        return min(self.batch_size, max(least, memory.samples(pair[0].numel(), at_most=self.batch_size)))

    def _loss(self, student: nn.Module, batch: Tensor, targets: TeacherOutputs, view: Tensor, place: Tensor) -> Tensor:
        device = batch.device
        taps = {"f": targets.tap} if targets.tap is not None else {}
        with tapped(student, taps) as read:
            logits = predict(student, batch)
        target = targets.logits[view, place].to(device)
        loss = self.soft_weight * task_of(student).loss(logits, target, self.temperature)
        if targets.features is not None:
            features = targets.features[view, place].to(device, torch.float32)
            loss = loss + feature_loss(read["f"], features, targets.feature_variance)
        return loss


def _faster_with_amp(student: nn.Module, loss_with: Callable[[int, bool], Tensor], amp: str) -> bool:
    """True where bfloat16 is faster; the trial steps leave neither gradients nor changed batch statistics."""
    device = next(student.parameters()).device
    with _buffers_kept(student):
        faster = choose_amp(lambda on: loss_with(0, on).backward(), device, amp)  # type: ignore[no-untyped-call]
    student.zero_grad(set_to_none=True)
    return faster


@contextmanager
def _buffers_kept(student: nn.Module) -> Iterator[None]:
    """Restore batch statistics and the random state when the block ends, for trial steps."""
    before = {name: value.clone() for name, value in student.named_buffers()}
    with torch.random.fork_rng():
        yield
    for name, value in student.named_buffers():
        value.copy_(before[name])


def _n_values(teacher: nn.Module, batch: Tensor, tap: Tap | None) -> int:
    """Number of values in a sample's features; 0 where there are none."""
    with evaluating(teacher):
        features, _ = _outputs(teacher, batch, tap)
    return 0 if features is None else features[0].numel()


def _prediction_rows(view: Tensor, sample: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(view, row) of every prediction for the samples: one each, or one for each token that counts.

    Samples 3 and 0 with offsets (0, 2, 3, 5, 6) give the rows 5, 0, 1.
    """
    counts = places[sample + 1] - places[sample]
    behind = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return view.repeat_interleave(counts), places[sample].repeat_interleave(counts) + behind


def _outputs(teacher: nn.Module, batch: Tensor, tap: Tap | None) -> tuple[Tensor | None, Tensor]:
    with tapped(teacher, {"f": tap} if tap is not None else {}) as read:
        logits = predict(teacher, batch)
    return read.get("f"), logits
