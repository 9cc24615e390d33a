"""One round of a running service: from collected samples to an adapted teacher and a student that was judged here."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ttmpd.batches import Samples
from ttmpd.checkpoint import read_artifact
from ttmpd.errors import ModelError
from ttmpd.factory import cause
from ttmpd.method import check_fields
from ttmpd.modules import call, clone, has_nan
from ttmpd.records import Removal
from ttmpd.repair import replay
from ttmpd.saving import WEIGHTS
from ttmpd.serving.background import STUDENT, TEACHER, Kind, Outcome, Progress, Unborn, Work, Worker
from ttmpd.timing import forward_call, interleaved

Clock = Callable[[], float]
Begin = Callable[[Work, Kind], Worker]

_log = logging.getLogger("ttmpd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a running service decides.

    Args:
        held: share of the collected samples that is not compressed with: it judges teacher and student, and is what
            later answers are compared with.
        seen: samples that must have gone by before a compression begins, when that is more than are collected: the
            collected ones are then a uniform choice of a longer stretch.
        min_agreement: share of held samples on which the student must answer like the teacher; below it in service,
            the teacher answers again.
        min_speedup: the student must be measured to be faster than the teacher by more than this factor.
        window: answers that are compared with the reference.
        false_alarm: probability that one comparison alarms although nothing changed, see
            :class:`ttmpd.serving.drift.Drift`.
        shadow: share of the samples that teacher and student are both asked about while the student serves.
        cooldown: least seconds between the beginnings of two rounds.
        tries: how often a worker that died is started, all in all.
        backoff: seconds before the second try; doubled for every further one.
        threads: that a background process uses.
        nice: by how much its priority is lowered, 0 to 19.
        poll: seconds between two looks at worker and answers; infinity: the program calls ``look`` itself.

    Raises:
        InvalidValueError: a value is out of range.
    """

    held: float = 0.2
    seen: int = 0
    min_agreement: float = 0.8
    min_speedup: float = 1.0
    window: int = 256
    false_alarm: float = 1e-4
    shadow: float = 0.02
    cooldown: float = 60.0
    tries: int = 3
    backoff: float = 5.0
    threads: int = 1
    nice: int = 10
    poll: float = 0.2

    def __post_init__(self) -> None:
        check_fields(
            self, held=(0.01, 0.9), seen=0, min_agreement=(0.0, 1.0), min_speedup=0.0, window=8,
            false_alarm=(1e-12, 0.5), shadow=(0.0, 1.0), cooldown=0.0, tries=1, backoff=0.0, threads=1, nice=(0, 19),
            poll=0.001,
        )  # fmt: skip


