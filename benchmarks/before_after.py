"""Did anything get worse: the same benchmark in two checkouts, in turn, one process at a time.

    python benchmarks/before_after.py --before ../old -- end_to_end.py --case 0 1
    python benchmarks/before_after.py --before ../old --repeat 3 -- families.py --family "timm ViT"

Each checkout's own script runs against its own package, from a copy of its folder, with a cache of its own: nothing is
reused and neither checkout is changed. Odd repetitions begin with the checkout before, even ones with this one. Rows
are matched by the columns of text that both tables have. Columns of the result: the median of each number before and
after, their ratio, the ratio's range over the repetitions. `process seconds` and `peak MiB` are those of the whole
process, its children included. Rows are added to results/before_after.csv under the name of the run.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import DATA, ROOT, commit_of, with_earlier, write_csv

AFTER = ROOT.parent
STAMP = ("threads", "torch", "freed_memory", "machine", "date", "commit")
PROCESS = "whole process"
Numbers = dict[tuple[str, str], float]
"""(row, column) -> value."""


def run_once(checkout: Path, command: Sequence[str]) -> Numbers:
    """The numbers of the table that one run of a checkout's script writes, and of its process."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "benchmarks"
        shutil.copytree(checkout / "benchmarks", copy, ignore=shutil.ignore_patterns(".cache", "__pycache__"))
        shutil.rmtree(copy / "results")
        environment = os.environ | {
            "PYTHONPATH": str(checkout / "src"),
            "TTMPD_DATA": str(DATA),
            "TTMPD_CACHE": str(Path(folder) / "cache"),
        }
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=copy, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"{' '.join(command)} in {checkout} must end with 0, but got {os.waitstatus_to_exitcode(status)}")
        numbers: Numbers = {(PROCESS, "process seconds"): seconds, (PROCESS, "peak MiB"): usage.ru_maxrss / 1024}
        for table in sorted((copy / "results").glob("*.csv")):
            numbers |= numbers_of(table)
        return numbers


def numbers_of(table: Path) -> Numbers:
    """(row, column) -> number, a row named by its table and its columns of text."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers: Numbers = {}
    for count, row in enumerate(rows):
        values = {key: float(value) for key, value in row.items() if key not in STAMP and is_number(value)}
        texts = [value for key, value in row.items() if key not in STAMP and value and not is_number(value)]
        name = " ".join([table.stem, *(text for text in texts if not text.startswith(("{", "["))), f"#{count}"])
        numbers |= {(name, key): value for key, value in values.items()}
    return numbers


def is_number(value: str | None) -> bool:
    """Whether a cell holds a number."""
    try:
        float(value or "")
    except ValueError:
        return False
    return True


def compared(name: str, before: Sequence[Numbers], after: Sequence[Numbers]) -> list[dict[str, Any]]:
    """A row per number that both have."""
    rows = []
    for key in before[0]:
        if all(key in run for run in (*before, *after)):
            old, new = [run[key] for run in before], [run[key] for run in after]
            ratios = [b / a if a else float("nan") for a, b in zip(old, new, strict=True)]
            rows.append(
                {
                    "run": name,
                    "row": key[0],
                    "column": key[1],
                    "repetitions": len(old),
                    "before": round(statistics.median(old), 4),
                    "after": round(statistics.median(new), 4),
                    "ratio": round(statistics.median(ratios), 4),
                    "ratio_low": round(min(ratios), 4),
                    "ratio_high": round(max(ratios), 4),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the commit to compare with")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("command", nargs="+", help="behind --: a script of this folder, with its options")
    args = parser.parse_args()
    before: list[Numbers] = []
    after: list[Numbers] = []
    for repetition in range(args.repeat):
        pair = ((args.before.resolve(), before), (AFTER, after))
        for checkout, runs in pair if repetition % 2 == 0 else pair[::-1]:
            runs.append(run_once(checkout, args.command))
    rows = compared(" ".join(args.command), before, after)
    commits = f"{commit_of(args.before)} to {commit_of(AFTER)}"
    rows = [row | {"commits": commits} for row in rows]
    for row in rows:
        print(f"{row['row'][:60]:60} {row['column'][:24]:24} {row['before']:>12} {row['after']:>12} {row['ratio']:>8}")
    print(write_csv("before_after.csv", with_earlier("before_after.csv", rows, ("run", "row", "column"))))


if __name__ == "__main__":
    main()
