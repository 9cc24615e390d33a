"""TT-MPD against PRACTISE + MiR, random and magnitude at equal latency.

    python benchmarks/against_practise.py --model resnet20            # hours on a CPU; stop and start as you like
    python benchmarks/against_practise.py --model resnet56            # one target, a tenth of the scoring steps

A target that removing blocks cannot reach (0.35 on ResNet-20) becomes the fastest that can be reached. PRACTISE + MiR
comes first; its students are then timed again, interleaved with the original, and the others are asked for the speedup
that each of them has, less 2 % (two measurements of one student differ by as much, and few blocks leave few latencies
to choose from). Every student is timed once more, interleaved with PRACTISE's for the same target: the column
`latency_ratio` is its milliseconds divided by theirs. Do that part on an idle machine.
What is faster without changing an answer (`--lossless`) would help every method alike and is left out. TT-MPD makes all
its steps, also where one thread is so slow that by default it would stop after a minute.
500 unlabelled images of CIFAR-10-JPEG, accuracy on the other 9,500. Every row is kept on disk as it is finished.
Where PRACTISE's students are not on this disk, the rows of the table that is there are gone by, and `latency_ratio`
stays empty: hours are saved, but the speedups are then compared, not the milliseconds.
Writes results/against_practise.csv: accuracy, agreement with the unpruned source, measured speedup (interleaved with
the original, median and quartiles) and the seconds of each stage.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

from common import CACHE, DATA, cached, cifar, earlier, require_data, with_earlier, write_csv
from ttmpd.adapt.none import NoAdaptation
from ttmpd.adapt.norm import Norm
from ttmpd.artifact.read import load
from ttmpd.artifact.write import Result
from ttmpd.data.open import open_samples
from ttmpd.distill.mimic import Mimic
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import BudgetUnreachableError
from ttmpd.latency.table import compare
from ttmpd.models.open import open_model
from ttmpd.models.run import predictions_of
from ttmpd.pipeline.compress import compress_many
from ttmpd.pipeline.settings import Target
from ttmpd.plan.greedy import Greedy
from ttmpd.score.magnitude import Magnitude
from ttmpd.score.practise import Practise
from ttmpd.score.random import Random

TARGETS = {"resnet20": (0.8, 0.65, 0.5, 0.35), "resnet56": (0.55,)}
PRACTISE_STEPS = {"resnet20": 1000, "resnet56": 100}
SEEDS = (0, 1, 2)
TABLE = "against_practise.csv"
EQUAL = 0.02
"""Latencies that differ by no more count as equal."""


def settings(method: str, model: str) -> dict[str, Any]:
    """What each competitor is made of; what is not named is the default of ``compress``."""
    plain: dict[str, Any] = {"adapt": NoAdaptation(), "actions": ("drop",), "plan": Greedy()}
    competitors: dict[str, dict[str, Any]] = {
        "ttmpd": {"adapt": Norm(), "distill": OneTime(seconds=0.0)},
        "ttmpd, no adaptation": {"adapt": NoAdaptation(), "distill": OneTime(seconds=0.0)},
        "practise + mir": plain
        | {"score": Practise(steps=PRACTISE_STEPS[model]), "distill": Mimic(steps=2000), "holdout": 0.0},
        "random": plain | {"score": Random()},
        "magnitude": plain | {"score": Magnitude()},
    }
    return competitors[method]


METHODS = ("practise + mir", "ttmpd", "ttmpd, no adaptation", "random", "magnitude")


def run(model: str, method: str, seed: int) -> list[dict[str, Any]]:
    """One row per target."""
    pixels, labels = cifar()
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    work = folder_of(model, method, seed)
    targets = [Target(speedup=1 / share) for share in TARGETS[model]]
    if method != METHODS[0]:
        targets = [Target(speedup=(1 - EQUAL) * timed["speedup_again"]) for timed in timed_again(model, seed)]
    results = reach(
        opened, pixels, targets, outputs=[work / str(share) for share in TARGETS[model]], resume=True,
        num_samples=500, seed=seed, lossless=False, **settings(method, model),
    )  # fmt: skip
    everything = open_samples(pixels, opened.preprocessing)
    used = set(results[0].sample_ids)
    others = [i for i, name in enumerate(everything.ids) if name not in used]
    test, truth = everything.subset(others), torch.from_numpy(labels)[others]
    source = predictions_of(opened.module, test, 256).argmax(-1)
    batch = everything.batch(slice(0, 64))
    return [
        row(result, share, test, truth, source)
        | {
            "latency_ratio": against_theirs(
                opened.module, result.model, batch, folder_of(model, METHODS[0], seed) / str(share)
            )
        }
        | {"model": model, "method": method, "seed": seed}
        for share, result in zip(TARGETS[model], results, strict=True)
    ]


def against_theirs(
    original: torch.nn.Module, student: torch.nn.Module, batch: torch.Tensor, theirs: Path
) -> float | str:
    """Milliseconds of a student divided by those of PRACTISE's for the same target, interleaved; "" without it."""
    if not theirs.exists():
        return ""
    ratio = compare(load(theirs, model=original), student, batch, min_seconds=4.0).ratio("original", "compressed")
    return round(1 / ratio.median_ms, 3)


