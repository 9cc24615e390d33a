"""Few and unequal classes: does adaptation do harm where nothing shifted, and gain where something did?

    python benchmarks/class_mixtures.py --part adapt                         # norm, on both models
    python benchmarks/class_mixtures.py --part adapt --method tent eata eata_c --model resnet20
    python benchmarks/class_mixtures.py --part compress                      # students 1.5 times as fast

CIFAR-10 test images 5,000 to 9,999 (what was tuned was tuned on the first 5,000, under other shifts): clean, after JPEG
compression (a set of its own), and under five shifts of severity 5, in seven mixtures of classes. 400 unlabelled images
to adapt to, half of them where a single class has no more; accuracy of the original and of the adapted model on up to
1,000 other images of the same mixture. In a long tail the largest class is so many times the smallest, classes in an
order drawn by the seed. Every cell is kept on disk as it is finished.
Writes results/class_mixtures.csv and prints it as tables for docs/shifts.md.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from common import CACHE, DATA, ROOT, cached, cifar, commit_of, require_data, with_earlier, write_csv
from ttmpd.adapt.base import Adapter
from ttmpd.data.corruptions import CORRUPTIONS, corrupted
from ttmpd.data.open import open_samples
from ttmpd.method import method_of
from ttmpd.models.modules import clone, to_fast_format
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import evaluate

N_CLASSES, FIRST, N_FIT, N_TEST, SEVERITY, SPEEDUP = 10, 5000, 400, 1000, 5, 1.5
SHIFTS = ("clean", "jpeg_set", "gaussian_noise", "contrast", "defocus_blur", "fog", "pixelate")
VEHICLES, PETS, CAT = (0, 1, 8, 9), (3, 5), 3
MIXTURES = ("balanced", "tail3", "tail10", "tail100", "vehicles", "pets", "cats")
COLUMNS = ("part", "model", "shift", "mixture", "seed", "method")

Arrays = tuple[np.ndarray, np.ndarray]


def shares(mixture: str, rng: np.random.Generator) -> np.ndarray:
    """(10,) share of each class."""
    if mixture.startswith("tail"):
        weights = float(mixture.removeprefix("tail")) ** -(rng.permutation(N_CLASSES) / (N_CLASSES - 1))
    else:
        classes = {"balanced": range(N_CLASSES), "vehicles": VEHICLES, "pets": PETS, "cats": (CAT,)}[mixture]
        weights = np.isin(np.arange(N_CLASSES), list(classes)).astype(float)
    return np.asarray(weights / weights.sum())


def drawn(labels: np.ndarray, mixture: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions to adapt to, positions to test on), each in the same mixture."""
    rng = np.random.default_rng(seed)
    share = shares(mixture, rng)
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(N_CLASSES)]
    most = min(len(pool) / part for pool, part in zip(pools, share, strict=True) if part)
    n_fit = int(min(N_FIT, most / 2))
    n_test = int(min(N_TEST, most - n_fit - N_CLASSES))
    counts = [np.maximum(1, np.rint(n * share)).astype(int) * (share > 0) for n in (n_fit, n_test)]
    fit = np.concatenate([pool[:n] for pool, n in zip(pools, counts[0], strict=True)])
    test = np.concatenate([pool[a : a + b] for pool, a, b in zip(pools, *counts, strict=True)])
    return rng.permutation(fit), rng.permutation(test)


@functools.cache
def images(shift: str, mixture: str, seed: int) -> tuple[np.ndarray, Arrays]:
    """(pixels to adapt to, (pixels, labels) to test on)."""
    pixels, labels = (values[FIRST:] for values in cifar("cifar10_jpeg" if shift == "jpeg_set" else "cifar10"))
    fit, test = drawn(labels, mixture, seed)
    both = pixels[np.concatenate([fit, test])]
    if shift in CORRUPTIONS:
        both = corrupted(both, shift, SEVERITY, seed)
    return both[: len(fit)], (both[len(fit) :], labels[test])


def accuracy(model: torch.nn.Module, test: Arrays, opened: OpenedModel) -> float:
    """In percent."""
    measured = evaluate(dataclasses.replace(opened, module=model), test[0], test[1].tolist()).model.accuracy
    assert measured is not None
    return round(100 * measured.share, 2)


