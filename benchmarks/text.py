"""Transformers on SST-2 without labels: KCM, TT-MPD, magnitude and random on the same sentences.

    python benchmarks/text.py                     # about an hour on two cores; rows are kept as they are finished
    python benchmarks/text.py --part macs         # shares of the multiply-accumulates alone
    python benchmarks/text.py --part latency      # TT-MPD at the latency that each of KCM's students has

`minilm_sst2` (6 layers, width 384), 512 unlabelled sentences: training phrases of at least five words; accuracy on the
test split (1,821). Shares of the MACs: 0.8, 0.7, 0.6, 0.5 and 0.4. KCM as published: neurons alone, rescaled, nothing
is trained. Random and magnitude choose among the same neurons by other scores, the layers behind them are fitted again.
TT-MPD chooses from blocks, heads, neurons or all of them, repairs and distills; it is asked for the speedup that KCM's
student has, less 2 %, which is measured anew before each run (`asked`). Everything is timed on the same batch of 32, at
the end once more on its first sentence alone, side by side with KCM's student: `latency_ratio` is the student's
milliseconds over KCM's. Do the part `latency` on an idle machine. Writes results/text.csv and text.png.
"""

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common import CACHE, DATA, RESULTS, cached, require_data, with_earlier, write_csv
from ttmpd.artifact.read import load
from ttmpd.data.tokenization import Tokenization, trim_padding
from ttmpd.distill.one_time import OneTime
from ttmpd.latency.timing import time_models
from ttmpd.models.macs import count_macs
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.calibration import open_calibration
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import evaluate
from ttmpd.pipeline.preparation import latency_batch
from ttmpd.pipeline.settings import settings_of
from ttmpd.plan.knapsack import Knapsack
from ttmpd.score.kcm import KCM
from ttmpd.score.magnitude import Magnitude
from ttmpd.score.random import Random
from ttmpd.score.ttmpd import TTMPD

MODEL = "minilm_sst2"
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4)
N, EQUAL, BATCH = 512, 0.02, 32
PRECISION = 0.01
"""To which the ratio of two models' milliseconds is known before a student is asked for, or 40 seconds have passed."""
ONCE = Knapsack(step=1.0)
UNTRAINED: dict[str, Any] = {"plan": ONCE, "distill": OneTime(steps=0), "units": ("neuron",)}
BY_MACS: dict[str, dict[str, Any]] = {
    "kcm": UNTRAINED | {"score": KCM()},
    "kcm, heads too": UNTRAINED | {"score": KCM(), "units": ("head", "neuron")},
    "magnitude": UNTRAINED | {"score": Magnitude()},
    "random": UNTRAINED | {"score": Random()},
    "ttmpd, neurons, no training": UNTRAINED | {"score": TTMPD()},
}
BY_LATENCY: dict[str, dict[str, Any]] = {
    "ttmpd, all": {"score": TTMPD()},
    "ttmpd, heads and neurons": {"score": TTMPD(), "units": ("head", "neuron")},
    "ttmpd, blocks": {"score": TTMPD(), "units": ("block",)},
    "ttmpd, all, no training": {"score": TTMPD(), "distill": OneTime(steps=0)},
}


