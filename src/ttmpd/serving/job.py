"""One round of a running service: from collected samples to an adapted teacher and a student that was judged here."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from ttmpd.artifact.read import read_artifact
from ttmpd.artifact.write import WEIGHTS
from ttmpd.data.samples import Samples
from ttmpd.errors import ModelError, cause
from ttmpd.models.modules import clone, has_nan
from ttmpd.records import Removal
from ttmpd.serving.acceptance import frozen, logits_on
from ttmpd.serving.policy import Policy
from ttmpd.serving.worker import STUDENT, TEACHER, Kind, Outcome, Progress, Unborn, Work, Worker
from ttmpd.surgery.cut import replay

Clock = Callable[[], float]


Begin = Callable[[Work, Kind], Worker]


_log = logging.getLogger("ttmpd")


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