def compared(model: str, shift: str, mixture: str, seed: int, result: torch.nn.Module) -> dict[str, Any]:
    """Accuracy of the original and of what was made of it."""
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    fit, test = images(shift, mixture, seed)
    before, after = (accuracy(net, test, opened) for net in (opened.module, result))
    return {
        "n_fit": len(fit), "n_test": len(test[0]), "original": before, "accuracy": after,
        "gain": round(after - before, 2), "commit": commit_of(ROOT),
    }  # fmt: skip


def adapted(model: str, shift: str, mixture: str, seed: int, method: str) -> dict[str, Any]:
    """One adapted model."""
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    samples = open_samples(images(shift, mixture, seed)[0], opened.preprocessing)
    adapter = cast(Adapter, method_of("adapt", method))
    start = time.perf_counter()
    result = adapter.adapt(to_fast_format(clone(opened.module).eval()), samples, seed=seed)
    seconds = round(time.perf_counter() - start, 2)
    row = {"part": "adapt", "model": model, "shift": shift, "mixture": mixture, "seed": seed, "method": method}
    facts = {name: round(value, 3) for name, value in result.facts.items()}
    return row | compared(model, shift, mixture, seed, result.model) | {"seconds": seconds} | facts


def compressed(model: str, shift: str, mixture: str, seed: int, method: str) -> dict[str, Any]:
    """One student."""
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    fit, _ = images(shift, mixture, seed)
    result = compress(
        opened,
        fit,
        speedup=SPEEDUP,
        num_samples=len(fit),
        seed=seed,
        adapt=method,
    )
    assert result.report.latency is not None
    row = {"part": "compress", "model": model, "shift": shift, "mixture": mixture, "seed": seed, "method": method}
    measured = {
        "speedup": round(result.report.latency.speedup.median, 3),
        "seconds": round(sum(result.report.seconds.values()), 1),
    }
    return row | compared(model, shift, mixture, seed, result.model) | measured


def finished(part: str) -> list[dict[str, Any]]:
    """All rows of a part that are on disk."""
    return [json.loads(path.read_text()) for path in sorted(Path(CACHE, "class_mixtures", part).glob("*.json"))]


def shown(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each part, model and method: original -> result, by shift and mixture."""
    lines = []
    for head, group in itertools.groupby(rows, lambda row: (row["part"], row["model"], row["method"])):
        cells = {(row["shift"], row["mixture"]): f"{row['original']:.1f} → {row['accuracy']:.1f}" for row in group}
        lines += ["", " ".join(head), "", f"| | {' | '.join(MIXTURES)} |", "|---" * (len(MIXTURES) + 1) + "|"]
        for shift in SHIFTS:
            lines.append(f"| `{shift}` | {' | '.join(cells.get((shift, mixture), '–') for mixture in MIXTURES)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("adapt", "compress"), nargs="+", required=True)
    parser.add_argument("--model", nargs="+", default=("resnet20", "resnet56"))
    parser.add_argument("--shift", nargs="+", choices=SHIFTS, default=SHIFTS)
    parser.add_argument("--mixture", nargs="+", choices=MIXTURES, default=MIXTURES)
    parser.add_argument("--method", nargs="+", default=("norm",), help="adapters")
    parser.add_argument("--seed", type=int, nargs="+", default=(0,))
    args = parser.parse_args()
    require_data("zoo.py", "cifar10/test.npz", "cifar10_jpeg/test.npz")
    for part in args.part:
        compute = adapted if part == "adapt" else compressed
        for cell in itertools.product(args.model, args.shift, args.mixture, args.seed, args.method):
            key = f"class_mixtures/{part}/{'-'.join(map(str, cell))}"
            print(cached(key, functools.partial(compute, *cell), stamped=True), flush=True)
    rows = [row for part in ("adapt", "compress") for row in finished(part)]
    rows.sort(key=lambda row: [str(row[column]) for column in ("part", "model", "method", "shift", "mixture", "seed")])
    print(write_csv("class_mixtures.csv", with_earlier("class_mixtures.csv", rows, COLUMNS)))
    print(shown(rows))


if __name__ == "__main__":
    main()
