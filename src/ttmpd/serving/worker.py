"""Compression beside a running service: in a process of its own with low priority, or in a thread.

The two sides meet in a folder. The worker puts ``teacher.safetensors`` there as soon as the teacher is adapted, and the
artifact under ``student``; a killed worker leaves finished stages, and the next one goes on from them. A process also
writes ``status.json``. It gets the model through a pipe, and ends when the pipe breaks: nothing outlives the service.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import cloudpickle
import torch

from ttmpd.data.samples import Samples
from ttmpd.errors import TTMPDError, cause
from ttmpd.latency.memory import freed_memory, keep_freed_memory
from ttmpd.models.factory import call_factory, is_factory
from ttmpd.models.modules import clone
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.stages import ADAPT_STAGE
from ttmpd.progress import Watcher, watched
from ttmpd.storage import write_copy, write_json

TEACHER, STUDENT, STATUS, LOG = "teacher.safetensors", "student", "status.json", "worker.log"
TELL_EVERY = 0.2
"""Seconds between two notes of progress."""
STOP_SECONDS = 3.0
"""Seconds that a worker has to end when it is asked to; then a process is killed and a thread is left alone."""

Kind = Literal["process", "thread"]


@dataclass(frozen=True, eq=False)
class JobInputs:
    """One compression.

    Args:
        opened: the model; it is copied before anything is done to it.
        samples: unlabelled.
        folder: where the results go.
        arguments: of ``compress``: the target and the settings.
        threads: that torch may use in a process.
        niceness: by how much the priority is lowered, 0 to 19.
        resume: go on with what an earlier worker left in ``folder``.
    """

    opened: OpenedModel
    samples: Samples
    folder: Path
    arguments: dict[str, Any]
    threads: int = 1
    niceness: int = 10
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a worker.

    Args:
        error: "" when the artifact is there.
        retryable: whether another try may go better: it was killed, or broke off unexpectedly.
        needs_thread: whether it could not even begin, so that only a thread can do the work.
    """

    error: str = ""
    retryable: bool = False
    needs_thread: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a worker: ``done`` of ``total`` steps of a stage."""

    stage: str = ""
    done: int = 0
    total: int = 0


class Worker(Protocol):
    """JobInputs under way."""

    @property
    def kind(self) -> str:
        """Where it works: "process" or "thread"."""

    def progress(self) -> Progress:
        """The stage that it is in, and its steps."""

    def outcome(self) -> Outcome | None:
        """Its end; None while it runs."""

    def stop(self) -> None:
        """End it, whatever it is doing; may be called again."""


class StoppedError(BaseException):
    """Ends a thread's work where it next tells its progress, past all that catches errors; never leaves this module."""


def start(inputs: JobInputs, kind: Kind) -> Worker:
    """A worker of the kind that does the work."""
    return ProcessWorker(inputs) if kind == "process" else ThreadWorker(inputs)


@dataclass(frozen=True, slots=True)
class FailedStart:
    """Stands for a worker that could not be started."""

    error: str
    kind: str = "process"

    def progress(self) -> Progress:
        """Nothing."""
        return Progress()

    def outcome(self) -> Outcome:
        """Another try may go better: a process needs memory and a place in the system's table."""
        return Outcome(f"the background job could not be started: {self.error}", retryable=True)

    def stop(self) -> None:
        """There is nothing to end."""


def run_job(inputs: JobInputs, tell: Watcher) -> None:
    """Compress into the folder; the adapted teacher is copied beside the artifact as soon as its stage is finished."""
    teacher = inputs.folder / TEACHER
    teacher.unlink(missing_ok=True)

    def publish(stage: str, path: Path) -> None:
        if stage == ADAPT_STAGE:
            write_copy(path, teacher)

    with watched(tell, publish):
        compress(
            inputs.opened,
            inputs.samples,
            output=inputs.folder / STUDENT,
            resume=inputs.resume,
            command="made by a running service",
            **inputs.arguments,
        )


def outcome_of(error: Exception) -> Outcome:
    """The outcome that an error of :func:`run_job` stands for: may another try go better?"""
    hopeless = isinstance(error, TTMPDError)  # stated rules: the same samples break them again
    return Outcome(str(error) if hopeless else f"the background job failed: {cause(error)}", retryable=not hopeless)


# ------------------------------------------------------------------------------------------------------------- process


