"""One compression beside a running service: from collected samples to an adapted teacher and a student."""

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
from ttmpd.models.state import load_tensor_state
from ttmpd.records import Removal
from ttmpd.serving.acceptance import frozen, predictions_on
from ttmpd.serving.policy import Policy
from ttmpd.serving.worker import STUDENT, TEACHER, FailedStart, JobInputs, Kind, Outcome, Progress, Worker
from ttmpd.surgery.cut import replay

Clock = Callable[[], float]


Begin = Callable[[JobInputs, Kind], Worker]


_log = logging.getLogger("ttmpd")


class CompressionJob:
    """One compression: a worker, and the next one when it died.

    Args:
        inputs: what the worker is given, and the folder that is this job's alone.
        held_out: samples that the worker does not get.
        begin: starts a worker.
        kind: where the worker runs, "process" or "thread".
        policy: how many tries, and the time between them.
        clock: returns seconds.
    """

    def __init__(
        self,
        inputs: JobInputs,
        held_out: Samples,
        *,
        begin: Begin,
        kind: Kind,
        policy: Policy,
        clock: Clock = time.monotonic,
    ) -> None:
        self.inputs, self.held_out, self.kind = inputs, held_out, kind
        self._begin, self._policy, self._clock = begin, policy, clock
        self.began = clock()
        self.tries = 0
        self.error = self.note = ""
        self._next_try: float | None = None
        self.has_teacher = False
        self._start()

    @property
    def waiting(self) -> bool:
        """True while a worker died and the next one has not been started yet."""
        return self._next_try is not None

    @property
    def folder(self) -> Path:
        """Where the worker puts teacher and artifact."""
        return self.inputs.folder

    def _start(self) -> None:
        self._next_try = None
        self.tries += 1
        inputs = replace(self.inputs, resume=self.tries > 1)  # what a killed worker had finished is not done again
        try:
            self._worker = self._begin(inputs, self.kind)
        except Exception as error:
            self._worker = FailedStart(cause(error))

    def progress(self) -> Progress:
        """The stage that the worker is in, and its steps."""
        return self._worker.progress()

    def outcome(self) -> Outcome | None:
        """The end of the job; None while it runs. A worker that died is replaced when its time has come."""
        if self._next_try is not None:
            if self._clock() >= self._next_try:
                self._start()
            return None
        outcome = self._worker.outcome()
        if outcome is None or not outcome.error:
            return outcome
        self.error = outcome.error
        if outcome.needs_thread and self.kind == "process":
            self.kind, self.note, self.tries = "thread", outcome.error, 0
            _log.warning("compression goes on in a thread of the service: %s", outcome.error)
            self._start()
        elif outcome.retryable and self.tries < self._policy.max_tries:
            wait = self._policy.backoff * 2 ** (self.tries - 1)
            self._next_try = self._clock() + wait
            _log.warning("%s; trying again in %.0f s", outcome.error, wait)
        else:
            return outcome
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
        load_tensor_state(teacher, load_file(path))
        predicted = predictions_on(teacher, self.held_out)
        if predicted.shape[1:] != predictions_on(source, self.held_out.first(1)).shape[1:] or has_nan(predicted):
            raise ModelError("the adapted teacher must predict finite values, as many as the source, but does not")
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
        """Remove what the job left on the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