def sentences() -> list[str]:
    """Training phrases of at least five words: many of the shorter ones are parts of others."""
    with gzip.open(DATA / "sst2" / "train.tsv.gz", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    column = lines[0].index("sentence")
    return [line[column].strip() for line in lines[1:] if len(line[column].split()) >= 5]


@functools.cache
def opened() -> OpenedModel:
    return open_model(f"hf:{DATA / MODEL}")


def timed_batch(seed: int) -> torch.Tensor:
    """The very batch on which `compress` times: other sentences are longer or shorter, and lengths move ratios."""
    settings = settings_of({"num_samples": N, "batch_size": BATCH, "seed": seed})
    samples = open_calibration(sentences(), opened(), settings).fit
    return latency_batch(opened().module, samples, settings)


def students(part: str, seed: int, share: float, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One student: for a share of the MACs, or for the latency that KCM's student for that share has."""
    folder = CACHE / "text" / f"{part}-{name}-{share}-{seed}"
    batch = timed_batch(seed)
    target: dict[str, Any] = (
        {"macs": share} if part == "macs" else {"speedup": (1 - EQUAL) * speedup_of_kcm(seed, share, batch)}
    )
    start = time.perf_counter()
    result = compress(
        opened(), sentences(), num_samples=N, batch_size=BATCH, seed=seed, output=folder, **target, **settings
    )
    seconds = time.perf_counter() - start
    assert result.report.samples.input_shape == tuple(batch.shape[1:])  # it timed what is timed here
    test = str(DATA / "sst2" / "test.tsv")
    found = evaluate(dataclasses.replace(opened(), module=result.model), test, test).model
    assert found.accuracy is not None
    row: dict[str, Any] = {
        "model": MODEL, "part": part, "share": share, "method": name, "seed": seed,
        "macs": round(count_macs(result.model, batch)[""] / count_macs(opened().module, batch)[""], 3),
        "accuracy": round(100 * found.accuracy.share, 2), "seconds": round(seconds, 1),
    }  # fmt: skip
    row["asked"] = round(target["speedup"], 3) if part == "latency" else ""
    stages = {f"{name}_seconds": round(spent, 1) for name, spent in result.report.seconds.items()}
    row |= {"attempts": len(result.report.attempts)} | stages
    return row | timed(result.model, load(folder_of_kcm(seed, share)), batch)


def timed(student: torch.nn.Module, kcm: torch.nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Speedups at batch 1 and 32, interleaved with the original and with KCM's student for the same share."""
    row: dict[str, float] = {}
    for size in (1, BATCH):
        models = {"original": opened().module, "kcm": kcm, "student": student}
        texts = opened().preprocessing
        assert isinstance(texts, Tokenization)
        few = trim_padding(batch[:size], texts.padding)
        rounds = time_models(models, few, rounds=15, min_seconds=2.0, max_seconds=10.0)
        ratio, against = rounds.ratio("original", "student"), rounds.ratio("student", "kcm")
        prefix = "" if size == BATCH else "batch1_"
        row |= {f"{prefix}speedup": ratio.median_ms, f"{prefix}low": ratio.low_ms, f"{prefix}high": ratio.high_ms}
        row[f"{prefix}latency_ratio"] = against.median_ms
    return {name: round(value, 3) for name, value in row.items()}


def folder_of_kcm(seed: int, share: float) -> Path:
    return CACHE / "text" / f"macs-kcm-{share}-{seed}"


def speedup_of_kcm(seed: int, share: float, batch: torch.Tensor) -> float:
    """KCM's student for a share has to be there before the others can be asked for its latency."""
    folder = folder_of_kcm(seed, share)
    if not (folder / "report.json").exists():
        sys.exit(f"{folder.name} is missing: run --part macs first")
    models = {"original": opened().module, "kcm": load(folder)}
    return time_models(models, batch, max_seconds=20.0, precision=PRECISION).ratio("original", "kcm").median_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("macs", "latency"), nargs="+", default=("macs", "latency"))
    parser.add_argument("--share", type=float, nargs="+", choices=SHARES, default=SHARES)
    parser.add_argument("--seed", type=int, nargs="+", default=(0,))
    parser.add_argument("--only", nargs="+", default=[], help="names of methods")
    args = parser.parse_args()
    require_data(f"{MODEL}/config.json", "sst2/train.tsv.gz", "sst2/test.tsv")
    for part in args.part:
        methods = BY_MACS if part == "macs" else BY_LATENCY
        for seed, share, (name, settings) in itertools.product(args.seed, args.share, methods.items()):
            if not args.only or name in args.only:
                key = f"text_rows/{part}-{share}-{name}-{seed}"
                print(
                    cached(key, functools.partial(students, part, seed, share, name, settings), stamped=True),
                    flush=True,
                )
    rows = [json.loads(path.read_text()) for path in sorted(Path(CACHE, "text_rows").glob("*.json"))]
    rows = with_earlier("text.csv", rows, ("model", "part", "share", "method", "seed"))
    print(write_csv("text.csv", rows))
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy over measured speedup, one line per method, the mean of all seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["method"] for row in rows):
        own = sorted((float(r["speedup"]), float(r["accuracy"])) for r in rows if r["method"] == name)
        axes.plot(*zip(*own, strict=True), "o-", label=name)
    axes.set(xlabel="times as fast as the original (batch 32)", ylabel="accuracy on the test split, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "text.png", dpi=120)


if __name__ == "__main__":
    main()
