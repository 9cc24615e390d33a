"""A model in service: answer, collect, compress beside it, swap, watch for drift.

Callers only ever read one reference and run the model behind it. Everything else happens in one thread that looks at
the worker and at the answers, and in the worker; neither can reach a caller.
"""

import atexit
import contextlib
import dataclasses
import getpass
import logging
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from filelock import BaseFileLock, FileLock
from torch import Tensor, nn

from ttmpd.artifact.write import PLAN, UNFINISHED, check_output
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, TTMPDError, UnsupportedError, cause
from ttmpd.models.modules import clone
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import carry_task
from ttmpd.pipeline.settings import Target, settings_of
from ttmpd.serving.acceptance import device_of, frozen
from ttmpd.serving.controller import ServiceController
from ttmpd.serving.job import Begin, Clock
from ttmpd.serving.monitor import Served
from ttmpd.serving.policy import Policy
from ttmpd.serving.reservoir import Reservoir
from ttmpd.serving.state import ServiceState
from ttmpd.serving.worker import Kind, start
from ttmpd.storage import disk_guarded, write_copy

FEWEST = 8
"""Least samples with which a compression can begin."""
_PREFIX, _LOCK = "ttmpd-online-", ".lock"

_log = logging.getLogger("ttmpd")


class Answer(NamedTuple):
    """The output of a model for a batch, and the model's name: ``by`` is "source", "teacher" or "student"."""

    output: Any
    by: str


