"""What to keep after training: its end, its start, or weights in between?

    python benchmarks/kept_weights.py          # about 20 minutes on one core; rows are kept as they are finished

ResNet-56 and ResNet-20 on CIFAR-10 test images, clean and under three shifts, with seeds on which no result is
reported: made faster by removal alone, trained to the end whatever a check says, and measured on 2,500 other images
with several shares of the repaired weights in the trained ones. Beside it what the 75 held-out samples say: agreement
with the teacher, and the divergence by which a start is told from an end.
Writes results/kept_weights.csv.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from common import DATA, cached, require_data, write_csv
from ttmpd import compress
from ttmpd.data.corruptions import corrupted
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.distill.base import FitContext
from ttmpd.distill.one_time import OneTime
from ttmpd.models.modules import clone
from ttmpd.models.open import open_model
from ttmpd.models.run import predictions_of
from ttmpd.training.held_out import held_out_check, mixture
from ttmpd.training.loop import TrainingResult
from ttmpd.training.teacher_outputs import TeacherOutputs

CASES = (
    ("resnet56", "pixelate", 3, 0.55, 11),
    ("resnet56", "gaussian_noise", 2, 0.55, 12),
    ("resnet20", "contrast", 3, 0.65, 13),
    ("resnet56", "clean", 0, 0.8, 14),
)
SHARES = (1.0, 0.5, 0.25, 0.0)
N_FIT, N_TEST = 500, 2500


def probe(accuracy: Callable[[nn.Module], float], seen: dict[str, float]) -> OneTime:
    """The usual training without a check on the way; notes what lies between its start and its end."""

    class Probe(OneTime):
        def fit(
            self, student: nn.Module, samples: Samples, held_out: Samples, targets: TeacherOutputs, context: FitContext
        ) -> TrainingResult:
            start = {name: value.clone() for name, value in student.state_dict().items()}
            fit = super().fit(student, samples, held_out.first(0), targets, context)
            ends = student.state_dict()
            for share in SHARES:
                between = clone(student)
                between.load_state_dict(mixture(ends, start, share))
                check = held_out_check(between, held_out, targets, context.batch_size)
                assert check is not None
                said = check()
                seen[f"{share:g} of start"] = round(accuracy(between), 2)
                seen[f"{share:g}, held-out agreement"] = round(said.agreement, 3)
                seen[f"{share:g}, held-out loss"] = round(said.loss, 3)
            return fit

    return Probe(seconds=0.0)


def row(model: str, shift: str, severity: int, share: float, seed: int) -> dict[str, Any]:
    """One student, measured along the line from its start to its end."""
    with np.load(DATA / "cifar10" / "test.npz") as file:
        pixels, labels = file["x"], file["y"]
    order = np.random.default_rng(seed).permutation(len(pixels))[: N_FIT + N_TEST]
    pixels, labels = pixels[order], torch.from_numpy(labels[order])
    if severity:
        pixels = corrupted(pixels, shift, severity, seed)
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    test = open_samples(pixels[N_FIT:], opened.preprocessing)

    def accuracy(student: nn.Module) -> float:
        return 100 * float((predictions_of(student, test, 256).argmax(-1) == labels[N_FIT:]).float().mean())

    seen: dict[str, float] = {}
    method = probe(accuracy, seen)
    result = compress(
        opened, pixels[:N_FIT], latency=f"{share}x", num_samples=N_FIT, seed=seed, lossless=False, distill=method
    )
    about = {"model": model, "shift": shift, "severity": severity, "target": share, "seed": seed}
    found = {"source": round(accuracy(opened.module), 2), "removed": len(result.plan.removals)}
    return about | found | seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    require_data("zoo.py", "cifar10/test.npz")
    rows = []
    for case in CASES:
        key = "kept_weights/" + "-".join(map(str, case))
        rows.append(cached(key, functools.partial(row, *case), stamped=True))
        print(rows[-1], flush=True)
    print(write_csv("kept_weights.csv", rows))


if __name__ == "__main__":
    main()
