"""The life of a running service: collect, compress, accept, swap, and begin anew when the data move."""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.errors import ModelError, cause
from ttmpd.models.opened import OpenedModel
from ttmpd.serving.acceptance import Acceptance, accept
from ttmpd.serving.job import Begin, Clock, CompressionJob
from ttmpd.serving.monitor import AnswerMonitor, Served
from ttmpd.serving.policy import Policy
from ttmpd.serving.reservoir import Reservoir
from ttmpd.serving.state import ControllerState, ProgressState, StudentState
from ttmpd.serving.worker import STUDENT, JobInputs, Kind, Progress
from ttmpd.tasks.base import Task
from ttmpd.training.task import adopt_task

_log = logging.getLogger("ttmpd")


class ServiceController:
    """Decides which model answers. Callers read ``served`` and call :meth:`note`; one thread calls :meth:`look`.

    Args:
        opened: the model as it came, frozen.
        reservoir: the collected samples.
        folder: for the compression jobs, one after the other.
        arguments: of ``compress``: the target and the settings.
        policy: when a job begins, and what its student must reach.
        begin: function that starts a worker.
        kind: where it runs, "process" or "thread".
        clock: returns seconds.
    """

    def __init__(
        self,
        opened: OpenedModel,
        reservoir: Reservoir,
        folder: Path,
        *,
        arguments: dict[str, Any],
        policy: Policy,
        begin: Begin,
        kind: Kind,
        clock: Clock,
    ) -> None:
        self.opened, self.reservoir, self.folder, self.policy = opened, reservoir, folder, policy
        self._arguments, self._begin, self._kind, self._clock = arguments, begin, kind, clock
        self.source = self.served = Served("source", opened.module, 0)
        self.teacher: Served | None = None
        self.student: Served | None = None
        self.monitor = AnswerMonitor(policy)
        self.artifact: Path | None = None  # of the newest student that was taken into service
        self.phase, self.error, self._worker_note = "collecting", "", ""
        self._began, self._last_begun = clock(), -float("inf")
        self._n_jobs = self._n_moves = self._n_swaps = 0
        self._job: CompressionJob | None = None
        self._task: Task | None = None
        self.unreadable = ""  # why outputs cannot be compared; "" where they can
        self._acceptance: Acceptance | None = None
        self._seconds: dict[str, float] = {}
        self._sizes: tuple[int, ...] = ()  # tuples are replaced whole: no thread sees one in the middle of a change
        self._events: tuple[tuple[float, str], ...] = ()

    def note(self, served: Served, batch: Tensor, raw: Any) -> None:
        """Take in a batch and the output for it, as the model returned it; from any thread.

        Raises:
            ModelError: no task can read the output, so that the batch is no use.
        """
        if not len(batch):
            return
        task = self.task_for(batch, raw)
        self._sizes = (*self._sizes[-63:], len(batch))
        self.reservoir.add(batch)
        self.monitor.note(served, batch, task.outputs(raw, batch))

    def task_for(self, batch: Tensor, raw: Any) -> Task:
        """What the model predicts: told from its first output, and carried by all models that answer from then on.

        Raises:
            ModelError: no task can read the output.
        """
        if self._task is None:
            try:
                self._task = adopt_task(self.source.module, raw, batch, None, self.opened.preprocessing)
            except ModelError as error:
                self.unreadable = f"there will be no student: {error}"
                raise
            self.unreadable = ""
        return self._task

    def look(self) -> None:
        """Take one step; nothing that goes wrong is raised."""
        try:
            self._watch()
            if self._job is not None:
                self._follow(self._job)
            elif self.phase in ("collecting", "fallback") and self._enough():
                self._begin_job()
        except Exception as error:
            _log.debug("a step failed", exc_info=error)
            if self._job is not None:
                self._give_up(f"a step failed: {cause(error)}")
            else:  # it is tried again: a job after the next pause, the rest at the next look
                self.error = f"a step failed: {cause(error)}"

    def stop(self) -> None:
        """End the worker."""
        if self._job is not None:
            self._job.stop()
            self._job = None

    # ------------------------------------------------------------------------------------------------------------ jobs

    def _enough(self) -> bool:
        rested = self._clock() - self._last_begun >= self.policy.cooldown
        return rested and self.reservoir.n_seen >= self._n_wanted

    @property
    def _n_wanted(self) -> int:
        return max(self.reservoir.capacity, self.policy.min_seen)

    def _begin_job(self) -> None:
        self._last_begun, self._n_jobs = self._clock(), self._n_jobs + 1
        held_out, samples = self._collected()
        folder = self.folder / f"job-{self._n_jobs}"
        folder.mkdir()
        arguments = self._arguments | {"num_samples": len(samples)}
        inputs = JobInputs(self.opened, samples, folder, arguments, self.policy.threads, self.policy.niceness)
        self.monitor.begin(self.served, held_out)
        self._tell(f"round {self._n_jobs}: compressing with {len(samples)} samples, {len(held_out)} are held back")
        self._job = CompressionJob(
            inputs, held_out, begin=self._begin, kind=self._kind, policy=self.policy, clock=self._clock
        )
        self.phase, self.error = "adapting", ""

    def _collected(self) -> tuple[Samples, Samples]:
        """(held back, to compress with), by seed."""
        pool = open_samples(self.reservoir.rows(), self.opened.preprocessing)
        seed = int(self._arguments.get("seed", 0)) + self._n_jobs
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        n_held_out = max(2, round(self.policy.acceptance_holdout * len(pool)))
        return pool.subset(order[:n_held_out]), pool.subset(order[n_held_out:])

    def _follow(self, job: CompressionJob) -> None:
        self._pick_teacher(job)
        outcome = job.outcome()
        self._kind, self._worker_note = job.kind, job.note or self._worker_note
        if outcome is None:
            under_way = "compressing" if job.has_teacher else "adapting"
            self.phase, self.error = "retrying" if job.waiting else under_way, job.error
        elif outcome.error:
            self._give_up(outcome.error)
        else:
            self._pick_teacher(job)
            self._pick_student(job)

    def _pick_teacher(self, job: CompressionJob) -> None:
        module = job.new_teacher(self.source.module)
        if module is not None:
            self.teacher = self.hot_swap("teacher", module, job.held_out)
            self._seconds["teacher"] = self._clock() - job.began

    def _pick_student(self, job: CompressionJob) -> None:
        student = job.student(self.source.module, self.opened.removed)
        sizes = sorted(self._sizes)
        n_batch = sizes[len(sizes) // 2] if sizes else 1
        teacher = (self.teacher or self.source).module
        self._acceptance = accept(student, teacher, job.held_out, n_batch=n_batch, policy=self.policy)
        self._seconds["student"] = self._clock() - job.began
        if self._acceptance.refused:
            self._give_up(f"the student was refused: {self._acceptance.refused}")
            return
        before, self.artifact = self.artifact, job.folder / STUDENT
        self.student = self.hot_swap("student", student, job.held_out)
        self.phase, self.error, self._job = "serving", "", None
        if before is not None:
            shutil.rmtree(before.parent, ignore_errors=True)

    def hot_swap(self, name: str, module: nn.Module, held_out: Samples) -> Served:
        """Let another model answer from now on, and watch its answers against those to the held-out samples."""
        self._n_swaps += 1
        served = Served(name, module, self._n_swaps)
        self.monitor.begin(served, held_out)
        self.served = served  # one assignment: callers see the old model or the new one
        self._tell(f"the {name} answers")
        return served

    def _give_up(self, why: str) -> None:
        """No student for these data: who answers now goes on."""
        self._drop_job()
        self.phase, self.error = "idle", why
        self._tell(why)

    def _drop_job(self) -> None:
        if self._job is not None:
            job, self._job = self._job, None
            with contextlib.suppress(Exception):  # a broken worker must not keep the service from going on
                job.stop()
            job.discard()

    # ----------------------------------------------------------------------------------------------------------- drift

    def _watch(self) -> None:
        why = self.monitor.moved()
        if not why and self.served is self.student:
            why = self.monitor.disagreement(self.served.module, (self.teacher or self.source).module)
        if why:
            self._move(why)

    def _move(self, why: str) -> None:
        """Begin anew: what was collected, the worker and the reference belong to other data."""
        self._n_moves += 1
        self._tell(why)
        self._drop_job()
        fell = self.served is not self.source and self._fall_back()
        self.phase, self.error = "fallback" if fell else "collecting", ""
        self.reservoir.reset()
        self.monitor.end()

    def _fall_back(self) -> bool:
        """Let the better of teacher and source answer, unless it is a student that still answers like the teacher."""
        teacher = self.teacher or self.source
        if self.served is self.student:
            agreement = self.monitor.compare(self.served.module, teacher.module)
            if agreement is not None and agreement.share >= self.policy.min_agreement:
                return False
        better = self.monitor.better([teacher, self.source])
        if better is self.served:
            return False
        self._n_swaps += 1
        self.served = better
        self._tell(f"the {better.name} answers again")
        return True

    # ----------------------------------------------------------------------------------------------------------- state

    def _tell(self, event: str) -> None:
        self._events = (*self._events[-19:], (round(self._clock() - self._began, 3), event))
        _log.info("%s", event)

    def state(self) -> ControllerState:
        """The state of the service as plain data; may be called from any thread."""
        job, reservoir, acceptance = self._job, self.reservoir, self._acceptance
        return {
            "phase": self.phase,
            "answers": self.served.name,
            "error": self.error or self.unreadable,
            "n_collected": len(reservoir),
            "n_wanted": self._n_wanted,
            "n_refused": reservoir.n_refused,
            "collected_bytes": reservoir.n_bytes,
            "n_rounds": self._n_jobs,
            "n_moves": self._n_moves,
            "n_swaps": self._n_swaps,
            "worker": self._kind,
            "worker_note": self._worker_note,
            "tries": 0 if job is None else job.tries,
            "progress": None if job is None else _progress(job.progress()),
            "student": None if acceptance is None else _student(acceptance),
            **self.monitor.state(),
            "seconds": {"service": self._clock() - self._began} | self._seconds,
            "events": list(self._events),
        }


def _progress(progress: Progress) -> ProgressState:
    return {"stage": progress.stage, "done": progress.done, "total": progress.total}


def _student(test: Acceptance) -> StudentState:
    return {"refused": test.refused, "agreement": test.agreement, "speedup": test.speedup}
