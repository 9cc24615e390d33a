"""KCM on handwritten digits: does every part of it help?

    python benchmarks/kcm_digits.py        # a few minutes

An MLP 64-512-512-10 (GELU) trained on half of scikit-learn's digits; of the 512 hidden neurons of each layer 352, 256,
192 or 96 are kept by 500 unlabelled training samples, nothing is trained afterwards; accuracy on the other half of the
data, five seeds. R2D2 with its rescaling, R2D2, D2 alone, the norm of the outgoing weights, random, and, beside the
published method, R2D2 with the layers fitted again. Writes results/kcm_digits.csv, the means of all seeds as `seed`
"mean" among them, and says which of the published orders hold.
"""

import argparse
import itertools
import statistics
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from common import write_csv
from ttmpd.data.samples import Samples
from ttmpd.models.run import predict
from ttmpd.records import RefitScope, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.score.base import Scorer
from ttmpd.score.kcm import KCM
from ttmpd.score.magnitude import Magnitude
from ttmpd.score.random import Random
from ttmpd.surgery.cut import cut
from ttmpd.surgery.units.neuron import Neuron

WIDTHS, SEEDS, N = (352, 256, 192, 96), (0, 1, 2, 3, 4), 500
NEURONS = Neuron(last=True)
METHODS: dict[str, tuple[Scorer, Literal["none"] | RefitScope]] = {
    "r2d2 + scaling": (KCM(), "rescale"),
    "r2d2": (KCM(), "none"),
    "d2": (KCM(parts="d2"), "none"),
    "magnitude": (Magnitude(), "none"),
    "random": (Random(), "none"),
    "r2d2 + refit": (KCM(), "removed_only"),
}
ORDER = ("r2d2 + scaling", "r2d2", "d2", "magnitude", "random")


def trained(seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """(model, training inputs, test inputs, test labels)."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        for index in torch.split(train[torch.randperm(len(train))], 64):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval(), x[train], x[test], y[test]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((predict(model, x).argmax(-1) == y).float().mean())


def rows(seed: int) -> list[dict[str, Any]]:
    """One row per method and share."""
    model, train, x, y = trained(seed)
    samples = Samples(train[:N], tuple(map(str, range(len(train[:N])))))
    units = NEURONS.find(model, samples.batch(slice(0, 2))).units
    found = [{"seed": seed, "method": "original", "kept": 512, "accuracy": round(accuracy(model, x, y), 2)}]
    for name, (scorer, repair) in METHODS.items():
        scores = scorer.score(model, units, samples, seed=seed)
        kept = {(score.unit_id, len(score.kept)): score.kept for score in scores}
        for width in WIDTHS:
            chosen = {unit.id: kept[unit.id, width] for unit in units}
            removals = [Removal(unit, "narrow", chosen[unit.id]) for unit in units if unit.id in chosen]
            student = (
                cut(model, removals)
                if repair == "none"
                else repaired(model, removals, samples, refit_scope=repair, sensitivity=0.0)
            )
            row = {"seed": seed, "method": name, "kept": width, "accuracy": round(accuracy(student, x, y), 2)}
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table = [row for seed in SEEDS for row in rows(seed)]
    means = []
    for method in ("original", *METHODS):
        for width in dict.fromkeys(row["kept"] for row in table if row["method"] == method):
            values = [row["accuracy"] for row in table if (row["method"], row["kept"]) == (method, width)]
            mean, spread = statistics.mean(values), statistics.stdev(values)
            means.append(
                {"seed": "mean", "method": method, "kept": width, "accuracy": round(mean, 2), "stdev": round(spread, 2)}
            )
    print(write_csv("kcm_digits.csv", [*means, *table]))
    by = {(row["method"], row["kept"]): row["accuracy"] for row in means}
    for row in means:
        print(row)
    for better, worse in itertools.pairwise(ORDER):
        holds = [width for width in WIDTHS if by[better, width] >= by[worse, width]]
        print(f"{better} >= {worse}: holds at {holds}, fails at {sorted(set(WIDTHS) - set(holds))}")


if __name__ == "__main__":
    main()
