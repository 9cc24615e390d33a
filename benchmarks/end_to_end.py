"""The two commands of the README on real models: seconds, peak memory, measured speedup, accuracy.

    python benchmarks/end_to_end.py

Runs `ttmpd compress` and `ttmpd evaluate` as a user does, each in a process of its own, for ResNet-56 on
CIFAR-10-JPEG (500 images, speedup 1.8) and MobileNetV2 on the ImageNet sample (500 and 1,000 images, speedup 1.3);
once more each by removal alone (`--no-lossless`), and at speedups of 2.5 and 2.
Accuracy is measured on the images that were not among the unlabelled samples; the run on all 1,000 images leaves none
and reports memory only.
Writes results/end_to_end.csv.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import DATA, cached, require_data, with_earlier, write_csv

IMAGES, LABELS = "imagenet_sample/images", "imagenet_sample/labels.csv"
JPEG = "cifar10_jpeg/test.npz"
CASES = (
    ("resnet56", JPEG, JPEG, 500, 1.8, ()),
    ("mobilenet_v2", IMAGES, LABELS, 500, 1.3, ()),
    ("mobilenet_v2", IMAGES, "", 1000, 1.3, ()),
    ("resnet56", JPEG, JPEG, 500, 1.8, ("--no-lossless",)),
    ("mobilenet_v2", IMAGES, LABELS, 500, 1.3, ("--no-lossless",)),
    ("mobilenet_v2", IMAGES, LABELS, 500, 2.0, ()),
    ("resnet56", JPEG, JPEG, 500, 2.5, ()),
    ("mobilenet_v2", IMAGES, "", 1000, 2.0, ()),
)


def ttmpd(*arguments: str) -> tuple[int, float, float]:
    """(exit code, seconds, peak MiB) of one command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "ttmpd.cli.app", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss / 1024


def run(
    model: str, data: str, labels: str, n: int, speedup: float, options: Sequence[str], folder: Path
) -> dict[str, Any]:
    """One row."""
    source, out = f"{DATA / 'zoo.py'}:{model}", folder / "-".join((model, str(n), str(speedup), *options))
    code, seconds, peak = ttmpd(
        "compress", "--model", source, "--data", str(DATA / data), "--num-samples", str(n), "--speedup", str(speedup),
        "--output", str(out), *options,
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    latency = report["latency"]
    lossless = (latency.get("lossless") or {}).get("speedup", latency.get("lossless_speedup", 1.0))  # before format 2
    row: dict[str, Any] = {
        "model": model,
        "options": " ".join(options),
        "n_samples": n,
        "asked_speedup": speedup,
        "seed": report["seed"],
        "exit_code": code,
        "speedup": round(latency["speedup"]["median"], 3),
        "speedup_low": round(latency["speedup"]["low"], 3),
        "speedup_high": round(latency["speedup"]["high"], 3),
        "lossless_speedup": round(lossless, 3),
        "removed": sum(unit["action"] != "keep" for unit in report["units"]),
        "predicted_ms": round(latency["predicted_ms"], 2),
        "measured_ms": round(latency["compressed"]["median_ms"], 2),
        "seconds_whole_process": round(seconds, 1),
        "seconds_stages": round(sum(report["seconds"].values()), 1),
        "stages": json.dumps({name: round(value, 1) for name, value in report["seconds"].items()}),
        "peak_mib": round(peak),
    }
    if labels:
        found = folder / "evaluation.json"
        ttmpd(
            "evaluate", "--model", str(out), "--source", source, "--against", source, "--data", str(DATA / data),
            "--labels", str(DATA / labels), "--json", str(found),
        )  # fmt: skip
        quality = json.loads(found.read_text())
        row |= {
            "accuracy": round(100 * quality["model"]["accuracy"]["share"], 2),
            "original_accuracy": round(100 * quality["against"]["accuracy"]["share"], 2),
            "agreement": round(100 * quality["agreement"]["share"], 2),
            "n_test": quality["n_samples"],
            "n_left_out": quality["n_left_out"],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs="+", default=range(len(CASES)), help="0 to 7: see CASES")
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz", "imagenet_sample/labels.csv")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in args.case:
            model, data, labels, n, speedup, options = CASES[number]
            run_case = functools.partial(run, model, data, labels, n, speedup, options, Path(folder))
            rows.append(cached(f"end_to_end/{number}", run_case, stamped=True))
            print(rows[-1], flush=True)
    about = ("model", "options", "n_samples", "asked_speedup", "seed")
    print(write_csv("end_to_end.csv", with_earlier("end_to_end.csv", rows, about)))


if __name__ == "__main__":
    main()
