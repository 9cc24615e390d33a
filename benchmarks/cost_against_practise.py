"""Seconds of TT-MPD against PRACTISE + MiR at its defaults, measured side by side.

    python benchmarks/cost_against_practise.py

PRACTISE needs hours on a CPU, so its cost is *measured per iteration and multiplied*: adaptor iterations on the
first, a middle and the last block, MiR iterations on the student of the same plan. TT-MPD is run whole. All of it takes
turns in one process, three rounds; medians are compared. PRACTISE: 1,000 iterations per block, 2,000 of MiR, batch 64.
What is faster without changing an answer (`--lossless`) would help both alike and is left out.
Writes results/cost_against_practise.csv. Run it on an idle machine.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import DATA, cifar, require_data, write_csv
from ttmpd.data.open import open_samples
from ttmpd.distill.base import FitContext
from ttmpd.distill.mimic import Mimic
from ttmpd.models.modules import to_fast_format
from ttmpd.models.open import open_model
from ttmpd.pipeline.compress import compress
from ttmpd.records import Removal
from ttmpd.repair.sequential import repaired
from ttmpd.score.practise import Practise
from ttmpd.surgery.units.block import Block

ROUNDS, STEPS, SPEEDUP = 3, 20, 2.0


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(name: str) -> dict[str, Any]:
    pixels, _ = cifar()
    opened = open_model(f"{DATA / 'zoo.py'}:{name}")
    samples = open_samples(pixels, opened.preprocessing, num_samples=500)
    teacher = to_fast_format(open_model(f"{DATA / 'zoo.py'}:{name}").module)
    units = Block().find(teacher, samples.batch(slice(0, 2))).units
    probes = [units[0], units[len(units) // 2], units[-1]]
    own: list[Mapping[str, float]] = []
    adaptor, mimic = [], []
    for _ in range(ROUNDS):
        result = compress(opened, pixels, speedup=SPEEDUP, lossless=False)
        own.append(result.report.seconds)
        fixed = seconds(lambda: Practise(steps=0).score(teacher, probes, samples))
        whole = seconds(lambda: Practise(steps=STEPS).score(teacher, probes, samples))
        adaptor.append((whole - fixed) / STEPS / len(probes))
        removals = [Removal(unit, "drop") for unit in units if unit.id in result.plan.actions]
        mimic.append(mir_step(teacher, removals, samples))
    totals = [sum(found.values()) for found in own]
    practise = statistics.median(adaptor) * 1000 * len(units) + statistics.median(mimic) * 2000
    return {
        "model": name,
        "units": len(units),
        "ttmpd_seconds": round(statistics.median(totals), 1),
        "ttmpd_low": round(min(totals), 1),
        "ttmpd_high": round(max(totals), 1),
        "adaptor_step_ms": round(1e3 * statistics.median(adaptor), 1),
        "mir_step_ms": round(1e3 * statistics.median(mimic), 1),
        "practise_seconds_at_defaults": round(practise),
        "ratio": round(practise / statistics.median(totals), 1),
        "ttmpd_stages": json.dumps({key: round(value, 2) for key, value in own[-1].items()}),
        "rounds": ROUNDS,
        "seed": 0,
    }


def mir_step(teacher: Any, removals: list[Removal], samples: Any) -> float:
    """Seconds of one MiR iteration, the set-up taken off."""
    found = []
    for steps in (0, STEPS):
        student = repaired(teacher, removals, samples, refit_scope="removed_only")
        with tempfile.TemporaryDirectory() as folder:
            method, context = Mimic(steps=steps), FitContext(folder=Path(folder))
            targets = method.prepare(teacher, samples, samples.subset([]), context)
            found.append(seconds(lambda: method.fit(student, samples, samples.subset([]), targets, context)))  # noqa: B023
    return (found[1] - found[0]) / STEPS


def main() -> None:
    require_data("zoo.py", "cifar10_jpeg/test.npz")
    rows = [run(name) for name in ("resnet20", "resnet56")]
    for row in rows:
        print(row)
    print(write_csv("cost_against_practise.csv", rows))


if __name__ == "__main__":
    main()
