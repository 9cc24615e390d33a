"""What becomes of freed memory: what a pass takes and how far the process grows.

    python benchmarks/freed_memory.py          # about five minutes

Forward passes in eager PyTorch of a model and of the same model with folded batch norms and channels last, in turn, as
latency is timed. Each setting in a process of its own, the settings taking turns: "returned" is glibc's default, "kept"
is after `ttmpd.keep_freed_memory()`, "kept, no small blocks" with glibc's cache of small blocks off besides, by the
environment variable GLIBC_TUNABLES=glibc.malloc.tcache_count=0. The commands of this package keep freed memory.
Milliseconds of the model as it is, median of the passes, and page faults of the last one of both; three rounds.
Writes results/freed_memory.csv. Run it on an idle machine; on a CPU with glibc.
"""

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from common import DATA, require_data, write_csv

CASES = (("resnet56", 32, 64, 20), ("resnet56", 32, 1, 100), ("mobilenet_v2", 224, 64, 9), ("mobilenet_v2", 224, 1, 50))
"""Model, side, batch, passes."""
SETTINGS = ("returned", "kept", "kept, no small blocks")
ROUNDS = 3

PROBE = """
import json, resource, statistics, sys, time, torch, ttmpd
from ttmpd.surgery.lossless import applied, foldable
from ttmpd.records import Lossless
name, side, size, passes, kept, source = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5] != "returned", sys.argv[6]
if kept:
    assert ttmpd.keep_freed_memory()
model = ttmpd.open_model(f"{source}:{name}").module.eval()
batch, ms = torch.randn(size, 3, side, side), []
twin = applied(model, Lossless(foldable(model, batch[:2]), channels_last=True))
with torch.no_grad():
    for _ in range(passes):
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        model(batch)
        ms.append(1e3 * (time.perf_counter() - start))
        twin(batch)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([statistics.median(ms[2:]), usage.ru_minflt - faults, usage.ru_maxrss / 1024]))
"""


def probe(name: str, side: int, batch: int, passes: int, setting: str) -> list[float]:
    """[ms, page faults of the last passes, peak MiB] in a fresh process."""
    command = [sys.executable, "-c", PROBE, name, str(side), str(batch), str(passes), setting, str(DATA / "zoo.py")]
    off = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"} if "small" in setting else {}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | off)
    found: list[float] = json.loads(done.stdout)
    return found


def main() -> None:
    require_data("zoo.py")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        found = [(setting, *probe(*case, setting)) for _ in range(ROUNDS) for setting in SETTINGS]
        for setting in SETTINGS:
            ms, faults, peak = zip(*[row[1:] for row in found if row[0] == setting], strict=True)
            rows.append(
                {
                    "model": case[0],
                    "batch": case[2],
                    "freed_memory": setting,
                    "ms": round(statistics.median(ms), 1),
                    "ms_low": round(min(ms), 1),
                    "ms_high": round(max(ms), 1),
                    "page_faults": round(statistics.median(faults)),
                    "peak_mib": round(statistics.median(peak)),
                    "peak_mib_high": round(max(peak)),
                    "rounds": ROUNDS,
                }
            )
            print(rows[-1], flush=True)
    print(write_csv("freed_memory.csv", rows))


if __name__ == "__main__":
    main()
