"""What goes on beside the answers of a running service: collect, compress, judge, swap, begin anew when data move."""

import contextlib
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.errors import cause
from ttmpd.models.opened import OpenedModel
from ttmpd.serving.acceptance import Verdict, judged
from ttmpd.serving.job import Begin, Clock, Round
from ttmpd.serving.monitor import Lookout, Served
from ttmpd.serving.policy import Policy
from ttmpd.serving.reservoir import Reservoir
from ttmpd.serving.worker import STUDENT, Kind, Work

_log = logging.getLogger("ttmpd")


class Course:
    """Which model answers, and why. Callers read ``served`` and call :meth:`note`; one thread calls :meth:`look`.

    Args:
        opened: the model as it came, frozen.
        reservoir: collects.
        folder: for the rounds, one after the other.
        given: arguments of ``compress``.
        policy: when and how long.
        begin: starts a worker.
        kind: which one.
        clock: returns seconds.
    """

    def __init__(
        self,
        opened: OpenedModel,
        reservoir: Reservoir,
        folder: Path,
        *,
        given: dict[str, Any],
        policy: Policy,
        begin: Begin,
        kind: Kind,
        clock: Clock,
    ) -> None:
        self.opened, self.reservoir, self.folder, self.policy = opened, reservoir, folder, policy
        self._given, self._begin, self._kind, self._clock = given, begin, kind, clock
        self.source = self.served = Served("source", opened.module, 0)
        self.teacher: Served | None = None
        self.student: Served | None = None
        self.lookout = Lookout(policy)
        self.artifact: Path | None = None  # of the newest student that was taken into service
        self.phase, self.error, self._worker_note = "collecting", "", ""
        self._began, self._last_begun = clock(), -float("inf")
        self._n_rounds = self._n_moves = self._n_swaps = 0
        self._round: Round | None = None
        self._verdict: Verdict | None = None
        self._seconds: dict[str, float] = {}
        self._sizes: tuple[int, ...] = ()  # tuples are replaced whole: no thread sees one in the middle of a change
        self._events: tuple[tuple[float, str], ...] = ()

    def note(self, served: Served, batch: Tensor, logits: Tensor | None) -> None:
        """Take in a batch and what was answered; from any thread."""
        if not len(batch):
            return
        self._sizes = (*self._sizes[-63:], len(batch))
        self.reservoir.add(batch)
        if logits is not None and logits.dim() == 2 and len(logits) == len(batch):
            self.lookout.note(served, batch, logits)

    def look(self) -> None:
        """Take one step; nothing that goes wrong is raised."""
        try:
            self._watch()
            if self._round is not None:
                self._follow(self._round)
            elif self.phase in ("collecting", "fallback") and self._enough():
                self._begin_round()
        except Exception as error:
            _log.debug("a step failed", exc_info=error)
            if self._round is not None:
                self._settle(f"a step failed: {cause(error)}")
            else:  # it is tried again: a round after the next pause, the rest at the next look
                self.error = f"a step failed: {cause(error)}"

    def stop(self) -> None:
        """End the worker."""
        if self._round is not None:
            self._round.stop()
            self._round = None

    # ---------------------------------------------------------------------------------------------------------- rounds

    def _enough(self) -> bool:
        rested = self._clock() - self._last_begun >= self.policy.cooldown
        return rested and self.reservoir.n_seen >= self._n_wanted

    @property
    def _n_wanted(self) -> int:
        return max(self.reservoir.capacity, self.policy.seen)

    def _begin_round(self) -> None:
        self._last_begun, self._n_rounds = self._clock(), self._n_rounds + 1
        held, few = self._collected()
        folder = self.folder / f"round-{self._n_rounds}"
        folder.mkdir()
        given = self._given | {"num_samples": len(few)}
        work = Work(self.opened, few, folder, given, self.policy.threads, self.policy.nice)
        self.lookout.begin(self.served, held)
        self._tell(f"round {self._n_rounds}: compressing with {len(few)} samples, {len(held)} are held back")
        self._round = Round(work, held, begin=self._begin, kind=self._kind, policy=self.policy, clock=self._clock)
        self.phase, self.error = "adapting", ""

    def _collected(self) -> tuple[Samples, Samples]:
        """(held back, to compress with), by seed."""
        pool = open_samples(self.reservoir.rows(), self.opened.preprocessing)
        seed = int(self._given.get("seed", 0)) + self._n_rounds
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        n_held = max(2, round(self.policy.held * len(pool)))
        return pool.subset(order[:n_held]), pool.subset(order[n_held:])

    def _follow(self, round_: Round) -> None:
        self._pick_teacher(round_)
        outcome = round_.outcome()
        self._kind, self._worker_note = round_.kind, round_.note or self._worker_note
        if outcome is None:
            under_way = "compressing" if round_.has_teacher else "adapting"
            self.phase, self.error = "retrying" if round_.waiting else under_way, round_.error
        elif outcome.error:
            self._settle(outcome.error)
        else:
            self._pick_teacher(round_)
            self._pick_student(round_)

    def _pick_teacher(self, round_: Round) -> None:
        module = round_.new_teacher(self.source.module)
        if module is not None:
            self.teacher = self._swap("teacher", module, round_.held)
            self._seconds["teacher"] = self._clock() - round_.began

    def _pick_student(self, round_: Round) -> None:
        student = round_.student(self.source.module, self.opened.removed)
        sizes = sorted(self._sizes)
        n_batch = sizes[len(sizes) // 2] if sizes else 1
        teacher = (self.teacher or self.source).module
        self._verdict = judged(student, teacher, round_.held, n_batch=n_batch, policy=self.policy)
        self._seconds["student"] = self._clock() - round_.began
        if self._verdict.refused:
            self._settle(f"the student was refused: {self._verdict.refused}")
            return
        before, self.artifact = self.artifact, round_.folder / STUDENT
        self.student = self._swap("student", student, round_.held)
        self.phase, self.error, self._round = "serving", "", None
        if before is not None:
            shutil.rmtree(before.parent, ignore_errors=True)

    def _swap(self, name: str, module: nn.Module, held: Samples) -> Served:
        self._n_swaps += 1
        served = Served(name, module, self._n_swaps)
        self.lookout.begin(served, held)
        self.served = served  # one assignment: callers see the old model or the new one
        self._tell(f"the {name} answers")
        return served

    def _settle(self, why: str) -> None:
        """No student for these data: who answers now goes on."""
        self._drop_round()
        self.phase, self.error = "settled", why
        self._tell(why)

    def _drop_round(self) -> None:
        if self._round is not None:
            round_, self._round = self._round, None
            with contextlib.suppress(Exception):  # a broken worker must not keep the service from going on
                round_.stop()
            round_.discard()

    # ----------------------------------------------------------------------------------------------------------- drift

    def _watch(self) -> None:
        why = self.lookout.moved()
        if not why and self.served is self.student:
            why = self.lookout.parted(self.served.module, (self.teacher or self.source).module)
        if why:
            self._move(why)

    def _move(self, why: str) -> None:
        """Begin anew: what was collected, the worker and the reference belong to other data."""
        self._n_moves += 1
        self._tell(why)
        self._drop_round()
        fell = self.served is not self.source and self._fall_back()
        self.phase, self.error = "fallback" if fell else "collecting", ""
        self.reservoir.reset()
        self.lookout.end()

    def _fall_back(self) -> bool:
        """Let the better of teacher and source answer, unless it is a student that still answers like the teacher."""
        teacher = self.teacher or self.source
        if self.served is self.student:
            found = self.lookout.compare(self.served.module, teacher.module)
            if found is not None and found.share >= self.policy.min_agreement:
                return False
        better = self.lookout.better([teacher, self.source])
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

    def state(self) -> dict[str, Any]:
        """What is going on, as plain data; from any thread."""
        round_, reservoir, verdict = self._round, self.reservoir, self._verdict
        return {
            "phase": self.phase,
            "answers": self.served.name,
            "error": self.error,
            "n_collected": len(reservoir),
            "n_wanted": self._n_wanted,
            "n_refused": reservoir.n_refused,
            "collected_bytes": reservoir.n_bytes,
            "n_rounds": self._n_rounds,
            "n_moves": self._n_moves,
            "n_swaps": self._n_swaps,
            "worker": self._kind,
            "worker_note": self._worker_note,
            "tries": 0 if round_ is None else round_.tries,
            "progress": None if round_ is None else asdict(round_.progress()),
            "student": None if verdict is None else asdict(verdict),
            **self.lookout.state(),
            "seconds": {"service": self._clock() - self._began} | self._seconds,
            "events": [list(event) for event in self._events],
        }