def folder_of(model: str, method: str, seed: int) -> Path:
    return CACHE / "runs" / f"{model}-{method.replace(' ', '_').replace(',', '')}-{seed}"


def timed_again(model: str, seed: int) -> list[dict[str, float]]:
    """The measured speedup of each student of PRACTISE + MiR."""
    known = [row for row in earlier(TABLE) if row["method"] == METHODS[0]]
    known = [row for row in known if (row["model"], row["seed"]) == (model, str(seed))]
    if known and not folder_of(model, METHODS[0], seed).exists():
        return [{"speedup_again": float(row["asked_speedup"])} for row in known]

    def compute() -> list[dict[str, float]]:
        pixels, _ = cifar()
        opened = open_model(f"{DATA / 'zoo.py'}:{model}")
        batch = open_samples(pixels[:64], opened.preprocessing).batch(slice(None))
        ratios: list[dict[str, float]] = []
        for share in TARGETS[model]:
            student = load(folder_of(model, METHODS[0], seed) / str(share), model=opened.module)
            ratio = compare(opened.module, student, batch, rounds=40, min_seconds=10.0).ratio("original", "compressed")
            ratios.append({"speedup_again": ratio.median_ms, "low_again": ratio.low_ms, "high_again": ratio.high_ms})
        return ratios

    timed: list[dict[str, float]] = cached(f"against_practise_timed/{model}-{seed}", compute)
    return timed


def reach(opened: Any, pixels: Any, targets: list[Target], **given: Any) -> list[Result]:
    """A result per target; where blocks alone cannot save so much, the fastest that they can reach is asked for."""
    while True:
        try:
            return compress_many(opened, pixels, targets=targets, **given)
        except BudgetUnreachableError as error:
            slowest = max(targets, key=lambda target: target.speedup or 0.0)
            best = Target(ms=1.02 * error.best_ms)
            print("out of reach:", slowest, "; asked for instead:", best, flush=True)
            targets = [best if target is slowest else target for target in targets]


def row(result: Result, share: float, test: Any, truth: torch.Tensor, source: torch.Tensor) -> dict[str, Any]:
    answers = predictions_of(result.model, test, 256).argmax(-1)
    report = result.report
    assert report.latency is not None
    return {
        "target": share,
        "accuracy": round(100 * float((answers == truth).float().mean()), 2),
        "source_accuracy": round(100 * float((source == truth).float().mean()), 2),
        "agreement": round(100 * float((answers == source).float().mean()), 2),
        "speedup": round(report.latency.speedup.median, 3),
        "speedup_low": round(report.latency.speedup.low, 3),
        "speedup_high": round(report.latency.speedup.high, 3),
        "removed": len(result.plan.removals),
        "n_test": len(truth),
        "seconds": json.dumps({name: round(value, 2) for name, value in report.seconds.items()}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(TARGETS), nargs="+", default=sorted(TARGETS))
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz")
    for seed in args.seed:
        for model in args.model:
            for method in args.method:
                compute = functools.partial(run, model, method, seed)
                rows = cached(f"against_practise/{model}-{method}-{seed}", compute, stamped=True)
                for line in rows:
                    print(model, method, seed, line["target"], line["accuracy"], line["speedup"], line["seconds"])
    print(write_csv(TABLE, with_earlier(TABLE, finished(), ("model", "method", "seed"))))


def finished() -> list[dict[str, Any]]:
    """All rows on disk, with the speedup that was asked for."""
    found = []
    for path in sorted(Path(CACHE, "against_practise").glob("*.json")):
        rows = json.loads(path.read_text())
        again = timed_again(rows[0]["model"], rows[0]["seed"])
        found += [line | {"asked_speedup": round(t["speedup_again"], 3)} for line, t in zip(rows, again, strict=True)]
    return found


if __name__ == "__main__":
    main()
