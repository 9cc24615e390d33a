"""The same call on a GPU: what is removed when a pass is bound by its launches, and when it is bound by its sums.

    python benchmarks/on_gpu.py

ResNet-56 on CIFAR-10-JPEG (500 images) and MiniLM on SST-2 (512 phrases), at batch 1 and at batch 64 and 1,024, speedup
1.5, default settings. Accuracy on images that were not among the samples (as many as lie in the file), and on the test
split. Writes results/on_gpu.csv. Run it on an idle machine.
"""

import argparse
import collections
import dataclasses
import functools
import time
from typing import Any

import torch

from common import DATA, cached, cifar, require_data, with_earlier, write_csv
from text import sentences
from ttmpd.models.open import open_model
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import evaluate

SPEEDUP = 1.5
CASES = (("resnet56", 1), ("resnet56", 64), ("resnet56", 1024), ("minilm_sst2", 1), ("minilm_sst2", 64))
N = {"resnet56": 500, "minilm_sst2": 512}


def run(model: str, batch_size: int, seed: int) -> dict[str, Any]:
    """One row."""
    if model == "resnet56":
        pixels, labels = cifar()
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed)).numpy()
        few, rest = order[: N[model]], order[N[model] :]
        opened, samples = open_model(f"{DATA / 'zoo.py'}:resnet56"), pixels[few]
        test: tuple[Any, Any] = (pixels[rest], labels[rest].tolist())
    else:
        opened, samples = open_model(f"hf:{DATA / model}"), sentences()
        test = (str(DATA / "sst2" / "test.tsv"),) * 2
    start = time.perf_counter()
    result = compress(
        opened, samples, num_samples=N[model], speedup=SPEEDUP, batch_size=batch_size, device="cuda", seed=seed
    )
    seconds = time.perf_counter() - start
    found = evaluate(dataclasses.replace(opened, module=result.model), *test, against=opened, device="cuda")
    assert found.model.accuracy is not None
    assert found.against is not None
    assert found.against.accuracy is not None
    latency = result.report.latency
    assert latency is not None
    speedup, lossless = latency.speedup, latency.lossless
    kinds = collections.Counter(removal.unit.kind for removal in result.plan.removals)
    return {
        "model": model, "batch_size": batch_size, "seed": seed, "asked": SPEEDUP, "met": result.met,
        "speedup": round(speedup.median, 3), "low": round(speedup.low, 3), "high": round(speedup.high, 3),
        "lossless_speedup": round(lossless.speedup if lossless else 1.0, 3),
        "original_ms": round(latency.original.median_ms, 3),
        "accuracy": round(100 * found.model.accuracy.share, 2),
        "original_accuracy": round(100 * found.against.accuracy.share, 2), "n_test": found.n_samples,
        "removed_or_narrowed": " ".join(f"{kind}:{count}" for kind, count in kinds.items()),
        "seconds": round(seconds, 1),
    } | {f"{name}_seconds": round(spent, 1) for name, spent in result.report.seconds.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs="+", default=range(len(CASES)), help="numbers in CASES")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device must be there, but there is none")
    require_data("zoo.py", "cifar10_jpeg/test.npz", "minilm_sst2/config.json", "sst2/train.tsv.gz", "sst2/test.tsv")
    rows = []
    for model, batch_size in (CASES[number] for number in args.case):
        key = f"on_gpu/{model}-{batch_size}-{args.seed}"
        rows.append(cached(key, functools.partial(run, model, batch_size, args.seed), stamped=True))
        print(rows[-1], flush=True)
    print(write_csv("on_gpu.csv", with_earlier("on_gpu.csv", rows, ("model", "batch_size", "seed"))))


if __name__ == "__main__":
    main()
