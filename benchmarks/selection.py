"""Which samples of a pool are worth a teacher's answers?

    python benchmarks/selection.py                 # stop and start as you like

A pool of 5,000 images of CIFAR-10-JPEG. ResNet-20, its statistics mixed from the first 512 of them, loses the same four
units everywhere; each selector chooses N of the pool, the student is repaired and distilled on these alone (no further
samples are held out: the last step counts), and its accuracy is that on the other 5,000 images. Choice, order and views
are drawn by seed. Writes results/selection.csv, a row per selector, N and seed.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import DATA, cached, cifar, require_data, with_earlier, write_csv
from ttmpd.adapt.norm import Norm
from ttmpd.data.open import open_samples
from ttmpd.distill.base import FitContext
from ttmpd.distill.one_time import OneTime
from ttmpd.method import method_class, names
from ttmpd.models.modules import clone, to_fast_format
from ttmpd.models.open import open_model
from ttmpd.models.run import predictions_of
from ttmpd.records import Action, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.select.base import Selector
from ttmpd.surgery.units.block import Block

POOL, SIZES, SEEDS = 5000, (64, 128, 256, 512), (0, 1, 2)
PLAN: dict[str, Action] = {"layer1.0": "drop", "layer1.1": "drop", "layer1.2": "linear", "layer2.2": "linear"}


@functools.cache
def setting() -> dict[str, Any]:
    """Teacher, units, pool and test set: the same for all."""
    pixels, labels = cifar()
    opened = open_model(f"{DATA / 'zoo.py'}:resnet20")
    pool, test = (open_samples(part, opened.preprocessing) for part in (pixels[:POOL], pixels[POOL:]))
    teacher = Norm().adapt(to_fast_format(clone(opened.module).eval()), pool.first(512)).model
    found = {unit.path: unit for unit in Block().find(teacher, pool.batch(slice(0, 2))).units}
    removals = [Removal(found[path], action) for path, action in PLAN.items()]
    return {
        "teacher": teacher,
        "removals": removals,
        "pool": pool,
        "test": test,
        "truth": torch.from_numpy(labels)[POOL:],
    }


def accuracy(model: torch.nn.Module) -> float:
    alike = predictions_of(model, setting()["test"], 250).argmax(-1) == setting()["truth"]
    return round(100 * float(alike.float().mean()), 2)


def run(name: str, n: int, seed: int) -> dict[str, Any]:
    """One student."""
    teacher, removals, pool = (setting()[key] for key in ("teacher", "removals", "pool"))
    selector = method_class("select", name)()
    assert isinstance(selector, Selector)
    start = time.perf_counter()
    kept = selector.select(teacher, pool, n, seed=seed)
    seconds = time.perf_counter() - start
    few, nothing = pool.subset(kept), pool.subset([])
    student = repaired(teacher, removals, few)
    before, method = accuracy(student), OneTime()
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(folder=Path(folder), first=removals[0].unit.path, seed=seed)
        method.fit(student, few, nothing, method.prepare(teacher, few, nothing, context), context)
    return {
        "select": name,
        "n": n,
        "seed": seed,
        "accuracy": accuracy(student),
        "repaired_only": before,
        "teacher_accuracy": accuracy(teacher),
        "select_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", choices=names("select"), nargs="+", default=names("select"))
    parser.add_argument("--n", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz")
    rows = []
    for seed in args.seed:
        for n in args.n:
            for name in args.select:
                rows.append(cached(f"selection/{name}-{n}-{seed}", functools.partial(run, name, n, seed), stamped=True))
                print(rows[-1], flush=True)
    print(write_csv("selection.csv", with_earlier("selection.csv", rows, ("select", "n", "seed"))))


if __name__ == "__main__":
    main()