class OnlineService:
    """A model in service that becomes faster and adapts itself to what it is asked.

    It answers from the first call on: with the model as it came, then with the teacher that is adapted to the collected
    samples, then with the compressed student. Compression runs beside it, in a process with low priority. When the data
    move, the better of teacher and model as it came takes over from a student that no longer answers like the teacher,
    new samples are collected, and a new student is made. ``state()["phase"]`` is one of

    * collecting: there are too few samples yet;
    * adapting, compressing: the worker runs, before and after it has adapted the teacher;
    * retrying: the worker died; another one will be started;
    * serving: the student answers;
    * idle: there will be no student for these data, and ``error`` says why;
    * fallback: the data moved and the student was taken out of service; new samples are collected;
    * closed.

    Calls may come from any number of threads. A batch is answered by one model. Make it after a server has forked. What
    is no batch of floating values in one tensor (text, say) is answered, but there will be no student for it.
    Memory: a copy of the model, ``num_samples`` times the values of one (1 byte each for pixels, else 2), 64 of them
    more, teacher and student; the worker takes what ``compress`` takes, in a process of its own.

    Args:
        model: any model of images or values, its id, or an opened model, as for :func:`ttmpd.compress`; it is copied.
            What it predicts is told from its first output, unless it carries a task or ``task`` names one.
        speedup: how many times faster the student shall be.
        latency: instead of ``speedup``: ``"12ms"`` per batch, or ``"0.5x"`` of the original.
        num_samples: how many samples are collected, at least 8; a fifth of them is held back to judge by.
        output: folder for the artifact of the newest student.
        worker: "process", or "thread" where the model cannot be sent to one (it is taken then anyway, with the reason
            in ``state()``); or a function that starts a worker, as :func:`ttmpd.serving.worker.start` does.
        clock: returns seconds.
        **settings: the fields of :class:`ttmpd.serving.policy.Policy` and of :class:`ttmpd.Settings`.

    Raises:
        InvalidValueError: a value breaks its rule.
        ModelError: the model cannot be opened.
        UnsupportedError: it is a text model.

    Example:
        >>> from ttmpd.testing.tiny_models import tiny_model, tiny_samples
        >>> with OnlineService(tiny_model(), speedup=1.5, num_samples=500) as service:
        ...     logits = service(tiny_samples(4).batch(slice(None)))
        ...     service.state()["phase"], service.state()["n_seen"]
        ('collecting', 4)
    """

    def __init__(
        self,
        model: nn.Module | str | OpenedModel,
        *,
        speedup: float | None = None,
        latency: str | float | None = None,
        num_samples: int = 512,
        output: str | Path | None = None,
        worker: Kind | Begin = "process",
        clock: Clock = time.monotonic,
        **settings: Any,
    ) -> None:
        names = {field.name for field in dataclasses.fields(Policy)}
        self.policy = Policy(**{name: value for name, value in settings.items() if name in names})
        arguments = {name: value for name, value in settings.items() if name not in names}
        arguments = _checked(arguments, speedup, latency)
        if num_samples < FEWEST:
            raise InvalidValueError(f"num_samples must be at least {FEWEST}, but got {num_samples!r}")
        if worker not in ("process", "thread") and not callable(worker):
            raise InvalidValueError(f"worker must be process or thread, but got {worker!r}")
        self._output = None if output is None else Path(output)
        if self._output is not None:
            check_output(self._output)
        opened = model if isinstance(model, OpenedModel) else open_model(model)
        if isinstance(opened.preprocessing, Tokenization):
            raise UnsupportedError(
                f"a service must collect images or floating values, but {type(opened.module).__name__} takes text; "
                "compress it with ttmpd.compress and serve the artifact"
            )
        self.preprocessing: Preprocessing | None = opened.preprocessing
        self.opened = dataclasses.replace(opened, module=frozen(clone(opened.module)))
        if "task" in arguments:
            carry_task(self.opened.module, settings_of({"task": arguments["task"]}).task)
        self._folder, self._lock = _new_folder()
        self._controller = ServiceController(
            self.opened,
            Reservoir(num_samples, self.preprocessing, arguments.get("seed", 0)),
            Path(self._folder.name),
            arguments={"device": str(device_of(opened.module))} | arguments,
            policy=self.policy,
            begin=worker if callable(worker) else start,
            kind="process" if callable(worker) else worker,
            clock=clock,
        )
        self._n_calls = self._n_seen = self._n_unnoted = 0
        self._saved: Path | None = None
        self._counting, self._looking, self._closing = threading.Lock(), threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        if self.policy.poll_seconds < float("inf"):
            self._thread = threading.Thread(target=self._keep_looking, name="ttmpd-look", daemon=True)
            self._thread.start()
        atexit.register(self.close)

    # -------------------------------------------------------------------------------------------------------- answering

    def __call__(self, x: Any) -> Any:
        """Run the model in service on ``x`` and return its output unchanged.

        Args:
            x: a batch in the form that the module takes, (B, ...), already prepared.
        """
        return self.answer(x).output

    def answer(self, x: Any) -> Answer:
        """Run the model in service on ``x``; return its output and the model's name.

        What goes wrong in the model is raised here, and to nobody else. Samples that are not finite are answered and
        not collected.
        """
        served = self._controller.served  # read once: from here on a swap does not matter
        with torch.no_grad():
            output = served.module(x)
        if not self._closing.is_set():
            self._note(served, x, output)
        return Answer(output, served.name)

    def _note(self, served: Served, x: Any, output: Any) -> None:
        """Count a call and take in its batch; the answer is there, and nothing may keep it from the caller."""
        n_seen, n_unnoted = (len(x), 0) if isinstance(x, Tensor) and x.dim() else (0, 1)
        try:
            if not n_unnoted:
                self._controller.note(served, x, output)
        except Exception as error:
            n_unnoted = 1
            _log.debug("a call could not be noted", exc_info=error)
        with self._counting:
            self._n_calls, self._n_seen = self._n_calls + 1, self._n_seen + n_seen
            self._n_unnoted += n_unnoted

    def records(self, x: Tensor, answer: Answer, *, top: int = 5, scores: bool = True) -> list[dict[str, Any]]:
        """The predictions in an answer as plain data, one record per sample; see :meth:`ttmpd.tasks.base.Task.records`.

        Args:
            x: the batch that was answered.
            answer: as :meth:`answer` returned it.
            top: number of likeliest classes that are listed.
            scores: whether all scores are listed, too.

        Raises:
            ModelError: no task can read the output.
        """
        task = self._controller.task_for(x, answer.output)
        return task.records(answer.output, x, class_names=self.opened.class_names, top=top, scores=scores)

    # --------------------------------------------------------------------------------------------------------- looking

    def _keep_looking(self) -> None:
        while not self._closing.wait(self.policy.poll_seconds):
            self.look()

    def look(self) -> None:
        """Take one step of what goes on beside the answers; the service does so itself every ``poll`` seconds.

        Nothing that goes wrong is raised: the state says it.
        """
        with self._looking:
            if self._closing.is_set():
                return
            self._controller.look()
            if self._output is not None and self._controller.artifact not in (None, self._saved):
                self._saved = self._controller.artifact
                try:
                    self.save(self._output)
                except (TTMPDError, OSError) as error:
                    self._controller.error = f"the artifact could not be kept: {cause(error)}"

    # ---------------------------------------------------------------------------------------------------------- state

    def state(self) -> ServiceState:
        """Everything that is known about the service, as plain data; at any time and from any thread."""
        known: ServiceState = {
            **self._controller.state(),
            "n_calls": self._n_calls,
            "n_seen": self._n_seen,
            "n_unnoted": self._n_unnoted,
        }
        if self._closing.is_set():
            known["phase"] = "closed"
        return known

    @property
    def device(self) -> torch.device:
        """Where the models are, and where inputs must be."""
        return device_of(self.opened.module)

    @property
    def artifact(self) -> Path | None:
        """The artifact of the newest student that was taken into service; None before, and once closed."""
        return None if self._closing.is_set() else self._controller.artifact

    def save(self, folder: str | Path) -> Path:
        """Copy the artifact of the newest student, for :func:`ttmpd.load`.

        Raises:
            InvalidValueError: there is no student yet, or the folder holds something else.
            TTMPDError: there is no room or no permission to write.
        """
        goal = Path(folder)
        check_output(goal)
        with self._looking:
            artifact = self.artifact
            if artifact is None:
                state = self.state()
                why = f"{state['phase']}{': ' + state['error'] if state['error'] else ''}"
                raise InvalidValueError(
                    f"a service must have made a student to save, but is {why}; wait for phase serving"
                )
            with disk_guarded(goal):
                goal.mkdir(parents=True, exist_ok=True)
                (goal / UNFINISHED).touch()  # no artifact until the last file is there, but ours
                (goal / PLAN).unlink(missing_ok=True)
                files = [path for path in artifact.iterdir() if path.is_file() and not path.name.startswith(".")]
                for path in sorted(files, key=lambda path: path.name == PLAN):  # the plan makes it an artifact
                    write_copy(path, goal / path.name)
                (goal / UNFINISHED).unlink()
        return goal

    def close(self) -> None:
        """End the worker and the watching, and remove what lies on the disk; calls are still answered."""
        with self._looking:  # a student that is being taken in is kept in the output first
            self._closing.set()
            self._controller.stop()
            self._lock.release()
            self._folder.cleanup()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _new_folder() -> tuple[tempfile.TemporaryDirectory[str], BaseFileLock]:
    """A new folder and its lock, once those are removed that killed services left: nobody holds their locks.

    Services begin one after the other, so that none takes a folder that is not locked yet for one that was left.
    """
    place = Path(tempfile.gettempdir())
    with FileLock(place / f".{_PREFIX}{getpass.getuser()}.lock"):
        for left in place.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # in service, or another user's
                with FileLock(left / _LOCK, timeout=0):
                    lost = "a student, which was not saved" if any(left.glob(f"*/*/{PLAN}")) else "no student yet"
                    shutil.rmtree(left, ignore_errors=True)
                _log.warning("removed what a killed service left at %s: its samples, and %s", left, lost)
        folder = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
        lock = FileLock(Path(folder.name, _LOCK), thread_local=False)  # any thread may close the service
        lock.acquire()
    return folder, lock


def _checked(arguments: dict[str, Any], speedup: float | None, latency: str | float | None) -> dict[str, Any]:
    """The arguments of ``compress``, with every rule checked now and not when the samples are there."""
    Target.of(speedup, latency)
    settings_of(arguments)
    if latency is not None:
        return arguments | {"latency": latency}
    Target(speedup=speedup)
    return arguments | {"speedup": speedup}
