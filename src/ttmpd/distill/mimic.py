"""MiR as PRACTISE runs it: mimic the last feature map, the teacher in the loop on random views."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.data.samples import Samples
from ttmpd.data.views import random_view
from ttmpd.distill.base import Distiller, FitContext
from ttmpd.errors import UnsupportedError
from ttmpd.method import check_fields
from ttmpd.models.modules import to_fast_format, to_plain_format
from ttmpd.models.run import evaluating
from ttmpd.models.taps import find_feature_tap, read_taps
from ttmpd.training.freeze import freeze_head
from ttmpd.training.loop import Loop, Schedule, TrainingResult, batch_order, train
from ttmpd.training.task import train_norms
from ttmpd.training.teacher_outputs import TeacherOutputs


class Mimic(Distiller):
    """Mean squared error of the feature map before pooling; all backbone weights train, statistics update.

    There is no check on held-out samples: the baseline is kept as its authors run it.
    """

    source: ClassVar[str] = "MiR (Wang et al., CVPR 2022, arXiv 2201.02620) as used by PRACTISE (arXiv 2202.07861)"
    needs: ClassVar[tuple[str, ...]] = ("gradients", "training")
    one_time: ClassVar[bool] = False
    steps: int = 2000
    lr: float = 0.02
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, steps=0, batch_size=2)

    def prepare(self, teacher: nn.Module, samples: Samples, held_out: Samples, context: FitContext) -> TeacherOutputs:
        """Outputs that hold the teacher itself, since ``fit`` runs it on every view.

        Raises:
            UnsupportedError: the model has no single head, so there are no features to mimic.
        """
        batch = samples.batch(slice(0, 2), next(teacher.parameters()).device)
        tap = find_feature_tap(teacher, batch)
        if tap is None:
            raise UnsupportedError("mimic needs a model with one linear head behind its features; use one_time")
        logits = context.held_out_predictions(teacher, held_out)
        return TeacherOutputs(
            tap=tap, features=None, logits=torch.empty(0), feature_variance=1.0, held_out=logits, teacher=teacher
        )

    def fit(
        self, student: nn.Module, samples: Samples, held_out: Samples, targets: TeacherOutputs, context: FitContext
    ) -> TrainingResult:
        """Train all parameters but the head's, the teacher running on every view."""
        teacher, tap = targets.teacher, targets.tap
        if teacher is None or tap is None:
            raise UnsupportedError("mimic needs the teacher in its targets: call mimic's own prepare")
        device = next(student.parameters()).device
        to_fast_format(student)
        frozen = freeze_head(student, samples.batch(slice(0, 2), device))
        train_norms(student)
        generator = torch.Generator().manual_seed(context.seed)

        def loss_at(step: int) -> Tensor:
            index = batch_order(len(samples), self.batch_size, step, context.seed)
            view = random_view(samples.batch(index, device), generator)
            with torch.no_grad():
                features = read_taps(teacher, view, {"f": tap})["f"]
            return F.mse_loss(read_taps(student, view, {"f": tap})["f"], features)

        with evaluating(teacher, gradients=True):
            loop = Loop(deadline=context.deadline, state=context.folder / "distill.safetensors")
            fit = train(student, loss_at, Schedule(steps=self.steps, lr=self.lr, shape="thirds"), loop)
        for parameter in frozen:
            parameter.requires_grad_(True)
        to_plain_format(student).eval()
        return fit
