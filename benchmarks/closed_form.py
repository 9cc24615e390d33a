"""What closed forms give back before any training: stand-ins alone, or every layer behind a removal fitted again.

    python benchmarks/closed_form.py

Every fourth random plan of `rank_correlation.py`, dropped or with linear stand-ins, on CIFAR-10-JPEG: fitted to its 425
unlabelled images, accuracy on 1,500 others. Writes results/closed_form.csv: a row a plan, and the means.
"""

import argparse
import functools
import statistics
from typing import Any

from common import cached, require_data, write_csv
from rank_correlation import CASES, ROWS, SEED, Bench, plans
from ttmpd.records import Action, RefitScope, Removal
from ttmpd.repair.sequential import repaired

KINDS: dict[str, tuple[Action, RefitScope]] = {
    "dropped": ("drop", "removed_only"),
    "stand-ins fitted": ("linear", "removed_only"),
    "dropped, all behind fitted": ("drop", "all_later_layers"),
    "stand-ins, all behind fitted": ("linear", "all_later_layers"),
}


def row(bench: Bench, number: int, paths: list[str]) -> dict[str, Any]:
    """Accuracy of one plan without training, by what is fitted."""
    found: dict[str, Any] = {"model": bench.case.name, "plan": number, "n_units": len(paths)}
    for name, (action, refit_scope) in KINDS.items():
        removals = [Removal(unit, action) for unit in bench.units if unit.path in paths]
        student = repaired(
            bench.teacher, removals, bench.fit, batch_size=bench.case.batch, refit_scope=refit_scope, rows=ROWS
        )
        found[name] = round(bench.accuracy(student), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet20", "resnet56"), nargs="+", default=("resnet20", "resnet56"))
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz")
    table = []
    for name in args.model:
        bench = Bench(CASES[name])
        chosen = list(enumerate(plans(bench.units, bench.case.sizes)))[::4]
        rows = [
            cached(f"closed_form/{name}/{number}", functools.partial(row, bench, number, paths), stamped=True)
            for number, paths in chosen
        ]
        mean = {kind: round(statistics.mean(r[kind] for r in rows), 2) for kind in KINDS}
        units = round(statistics.mean(r["n_units"] for r in rows), 2)
        source = round(bench.accuracy(bench.teacher), 2)
        table += [{"model": name, "plan": "mean", "n_units": units, "seed": SEED, "source": source} | mean]
        table += [r | {"seed": SEED, "source": source} for r in rows]
        print(table[-len(rows) - 1], flush=True)
    print(write_csv("closed_form.csv", table))


if __name__ == "__main__":
    main()
