"""What it costs when freed memory goes back to the system after every layer, as it does by default.

    python benchmarks/freed_memory.py

Forward passes of a batch of 64 in eager PyTorch, each setting in a process of its own, the settings taking turns:
"returned" is glibc's default, "kept" is after `ttmpd.keep_freed_memory()`, which the commands of this package call.
Page faults and the milliseconds, median of 7 passes; three rounds.
Writes results/freed_memory.csv. Run it on an idle machine; on a CPU with glibc.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

from common import DATA, require_data, write_csv

MODELS = {"resnet56": 32, "mobilenet_v2": 224}
ROUNDS = 3

PROBE = """
import json, resource, statistics, sys, time, torch, ttmpd
name, side, kept, source = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kept", sys.argv[4]
if kept:
    assert ttmpd.keep_freed_memory()
model = ttmpd.open_model(f"{source}:{name}").module.eval()
batch, ms = torch.randn(64, 3, side, side), []
with torch.no_grad():
    for _ in range(9):
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        model(batch)
        ms.append(1e3 * (time.perf_counter() - start))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([statistics.median(ms[2:]), usage.ru_minflt - faults, usage.ru_maxrss / 1024]))
"""


def probe(name: str, setting: str) -> list[float]:
    """[ms, page faults of the last pass, peak MiB] in a fresh process."""
    command = [sys.executable, "-c", PROBE, name, str(MODELS[name]), setting, str(DATA / "zoo.py")]
    found: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    require_data("zoo.py")
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        found = [(setting, *probe(name, setting)) for _ in range(ROUNDS) for setting in ("returned", "kept")]
        for setting in ("returned", "kept"):
            ms, faults, peak = zip(*[row[1:] for row in found if row[0] == setting], strict=True)
            rows.append(
                {
                    "model": name,
                    "batch": 64,
                    "freed_memory": setting,
                    "ms": round(statistics.median(ms), 1),
                    "ms_low": round(min(ms), 1),
                    "ms_high": round(max(ms), 1),
                    "page_faults_per_pass": round(statistics.median(faults)),
                    "peak_mib": round(statistics.median(peak)),
                    "rounds": ROUNDS,
                }
            )
            print(rows[-1], flush=True)
    print(write_csv("freed_memory.csv", rows))


if __name__ == "__main__":
    main()
