"""Which stand-ins pay at equal latency: maps of the channels alone, or 3x3 convolutions too, before and after training.

    python benchmarks/stand_ins.py

ResNet-20 and ResNet-56 on CIFAR-10-JPEG, 500 unlabelled images, accuracy on the other 9,500; speedups 1.5 and 2.0, two
seeds; `--actions drop,linear` against `drop,linear,conv`, with the default distillation and with none (0 steps).
Finished rows are kept on disk. Writes results/stand_ins.csv.
"""

import argparse
import functools
from typing import Any

import torch

from common import DATA, cached, cifar, require_data, write_csv
from ttmpd.data.open import open_samples
from ttmpd.distill.one_time import OneTime
from ttmpd.models.open import open_model
from ttmpd.models.run import logits_of
from ttmpd.pipeline.compress import compress_many
from ttmpd.pipeline.settings import Target

SPEEDUPS, SEEDS, STEPS = (1.5, 2.0), (0, 1), (0, 200)
ACTIONS = (("drop", "linear"), ("drop", "linear", "conv"))


def run(model: str, actions: tuple[str, ...], steps: int, seed: int) -> list[dict[str, Any]]:
    """One row per speedup."""
    pixels, labels = cifar()
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    targets = [Target(speedup=speedup) for speedup in SPEEDUPS]
    results = compress_many(
        opened, pixels, targets=targets, actions=actions, distill=OneTime(steps=steps), seed=seed, num_samples=500
    )
    everything, used = open_samples(pixels, opened.preprocessing), set(results[0].sample_ids)
    others = [i for i, name in enumerate(everything.ids) if name not in used]
    test, truth = everything.subset(others), torch.from_numpy(labels)[others]
    rows = []
    for speedup, result in zip(SPEEDUPS, results, strict=True):
        answers = logits_of(result.model, test, 256).argmax(-1)
        rows.append(
            {
                "model": model,
                "actions": " ".join(actions),
                "steps": steps,
                "seed": seed,
                "asked_speedup": speedup,
                "speedup": round(result.facts["latency"]["speedup"]["median"], 3),
                "accuracy": round(100 * float((answers == truth).float().mean()), 2),
                "removed": len(result.plan.removals),
                "conv": sum(action == "conv" for action in result.plan.actions.values()),
                "n_test": len(truth),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("resnet20", "resnet56"), default=("resnet20", "resnet56"))
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz")
    rows = []
    for model in args.model:
        for seed in SEEDS:
            for steps in STEPS:
                for actions in ACTIONS:
                    key = f"stand_ins/{model}-{'_'.join(actions)}-{steps}-{seed}"
                    rows += cached(key, functools.partial(run, model, actions, steps, seed), stamped=True)
                    print(*rows[-len(SPEEDUPS) :], sep="\n", flush=True)
    print(write_csv("stand_ins.csv", rows))


if __name__ == "__main__":
    main()
