"""The contract of a distiller."""

import abc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from ttmpd.data.samples import Samples
from ttmpd.method import Method
from ttmpd.training.loop import TrainingResult
from ttmpd.training.teacher_outputs import TeacherOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class FitContext:
    """Where and how long a distiller may work.

    Args:
        folder: for targets and the resume state; kept by the caller.
        batch_size: samples per teacher pass and per check.
        seed: of everything random.
        deadline: value of ``time.monotonic()`` at which ``fit`` ends with the best so far.
        amp: "auto", "on" or "off".
        agreement: share of the held-out samples on which teacher and student agree before any training; for
            ``prepare``, whose answers serve several students, that of the one that lost most.
        sample_ms: milliseconds that the student takes for one sample here, without gradients; 0 when unknown.
        first: path of the first removed unit: what runs before it is still the teacher; "" when unknown.
    """

    folder: Path
    batch_size: int = 64
    seed: int = 0
    deadline: float = math.inf
    amp: str = "auto"
    agreement: float = 1.0
    sample_ms: float = 0.0
    first: str = ""


class Distiller(Method, abc.ABC):
    """Recovers a student in two phases: ``prepare`` asks the teacher, ``fit`` never does (when ``one_time``)."""

    one_time: ClassVar[bool] = True
    """Whether the teacher is never called after ``prepare``."""
    steps: int = 400

    @abc.abstractmethod
    def prepare(self, teacher: nn.Module, samples: Samples, held_out: Samples, context: FitContext) -> TeacherOutputs:
        """The teacher's answers for the samples and the held-out samples; the only call of the teacher."""

    @abc.abstractmethod
    def fit(
        self, student: nn.Module, samples: Samples, held_out: Samples, targets: TeacherOutputs, context: FitContext
    ) -> TrainingResult:
        """Train ``student`` in place; it is left with its best state, never worse on ``held_out`` than it came."""