class ProcessWorker:
    """A fresh interpreter, which knows the caller's import paths and gets the work through its standard input.

    The caller's main module is not imported there, so scripts need no guard; what it defines is sent along.
    """

    kind = "process"

    def __init__(self, inputs: JobInputs) -> None:
        self.folder = inputs.folder
        inputs.folder.mkdir(parents=True, exist_ok=True)
        (inputs.folder / STATUS).unlink(missing_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._broken: Outcome | None = None
        try:
            module = inputs.opened.module
            on_cpu = {p.device.type for p in module.parameters()} <= {"cpu"}
            opened = inputs.opened if on_cpu else dataclasses.replace(inputs.opened, module=clone(module).cpu())
            sent = pickle.dumps((inputs.opened.id, freed_memory() == "kept", inputs.threads, inputs.niceness))
            # By value what a script or a notebook defines, which plain pickle would only name.
            sent_work = cloudpickle.dumps(dataclasses.replace(inputs, opened=opened))
        except Exception as error:  # what a module may hold can still refuse: locks, open files, generators
            self._broken = Outcome(f"the model cannot be sent to a process: {cause(error)}", needs_thread=True)
            return
        with (inputs.folder / LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _ENTRY, str(len(sent)), str(len(sent_work)), str(inputs.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(inputs.threads),
            )
        with contextlib.suppress(OSError):  # it died already: `outcome` says so
            assert self._process.stdin is not None
            self._process.stdin.write(sent)
            self._process.stdin.write(sent_work)
            self._process.stdin.flush()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def progress(self) -> Progress:
        """The progress in its status file."""
        status = _status(self.folder)
        return Progress(**{key: status[key] for key in ("stage", "done", "total")}) if "stage" in status else Progress()

    def outcome(self) -> Outcome | None:
        """Its end; None while it runs."""
        if self._process is None:
            return self._broken
        code = self._process.poll()
        if code is None:
            return None
        self._close_pipe()
        status = _status(self.folder)
        if "error" in status:
            return Outcome(status["error"], status["retryable"], status["needs_thread"])
        ending = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Outcome(
            f"the background process {ending}{self._last_words()}", retryable=True, needs_thread=not status and code > 0
        )

    def stop(self) -> None:
        """End the process, kill it if it does not go, and wait until it is gone."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return f"; it last wrote: {lines[-1][:200]}"
        return ""


# Before anything heavy is imported the pipe is read, so that the sender does not wait, and from then on watched: not
# through sys.stdin, whose lock a waiting thread would hold when the interpreter ends, which aborts it.
_ENTRY = """
import os, sys, threading
head, inputs = sys.stdin.buffer.read(int(sys.argv[1])), sys.stdin.buffer.read(int(sys.argv[2]))
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
from ttmpd.serving.worker import process_main
process_main(head, inputs, sys.argv[3])
"""


def process_main(head: bytes, sent: bytes, place: str) -> None:
    """Main function of the process; ``head`` and ``sent`` are from the service that started it alone."""
    with contextlib.suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service is interrupted, and ends this process
    folder = Path(place)
    model_id, keeps_memory, threads, niceness = pickle.loads(head)
    with contextlib.suppress(OSError, AttributeError):
        os.nice(niceness)
    torch.set_num_threads(threads)
    if keeps_memory:
        keep_freed_memory()  # milliseconds depend on it
    try:
        if is_factory(model_id):
            call_factory(model_id)  # classes of a file that is not on any import path become known by that
        inputs: JobInputs = pickle.loads(sent)
    except Exception as error:
        _write_outcome(folder, Outcome(f"the model cannot be rebuilt in a process: {cause(error)}", needs_thread=True))
        return
    write_json(folder / STATUS, dataclasses.asdict(Progress("starting")))
    try:
        run_job(inputs, _Teller(folder / STATUS))
    except Exception as error:
        _write_outcome(folder, outcome_of(error))
        if not isinstance(error, TTMPDError):
            raise
    else:
        _write_outcome(folder, Outcome())


class _Teller:
    """Writes progress to a file, not too often."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.clock, self.next = path, clock, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.clock() >= self.next:
            write_json(self.path, dataclasses.asdict(Progress(stage, done, total)))
            self.next = self.clock() + TELL_EVERY


def _write_outcome(folder: Path, outcome: Outcome) -> None:
    write_json(folder / STATUS, dataclasses.asdict(outcome))


def _status(folder: Path) -> dict[str, Any]:
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _environment(threads: int) -> dict[str, str]:
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return os.environ | limits | {"PYTHONPATH": paths}


# -------------------------------------------------------------------------------------------------------------- thread


class ThreadWorker:
    """A thread of the service: for models that cannot be sent to a process. It shares the service's cores and GIL."""

    kind = "thread"

    def __init__(self, inputs: JobInputs) -> None:
        self.inputs = inputs
        self._progress = Progress()
        self._outcome: Outcome | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ttmpd-compress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _lower_priority(self.inputs.niceness)
        try:
            run_job(self.inputs, self._hear)
            self._outcome = Outcome()
        except StoppedError:
            self._outcome = Outcome("stopped")
        except Exception as error:  # the service lives on
            self._outcome = outcome_of(error)

    def _hear(self, stage: str, done: int, total: int) -> None:
        if self._stopping.is_set():
            raise StoppedError
        self._progress = Progress(stage, done, total)

    def progress(self) -> Progress:
        """The stage that it is in, and its steps."""
        return self._progress

    def outcome(self) -> Outcome | None:
        """Its end; None while it runs."""
        return self._outcome

    def stop(self) -> None:
        """Ask the thread to end at its next step, and wait for it a little."""
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(STOP_SECONDS)


def _lower_priority(niceness: int) -> None:
    """On Linux a thread has a priority of its own; elsewhere nothing is done."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
