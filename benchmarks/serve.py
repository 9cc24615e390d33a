"""A service under load: what callers notice while a student is made, when it takes over, and when the data move.

    python benchmarks/serve.py

A network of `zoo.py`, eight concurrent callers with batches of 16, first clean CIFAR-10 images, then such images under
a shift, until a second student serves. Callers ask at fixed times (a share of what the model can answer), and latency
counts from that time, so that a stalled service is not asked less. Throughput is measured apart, with callers that ask
again at once, before and after. Accuracy is that of the answers, and below "accuracy" that of each model on images
that were never in the stream.
Writes results/serve.csv. Run it on an idle machine.
"""

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ttmpd
from common import DATA, cifar, require_data, write_csv
from ttmpd.data.corruptions import corrupted
from ttmpd.data.open import open_samples
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel

CALLERS, BATCH = 8, 16
N_STREAM = 2500


@dataclass(frozen=True)
class Call:
    """One request: when it was due, how long its answer took, how many of its samples were answered rightly."""

    due: float
    ms: float
    n_right: int
    n_lost: int
    n_misshaped: int


class Stream:
    """Batches with their labels, taken in turn by all callers."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels, self._counter = inputs, labels, itertools.count()

    def batch(self) -> tuple[Tensor, Tensor]:
        places = (torch.arange(BATCH) + next(self._counter) * BATCH) % len(self.inputs)
        return self.inputs[places], self.labels[places]


class Load:
    """Callers that ask ``answer`` for the batches of ``stream``, which may be exchanged while they run."""

    def __init__(self, answer: Callable[[Tensor], Tensor], stream: Stream, per_second: float) -> None:
        self.answer, self.stream, self.calls = answer, stream, []
        self._every = 0.0 if per_second == float("inf") else CALLERS / per_second
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(CALLERS)]

    calls: list[Call]

    def _ask(self, number: int) -> None:
        due = time.perf_counter() + self._every * number / CALLERS
        while not self._stop.is_set():
            time.sleep(max(0.0, due - time.perf_counter()))
            due = due if self._every else time.perf_counter()
            batch, labels = self.stream.batch()
            try:
                logits = self.answer(batch)
                right = int((logits.argmax(-1) == labels).sum())
                call = (right, 0, int(logits.shape != (BATCH, 10)))
            except Exception:
                call = (0, 1, 0)
            self.calls.append(Call(due, 1e3 * (time.perf_counter() - due), *call))
            due += self._every

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def row(stage: str, calls: Sequence[Call], seconds: float, **more: Any) -> dict[str, Any]:
    """What callers noticed in one stage."""
    ms = sorted(call.ms for call in calls)
    return {
        "stage": stage,
        "seconds": round(seconds, 1),
        "requests": len(calls),
        "requests_per_s": round(len(calls) / seconds, 1),
        "p50_ms": round(statistics.median(ms), 1) if ms else None,
        "p99_ms": round(ms[int(0.99 * (len(ms) - 1))], 1) if ms else None,
        "accuracy": round(100 * sum(call.n_right for call in calls) / (BATCH * len(calls)), 2) if calls else None,
        "lost": sum(call.n_lost for call in calls),
        "misshaped": sum(call.n_misshaped for call in calls),
    } | more


def throughput(stage: str, answer: Callable[[Tensor], Tensor], stream: Stream, seconds: float) -> dict[str, Any]:
    """Callers that ask again at once."""
    with Load(answer, stream, float("inf")) as load:
        time.sleep(seconds)
    return row(f"throughput, {stage}", load.calls, seconds)


def answers_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def answer(batch: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(batch)
        return logits

    return answer


def follow(
    service: ttmpd.OnlineService, load: Load, second: Stream, args: argparse.Namespace
) -> list[tuple[float, str]]:
    """(beginning, name) of the stages that the service goes through; the data move once the first student served."""
    marks: list[tuple[float, str]] = []
    since, moved, limit = time.perf_counter(), False, time.perf_counter() + args.limit
    while time.perf_counter() < limit:
        state = service.state()
        data = args.shift if moved else "clean"
        name = f"{data}: {state['phase']} ({state['answers']} answers)"
        if not marks or marks[-1][1] != name:
            since = time.perf_counter()
            marks.append((since, name))
            print(f"{name} {state['error']}", flush=True)
        if state["phase"] in ("serving", "idle") and time.perf_counter() - since > args.seconds:
            if moved and state["n_moves"]:
                break
            if not moved:
                service.save(args.folder / "first")
                moved, load.stream = True, second
        time.sleep(0.02)
    return [*marks, (time.perf_counter(), "")]


def accuracies(stage: str, answer: Callable[[Tensor], Tensor], tests: dict[str, Stream]) -> dict[str, Any]:
    """Percent of right answers on each part of the images that were never in the stream."""
    found: dict[str, Any] = {"stage": f"accuracy, {stage}"}
    for name, test in tests.items():
        logits = torch.cat([answer(batch) for batch in torch.split(test.inputs, 250)])
        found[f"accuracy_{name}"] = round(100 * float((logits.argmax(-1) == test.labels).float().mean()), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--shift", default="gaussian_noise", help="one of ttmpd.data.corruptions.CORRUPTIONS")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--nice", type=int, default=10, help="by how much the worker's priority is lowered")
    parser.add_argument("--load", type=float, default=0.3, help="share of the throughput that is asked for")
    parser.add_argument("--seconds", type=float, default=15.0, help="of every stage that has no end of its own")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which the run is given up")
    args = parser.parse_args()
    require_data("zoo.py", "cifar10/test.npz")
    torch.set_num_threads(1)
    pixels, labels = cifar("cifar10")
    opened = open_model(f"{DATA / 'zoo.py'}:{args.model}")
    halves = {"clean": pixels[:5000], args.shift: corrupted(pixels[5000:], args.shift, args.severity)}
    streams, tests = {}, {}
    for start, (name, half) in zip((0, 5000), halves.items(), strict=True):
        inputs = open_samples(half, opened.preprocessing).batch(slice(None))
        known = torch.as_tensor(labels[start : start + 5000])
        streams[name] = Stream(inputs[:N_STREAM], known[:N_STREAM])
        tests[name] = Stream(inputs[N_STREAM:], known[N_STREAM:])
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        rows = run(opened, streams, tests, args)
    for found in rows:
        print(found, flush=True)
    about = {"model": args.model, "shift": args.shift, "severity": args.severity, "asked": args.speedup}
    print(write_csv("serve.csv", [about | found for found in rows]))


def run(
    opened: OpenedModel, streams: dict[str, Stream], tests: dict[str, Stream], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of the table."""
    alone, (clean, moved) = answers_of(opened.module), streams.values()
    rows = [throughput("model alone", alone, clean, args.seconds)]
    per_second = args.load * rows[0]["requests_per_s"]
    with Load(alone, clean, per_second) as load:
        time.sleep(args.seconds)
    rows.append(row("model alone", load.calls, args.seconds))
    settings = {"speedup": args.speedup, "num_samples": args.num_samples, "cooldown": 0.0, "niceness": args.nice}
    with ttmpd.OnlineService(opened, **settings) as service:
        with Load(service, clean, per_second) as load:
            marks = follow(service, load, moved, args)
        state = service.state()
        for (start, name), (end, _) in itertools.pairwise(marks):
            calls = [call for call in load.calls if start <= call.due < end]
            if end - start > 0.2:
                rows.append(row(name, calls, end - start))
        rows.append(throughput(f"at the end ({state['answers']} answers)", service, moved, args.seconds))
        student = state["student"]
        assert student is not None
        rows[-1] |= {"agreement": student["agreement"], "speedup": student["speedup"]}
        first = answers_of(ttmpd.load(args.folder / "first", model=opened.module))
        last = f"at the end ({state['answers']})"
        answers = {"source": alone, "first student": first, last: answers_of(service._controller.served.module)}
        rows += [accuracies(name, answer, tests) for name, answer in answers.items()]
    return rows


if __name__ == "__main__":
    main()
