"""Early exits: accuracy against measured mean latency, alone and on top of a pruned student.

    python benchmarks/early_exit.py                          # rows are kept as they are finished
    python benchmarks/early_exit.py --model minilm --base alone
    python benchmarks/early_exit.py --n-fit 60 --n-test 60   # a smoke test

ResNet-56 on CIFAR-10-JPEG: 1,000 unlabelled images, accuracy on 4,000 others. MiniLM (6 layers) on SST-2: the 872
unlabelled sentences of the dev split, accuracy on the test split (1,821). Exits are those of `ttmpd early-exit` and
some others: the same threshold at all of them, none taken off again, no temperatures, a mix of blocks, labels for the
same samples. Each is asked for several speedups; thresholds are chosen on the unlabelled samples alone. `always` sends
every sample to one exit.
Latency is the mean per sample at batch 1, the model with and without exits in turn, every test sample at the exit that
it takes; the mean is over those that fit into ten seconds. Do it on an idle machine.

Writes results/early_exit.csv (a row per variant and speedup), early_exit_calibration.csv (a row per exit: calibration
error on the test samples before and after, against the model's answers and against the labels), and early_exit.png;
with other numbers of samples than these it writes nothing.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import CACHE, DATA, RESULTS, cached, cifar, require_data, with_earlier, write_csv
from ttmpd.artifact.read import is_artifact, open_artifact
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.early_exit.base import Equipped
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import BudgetUnreachableError
from ttmpd.latency.exits import mean_timings, speedup_of
from ttmpd.models.modules import clone, to_plain_format
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.exit_choice import fitted, time_exits
from ttmpd.pipeline.exit_threshold import choose_threshold, exit_answers, exit_confidences
from ttmpd.quality.calibration import calibration_error
from ttmpd.surgery.exits.model import EarlyExitModel
from ttmpd.surgery.exits.spec import NEVER

IDS = {"resnet56": f"{DATA / 'zoo.py'}:resnet56", "minilm": f"hf:{DATA / 'minilm_sst2'}"}
N_FIT, N_TEST = {"resnet56": 1000, "minilm": 872}, {"resnet56": 4000, "minilm": 1821}
SPEEDUPS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5)
PRUNED = 1.3
"""Speedup of the student on which exits are put."""
VARIANTS = {
    "calibrated": RightTool(),
    "one threshold": RightTool(by_time=False),
    "all exits": RightTool(prune=False),
    "uncalibrated": RightTool(calibrate=False),
    "mixed blocks": RightTool(mix=True),
    "labels": RightTool(),
}
PASS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What all variants of one model share."""

    source: nn.Module
    fit: Samples
    fit_labels: Tensor
    test: Samples
    labels: Tensor


def rows_of(model: str, n_fit: int, n_test: int, seed: int) -> tuple[Any, Tensor, Any, Tensor]:
    """(unlabelled data, their labels, test data, their labels), drawn by seed."""
    draw = np.random.default_rng(seed)
    if model == "resnet56":
        pixels, labels = cifar()
        order = draw.permutation(len(pixels))
        fit, test = order[:n_fit], order[n_fit : n_fit + n_test]
        return pixels[fit], torch.from_numpy(labels[fit]), pixels[test], torch.from_numpy(labels[test])
    (fit_text, fit_labels), (text, truth) = (sentences(name) for name in ("dev", "test"))
    fit, test = draw.permutation(len(fit_text))[:n_fit], draw.permutation(len(text))[:n_test]
    return [fit_text[i] for i in fit], fit_labels[fit], [text[i] for i in test], truth[test]


