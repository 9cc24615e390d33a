"""The contract of a distiller."""

import abc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.method import Method
from ttmpd.models.batch_size import ActivationMemory
from ttmpd.models.run import predictions_of
from ttmpd.training.loop import TrainingResult
from ttmpd.training.teacher_outputs import TeacherOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class FitContext:
    """Folder, deadline and measurements that a distiller works with.

    Args:
        folder: for the teacher's outputs and the resume state; the caller owns it.
        batch_size: samples per teacher pass and per check.
        seed: of everything random.
        deadline: value of ``time.monotonic()`` at which ``fit`` ends with the best state so far.
        amp: "auto", "on" or "off".
        agreement: share of the held-out samples on which teacher and student agree before any training; for
            ``prepare``, whose outputs serve several students, that of the student that agrees least.
        sample_ms: milliseconds that the student takes for one sample here, without gradients; 0 when unknown.
        first: path of the first removed unit: what runs before it is still the teacher; "" when unknown.
        memory: what the teacher's activations take in a training step; None when it was not measured.
        held_out: (M, ...) the teacher's predictions on the held-out samples; None when they were not made yet.
    """

    folder: Path
    batch_size: int = 64
    seed: int = 0
    deadline: float = math.inf
    amp: str = "auto"
    agreement: float = 1.0
    sample_ms: float = 0.0
    first: str = ""
    memory: ActivationMemory | None = None
    held_out: Tensor | None = None

    def held_out_predictions(self, teacher: nn.Module, held_out: Samples) -> Tensor:
        """The teacher's predictions on the held-out samples: those that were made before, or new ones."""
        return predictions_of(teacher, held_out, self.batch_size) if self.held_out is None else self.held_out


class Distiller(Method, abc.ABC):
    """Recovers a student in two phases: ``prepare`` runs the teacher, ``fit`` never does (where ``one_time``)."""

    one_time: ClassVar[bool] = True
    """True where the teacher is never called after ``prepare``."""
    steps: int = 400

    @abc.abstractmethod
    def prepare(self, teacher: nn.Module, samples: Samples, held_out: Samples, context: FitContext) -> TeacherOutputs:
        """The teacher's outputs for the samples and the held-out samples; the only call of the teacher."""

    @abc.abstractmethod
    def fit(
        self, student: nn.Module, samples: Samples, held_out: Samples, targets: TeacherOutputs, context: FitContext
    ) -> TrainingResult:
        """Train ``student`` in place and leave it with its best state, never worse on ``held_out`` than before."""
