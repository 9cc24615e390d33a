"""The settings of a running service."""

from dataclasses import dataclass

from ttmpd.method import check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a running service compresses, what a student must reach, and how its answers are watched.

    Args:
        acceptance_holdout: share of the collected samples that compression does not get: teacher and student are
            tested on it, and later answers are compared with those to it.
        min_seen: samples that must have gone by before a compression begins, when that is more than are collected: the
            collected ones are then a uniform choice of a longer stretch.
        min_agreement: share of the held-out samples on which the student must answer like the teacher; when it falls
            below that in service, the teacher answers again.
        min_speedup: the student must be measured to be faster than the teacher by more than this factor.
        window: answers that are compared with the reference.
        false_alarm: probability that one comparison alarms although nothing changed, see
            :class:`ttmpd.serving.drift.Drift`.
        shadow: share of the samples that teacher and student are both asked about while the student serves.
        cooldown: least seconds between the beginnings of two compressions.
        max_tries: how often a worker that died is started, all in all.
        backoff: seconds before the second try; doubled for every further one.
        threads: that a background process uses.
        niceness: by how much its priority is lowered, 0 to 19.
        poll_seconds: seconds between two looks at worker and answers; infinity: the program calls ``look`` itself.

    Raises:
        InvalidValueError: a value is out of range.
    """

    acceptance_holdout: float = 0.2
    min_seen: int = 0
    min_agreement: float = 0.8
    min_speedup: float = 1.0
    window: int = 256
    false_alarm: float = 1e-4
    shadow: float = 0.02
    cooldown: float = 60.0
    max_tries: int = 3
    backoff: float = 5.0
    threads: int = 1
    niceness: int = 10
    poll_seconds: float = 0.2

    def __post_init__(self) -> None:
        check_fields(
            self, acceptance_holdout=(0.01, 0.9), min_seen=0, min_agreement=(0.0, 1.0), min_speedup=0.0, window=8,
            false_alarm=(1e-12, 0.5), shadow=(0.0, 1.0), cooldown=0.0, max_tries=1, backoff=0.0, threads=1,
            niceness=(0, 19), poll_seconds=0.001,
        )  # fmt: skip