def sentences(split: str) -> tuple[list[str], Tensor]:
    """Sentences and labels of a split of SST-2."""
    lines = (DATA / "sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [row[1] for row in rows], torch.tensor([int(row[0]) for row in rows])


def opened_for(model: str, base: str, data: Any, key: str, seed: int) -> OpenedModel:
    """The model, or a student of it that was pruned and distilled on the same unlabelled samples."""
    opened = open_model(IDS[model])
    if base == "alone":
        return opened
    folder = folder_of_pruned(key)
    if not (is_artifact(folder) and (folder / "plan.json").exists()):
        compress(opened, data, speedup=PRUNED, batch_size=1, num_samples=len(data), seed=seed, output=folder)
    return open_artifact(folder, IDS[model])


def folder_of_pruned(key: str) -> Path:
    return CACHE / "early_exit" / f"pruned-{key}"


def base_speedup(base: str, key: str) -> float:
    """How many times as fast as the model the network is that the exits are put on, as its own report says."""
    if base == "alone":
        return 1.0
    report = json.loads((folder_of_pruned(key) / "report.json").read_text())
    return round(float(report["latency"]["speedup"]["median"]), 3)


def prepared(model: str, base: str, seed: int, n_fit: int, n_test: int) -> Bench:
    """Source model, samples and labels."""
    fit, fit_labels, test, labels = rows_of(model, n_fit, n_test, seed)
    opened = opened_for(model, base, fit, f"{model}-{seed}-{n_fit}", seed)
    few, more = (open_samples(data, opened.preprocessing) for data in (fit, test))
    return Bench(to_plain_format(clone(opened.module)).eval(), few, fit_labels, more, labels)


def percent(value: float) -> float:
    return round(100 * value, 2)


def share(answers: Tensor, right: Tensor) -> float:
    return percent(float((answers == right).double().mean()))


def run(bench: Bench, variant: str, known: dict[str, Any], seed: int) -> dict[str, Any]:
    """Rows of one variant: by threshold, and by exit."""
    method, labels = VARIANTS[variant], bench.fit_labels if variant == "labels" else None
    found = method.equip(bench.source, bench.fit, labels=labels, batch_size=PASS, seed=seed)
    exits, own = exit_answers(found.model, bench.test, PASS)
    on_fit, on_test = exit_confidences(found.exit_logits, found.logits), exit_confidences(exits, own)
    measured = time_exits(bench.source, found.model, bench.fit, 1)
    answers = torch.cat([exits.argmax(-1), own.argmax(-1)[None]])

    def row(model: EarlyExitModel, numbers: tuple[int, ...], depths: Tensor, **more: Any) -> dict[str, Any]:
        """Samples leave at ``depths``, counted among the exits ``numbers`` that ``model`` has."""
        places = torch.tensor([*numbers, len(exits)])[depths]
        chosen = answers.gather(0, places[None])[0]
        shares = torch.bincount(places, minlength=len(exits) + 1).double() / len(places)
        return known | more | {
            "accuracy": share(chosen, bench.labels), "accuracy_without_exits": share(own.argmax(-1), bench.labels),
            "agreement": share(chosen, own.argmax(-1)), "mean_exit": round(float(places.double().mean()), 3),
            "exits": " ".join(map(str, numbers)), "shares": " ".join(f"{value:.3f}" for value in shares.tolist()),
            "n_test": len(places),
        } | timed(bench, model, depths, measured.original_ms + measured.ms[-1])  # fmt: skip

    every = tuple(range(len(exits)))
    rows = [row(found.model, every, on_test.depths(NEVER), asked=1.0, threshold=NEVER)]
    for asked in SPEEDUPS:
        budget_ms = measured.original_ms / asked
        try:
            chosen, few, left = fitted(method, found, on_fit, measured, budget_ms)
            threshold = choose_threshold(few, left.ms, budget_ms)
        except BudgetUnreachableError:
            break
        spec = chosen.model.spec
        numbers = tuple(found.model.spec.exits.index(place) for place in spec.exits)
        depths = on_test.only(numbers).weighed(spec.saved_shares).depths(threshold)
        rows.append(row(chosen.model, numbers, depths, asked=asked, threshold=round(threshold, 4)))
    if variant == "calibrated":
        rows += [row(found.model, every, torch.full((len(own),), k), always=k) for k in range(len(exits) + 1)]
    return {"rows": rows, "exits": calibration(found, exits, own, bench, known)}


def timed(bench: Bench, model: EarlyExitModel, depths: Tensor, ms: float) -> dict[str, float]:
    """Mean milliseconds per sample with and without exits, and how many times faster it is with them."""
    rounds = mean_timings(bench.source, model, bench.test, depths, 1, ms)
    low, median, high = speedup_of(rounds)
    found = {"speedup": median, "speedup_low": low, "speedup_high": high}
    found |= {f"{name}_ms": rounds.timing(name).median_ms for name in ("original", "compressed")}
    return {name: round(value, 3) for name, value in found.items()}


def calibration(
    found: Equipped, exits: Tensor, own: Tensor, bench: Bench, known: dict[str, Any]
) -> list[dict[str, Any]]:
    """Calibration error in percent of every exit on the test samples, before and after."""
    rows = []
    for number, (place, calibrated) in enumerate(zip(found.model.spec.exits, exits, strict=True)):
        temperature = float(found.model.heads[number].get_buffer("temperature"))
        errors = {
            f"ece_{goal}_{when}": percent(calibration_error(logits, classes))
            for goal, classes in (("answers", own.argmax(-1)), ("labels", bench.labels))
            for when, logits in (("before", calibrated * temperature), ("after", calibrated))
        }
        facts = {"exit": number, "behind": place.path, "temperature": round(temperature, 4)}
        right = {"accuracy": share(calibrated.argmax(-1), bench.labels), "n_test": len(own)}
        rows.append(known | facts | errors | right)
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """Accuracy over times as fast, a panel a model: milliseconds of minutes apart do not compare."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["base"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    styles = {
        "calibrated": "#2a6f97",
        "all exits": "#d99a1c",
        "uncalibrated": "#c8553d",
        "mixed blocks": "#7a5cc0",
        "labels": "#197a55",
    }
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [row for row in rows if (row["model"], row["base"]) == panel]
        for variant, color in styles.items():
            line = points(row for row in own if row["variant"] == variant and row.get("asked", "") != "")
            axis.plot(*zip(*line, strict=True), color=color, marker="o", ms=3, label=variant) if line else None
        fixed = points(row for row in own if row.get("always", "") != "")
        axis.plot(*zip(*fixed, strict=True), color="#8a94a0", ls="--", marker="s", ms=3, label="always one exit")
        axis.set_title(", ".join(panel), fontsize=10)
        axis.set_xlabel("times as fast, mean, batch 1")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("accuracy, %")
    drawn = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}  # not every panel has all
    axes[0][-1].legend(drawn.values(), drawn.keys(), fontsize=7, frameon=False)
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "early_exit.png", dpi=130)


def points(rows: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """(speedup, accuracy) of rows, some of them read from a table."""
    return sorted((float(row["speedup"]), float(row["accuracy"])) for row in rows)


def run_variant(bench: Callable[[], Bench], variant: str, known: dict[str, Any], seed: int) -> dict[str, Any]:
    """The rows of a variant; the bench is prepared only when they are not there yet."""
    return run(bench(), variant, known, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(IDS), nargs="+", default=sorted(IDS))
    parser.add_argument("--base", choices=("alone", "pruned"), nargs="+", default=("alone", "pruned"))
    parser.add_argument("--variant", choices=sorted(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--seed", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--n-fit", type=int, default=0, help="unlabelled samples; as the text says when left out")
    parser.add_argument("--n-test", type=int, default=0)
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz", "minilm_sst2/config.json", "sst2/test.tsv")
    rows, exits = [], []
    for seed in args.seed:
        for model in args.model:
            for base in args.base:
                n_fit, n_test = args.n_fit or N_FIT[model], args.n_test or N_TEST[model]
                bench = functools.cache(functools.partial(prepared, model, base, seed, n_fit, n_test))
                for variant in args.variant:
                    known = {"model": model, "base": base, "variant": variant, "seed": seed, "n_fit": n_fit}
                    key = f"early_exit/{model}-{base}-{variant}-{seed}-{n_fit}-{n_test}"
                    compute = functools.partial(run_variant, bench, variant, known, seed)
                    done = cached(key, compute, stamped=True)
                    times = base_speedup(base, f"{model}-{seed}-{n_fit}")
                    own = {name: value for name, value in done.items() if name not in ("rows", "exits")}  # the stamp
                    rows += [row | {"base_speedup": times} | own for row in done["rows"]]
                    exits += [row | own for row in done["exits"]]
                    for line in done["rows"]:
                        print({name: line[name] for name in line if name not in ("shares", "n_test")}, flush=True)
    if args.n_fit or args.n_test:
        return
    about = ("model", "base", "variant", "seed")
    rows = with_earlier("early_exit.csv", rows, about)
    exits = with_earlier("early_exit_calibration.csv", exits, about)
    names = [write_csv("early_exit.csv", rows), write_csv("early_exit_calibration.csv", exits)]
    draw(rows)
    print(*names, Path(RESULTS / "early_exit.png"))


if __name__ == "__main__":
    main()