class Round:
    """A worker with its tries.

    Args:
        work: what is to be done, in a folder of its own.
        held: samples that the worker does not get.
        begin: starts a worker.
        kind: which one.
        policy: tries, and the time between them.
        clock: returns seconds.
    """

    def __init__(
        self, work: Work, held: Samples, *, begin: Begin, kind: Kind, policy: Policy, clock: Clock = time.monotonic
    ) -> None:
        self.work, self.held, self.kind = work, held, kind
        self._begin, self._policy, self._clock = begin, policy, clock
        self.began = clock()
        self.tries = 0
        self.error = self.note = ""
        self._next_try: float | None = None
        self.has_teacher = False
        self._start()

    @property
    def waiting(self) -> bool:
        """Whether a worker died and the next one has not been started yet."""
        return self._next_try is not None

    @property
    def folder(self) -> Path:
        """Where the worker puts teacher and artifact."""
        return self.work.folder

    def _start(self) -> None:
        self._next_try = None
        self.tries += 1
        work = replace(self.work, resume=self.tries > 1)  # what a killed worker had finished is not done again
        try:
            self._worker = self._begin(work, self.kind)
        except Exception as error:
            self._worker = Unborn(cause(error))

    def progress(self) -> Progress:
        """What the worker is at."""
        return self._worker.progress()

    def outcome(self) -> Outcome | None:
        """How the round ended; None while it goes on. A worker that died is replaced when its time has come."""
        if self._next_try is not None:
            if self._clock() >= self._next_try:
                self._start()
            return None
        found = self._worker.outcome()
        if found is None or not found.error:
            return found
        self.error = found.error
        if found.elsewhere and self.kind == "process":
            self.kind, self.note, self.tries = "thread", found.error, 0
            _log.warning("compression goes on in a thread of the service: %s", found.error)
            self._start()
        elif found.again and self.tries < self._policy.tries:
            wait = self._policy.backoff * 2 ** (self.tries - 1)
            self._next_try = self._clock() + wait
            _log.warning("%s; trying again in %.0f s", found.error, wait)
        else:
            return found
        return None

    def new_teacher(self, source: nn.Module) -> nn.Module | None:
        """The adapted teacher, once: as soon as the worker has laid it down.

        Raises:
            ModelError: it does not answer as the source does.
        """
        path = self.folder / TEACHER
        if self.has_teacher or not path.exists():
            return None
        self.has_teacher = True
        teacher = clone(source)
        teacher.load_state_dict(load_file(path))
        logits = logits_on(teacher, self.held)
        if logits.shape[1:] != logits_on(source, self.held.first(1)).shape[1:] or has_nan(logits):
            raise ModelError("the adapted teacher must answer with finite scores of the same classes, but does not")
        return frozen(teacher)

    def student(self, source: nn.Module, removed: Sequence[Removal]) -> nn.Module:
        """The student of the artifact; the removals in ``removed`` were made in the source already."""
        artifact = read_artifact(self.folder / STUDENT)
        state = load_file(self.folder / STUDENT / WEIGHTS)
        return frozen(replay(source, [r for r in artifact.removals if r not in removed], state, artifact.lossless))

    def stop(self) -> None:
        """End the worker."""
        self._worker.stop()

    def discard(self) -> None:
        """Remove what the round left on the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about a student before it may answer.

    Args:
        refused: why it may not; "" when it may.
        agreement: share of the held samples on which it answers like the teacher.
        speedup: how many times faster than the teacher, median of interleaved rounds in this process.
    """

    refused: str
    agreement: float = 0.0
    speedup: float = 0.0


def judged(student: nn.Module, teacher: nn.Module, held: Samples, *, n_batch: int, policy: Policy) -> Verdict:
    """Whether a student may answer in the teacher's place.

    Args:
        student: as it would answer.
        teacher: what answers otherwise.
        held: samples that neither was fitted on.
        n_batch: samples of the batches on which both are timed: as many as callers send.
        policy: the floors.
    """
    expected, found = logits_on(teacher, held), logits_on(student, held)
    if found.shape != expected.shape:
        return Verdict(f"it answers with the shape {tuple(found.shape)} in place of {tuple(expected.shape)}")
    if has_nan(found):
        return Verdict("it answers with NaN or infinity")
    share = alike(found, expected)
    if share < policy.min_agreement:
        why = f"it answers like the teacher on {share:.0%} of {len(held)} held samples"
        return Verdict(f"{why}, but must on {policy.min_agreement:.0%}", share)
    speedup = _speedup(student, teacher, held, n_batch)
    if speedup <= policy.min_speedup:
        why = f"it was measured {speedup:.2f} times as fast as the teacher in this process"
        return Verdict(f"{why}, but must be more than {policy.min_speedup:g} times as fast", share, speedup)
    return Verdict("", share, speedup)


def _speedup(student: nn.Module, teacher: nn.Module, held: Samples, n_batch: int) -> float:
    batch = held.batch(torch.arange(n_batch) % len(held), device_of(teacher))
    calls = {"teacher": forward_call(teacher, batch), "student": forward_call(student, batch)}
    rounds = interleaved(calls, rounds=9, warmup=1, min_seconds=0.2, max_seconds=3.0)
    return rounds.ratio("teacher", "student").median_ms


def alike(logits: Tensor, others: Tensor) -> float:
    """Share of rows with the same class."""
    return float((logits.argmax(-1) == others.argmax(-1)).float().mean())


def logits_on(model: nn.Module, samples: Samples | Tensor, batch_size: int = 64) -> Tensor:
    """(N, n_classes) logits on the CPU of a frozen model; other than ``evaluating``, nothing that others use is set."""
    device = device_of(model)
    batches = samples.batches(batch_size, device) if isinstance(samples, Samples) else torch.split(samples, batch_size)
    with torch.no_grad():
        return torch.cat([call(model, batch.to(device)).float().cpu() for batch in batches])


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def frozen(model: nn.Module) -> nn.Module:
    """The model in eval mode without gradients, in place: only callers' forward passes touch it from now on."""
    return model.eval().requires_grad_(False)
