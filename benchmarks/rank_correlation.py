"""Does a prediction made without fine-tuning rank plans as fine-tuning does?

    python benchmarks/rank_correlation.py --model resnet56 resnet20 mobilenet_v2     # stop and start as you like

For each model 40 random plans: the even ones drop their units, the odd ones replace them by linear stand-ins. Every
plan is cut, repaired, distilled for a few steps and measured on labelled samples that were not used.
Spearman correlation of that accuracy with minus the predicted harm of each scorer. TT-MPD judges plans as a whole;
for the others unit scores are summed over a plan, and one that knows only "drop" counts it for both actions.

Writes results/rank_correlation_plans.csv (a row a plan), results/rank_correlation.csv (a row a prediction) and
results/rank_correlation.png.
"""

import argparse
import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from common import CACHE, DATA, RESULTS, cached, cifar, require_data, with_earlier, write_csv
from ttmpd.data.labels import open_labels
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.distill.base import FitContext
from ttmpd.distill.one_time import OneTime
from ttmpd.models.modules import to_fast_format
from ttmpd.models.open import open_model
from ttmpd.models.run import predictions_of
from ttmpd.quality.damage import student_damage
from ttmpd.records import ACTIONS, Removal, Unit
from ttmpd.repair.sequential import repaired
from ttmpd.score.base import Scorer, ScoringInputs
from ttmpd.score.damage import Damage
from ttmpd.score.magnitude import Magnitude
from ttmpd.score.practise import Practise
from ttmpd.score.random import Random
from ttmpd.score.ttmpd import TTMPD
from ttmpd.surgery.units.block import Block


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with its data and how far its students are trained."""

    name: str
    sizes: tuple[int, int]
    steps: int
    practise_steps: int
    n_fit: int
    n_test: int
    batch: int = 64
    side: int | None = None


CASES = {
    "resnet56": Case("resnet56", (8, 17), 40, 50, 425, 1500),
    "resnet20": Case("resnet20", (2, 5), 40, 200, 425, 1500),
    # 160 pixels instead of 224: half the operations, so that 40 trainings fit into an hour on two cores.
    "mobilenet_v2": Case("mobilenet_v2", (1, 5), 12, 12, 256, 300, batch=32, side=160),
}
N_PLANS, N_HELD_OUT, SEED = 40, 75, 0
SCORERS = ("ttmpd", "damage", "magnitude", "random", "practise")
ROWS = 1 << 13
"""Rows of every fit of a student: a quarter of what the tool takes, for forty of them."""


class Bench:
    """A model, its units and its samples, opened once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        opened = open_model(f"{DATA / 'zoo.py'}:{case.name}")
        self.teacher = to_fast_format(opened.module)
        everything, labels = self._data(opened.preprocessing)
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SEED)).tolist()
        ends = (case.n_fit, case.n_fit + N_HELD_OUT, case.n_fit + N_HELD_OUT + case.n_test)
        self.fit = everything.subset(order[: ends[0]])
        self.held_out = everything.subset(order[ends[0] : ends[1]])
        self.test = everything.subset(order[ends[1] : ends[2]])
        self.truth = labels[torch.tensor(order[ends[1] : ends[2]])]
        self.few = self.fit.first(256)
        self.units = Block().find(self.teacher, self.fit.batch(slice(0, 2))).units

    def _data(self, preprocessing: Any) -> tuple[Samples, torch.Tensor]:
        if self.case.side is None:
            pixels, labels = cifar()
            return open_samples(pixels, preprocessing), torch.from_numpy(labels)
        smaller = dataclasses.replace(preprocessing, input_size=(3, self.case.side, self.case.side))
        samples = open_samples(DATA / "imagenet_sample" / "images", smaller)
        return samples, open_labels(DATA / "imagenet_sample" / "labels.csv", DATA / "imagenet_sample" / "images").of(
            samples
        )

    def accuracy(self, model: torch.nn.Module) -> float:
        answers = predictions_of(model, self.test, self.case.batch * 2).argmax(-1)
        return 100 * float((answers == self.truth).float().mean())

    def replacements_alone(self, removals: list[Removal]) -> float:
        """Damage of a plan of which only the linear replacements are fitted, to half of ``few``, on the others."""
        half = len(self.few) // 2
        rows = TTMPD().plan_rows
        student = repaired(self.teacher, removals, self.few.first(half), refit_scope="removed_only", rows=rows)
        held_out = self.few.subset(range(half, len(self.few)))
        return student_damage(self.teacher, student, held_out, self.case.batch)


def plans(units: tuple[Unit, ...], sizes: tuple[int, int]) -> list[list[str]]:
    """The units of each random plan, all different."""
    draw, found = random.Random(SEED), list[list[int]]()
    while len(found) < N_PLANS:
        chosen = sorted(draw.sample(range(len(units)), draw.randint(*sizes)))
        if chosen not in found:
            found.append(chosen)
    return [[units[i].path for i in chosen] for chosen in found]


def trained(bench: Bench, paths: list[str], action: str) -> dict[str, Any]:
    """One plan: predictions that need the whole plan, and the accuracy after distillation."""
    removals = [Removal(unit, action) for unit in bench.units if unit.path in paths]  # type: ignore[arg-type]
    found: dict[str, Any] = {"removed_feature": bench.replacements_alone(removals)}
    inputs = ScoringInputs(bench.teacher, (), bench.fit, ACTIONS, bench.case.batch, SEED)
    found["ttmpd"] = TTMPD().score_plan(inputs, removals)
    student = repaired(bench.teacher, removals, bench.fit, batch_size=bench.case.batch, rows=ROWS)
    found["untrained_accuracy"] = bench.accuracy(student)
    method = OneTime(
        steps=bench.case.steps, seconds=0.0, batch_size=bench.case.batch, views=2, smallest_crop=1.0, damaged=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(folder=Path(folder), batch_size=bench.case.batch, seed=SEED, first=removals[0].unit.path)
        targets = method.prepare(bench.teacher, bench.fit, bench.held_out, context)
        method.fit(student, bench.fit, bench.held_out, targets, context)
    return found | {"accuracy": bench.accuracy(student)}


def predictions(case: Case, tables: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Predicted harm of every plan, by every scorer and by the forms that were considered."""

    def total(harm: Callable[[str, str], float]) -> list[float]:
        return [sum(harm(path, row["action"]) for path in row["units"]) for row in rows]

    ttmpd = tables["ttmpd"]
    found = {
        "ttmpd": [row["ttmpd"] for row in rows],
        "form: sum of the harms of units": total(lambda p, a: ttmpd[p][a]["harm"]),
        "form: number of units": total(lambda *_: 1.0),
        "form: sum of damages": total(lambda p, _: ttmpd[p]["drop"]["parts"]["damage"]),
        "form: sum of repaired damages": total(lambda p, _: ttmpd[p]["drop"]["parts"]["repaired_damage"]),
        "form: the same, square roots": total(lambda p, _: ttmpd[p]["drop"]["parts"]["repaired_damage"] ** 0.5),
    }
    for name in [name for name in tables if name != "ttmpd"]:
        label = f"practise, {case.practise_steps} steps a block" if name == "practise" else name
        found[label] = total(functools.partial(lambda t, p, _: t[p]["drop"]["harm"], tables[name]))
    found["form: whole plan, stand-ins alone fitted, feature"] = [row["removed_feature"] for row in rows]
    return found


def run(case: Case, only: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row a plan, a row a prediction) for one model."""
    bench = Bench(case)
    scorers: dict[str, Scorer] = {
        "ttmpd": TTMPD(), "damage": Damage(), "magnitude": Magnitude(), "random": Random(),
        "practise": Practise(steps=case.practise_steps, train_batch_size=case.batch),
    }  # fmt: skip
    rows = []
    for number, paths in enumerate(plans(bench.units, case.sizes)):
        action = ("drop", "linear")[number % 2]
        compute = functools.partial(trained, bench, paths, action)
        found = cached(f"rank/{case.name}/{number}", compute, stamped=True)
        about = {"model": case.name, "plan": number, "action": action, "units": paths, "n_units": len(paths)}
        rows.append(about | found)
        print(case.name, number, action, len(paths), f"{found['accuracy']:.1f} %", flush=True)
    tables = {
        name: cached(f"rank/{case.name}/scores-{name}", functools.partial(table, bench, scorer))
        for name, scorer in scorers.items()
        if name in only
    }
    summary = [
        {"model": case.name, "prediction": name}
        | {"spearman": spearman(harm, rows)}
        | {f"spearman_{a}": spearman(harm, rows, a) for a in ("drop", "linear")}
        | {"n_plans": len(rows), "steps": case.steps, "seed": SEED}
        for name, harm in predictions(case, tables, rows).items()
    ]
    return rows, summary


def spearman(harm: list[float], rows: list[dict[str, Any]], action: str = "") -> float:
    """Rank correlation of minus the harm with the accuracy, over all plans or those of one action."""
    pairs = [(-h, row["accuracy"]) for h, row in zip(harm, rows, strict=True) if action in ("", row["action"])]
    return round(float(spearmanr(*zip(*pairs, strict=True)).statistic), 3)


def table(bench: Bench, scorer: Scorer) -> dict[str, Any]:
    """Scores as plain data: unit -> action -> harm and parts."""
    found: dict[str, Any] = {}
    for score in scorer.score(bench.teacher, bench.units, bench.fit, batch_size=bench.case.batch, seed=SEED):
        found.setdefault(score.unit_id, {})[score.action] = {"harm": score.harm, "parts": dict(score.parts)}
    return found


def draw(rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> None:
    """Spearman of every scorer, a group a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in summary))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.2), sharex=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        found = [r for r in summary if r["model"] == model and not r["prediction"].startswith("form")]
        found.sort(key=lambda r: r["spearman"])
        colors = ["#2a6f97" if r["prediction"] == "ttmpd" else "#b8c4cc" for r in found]
        bars = axis.barh([r["prediction"].split(",")[0] for r in found], [r["spearman"] for r in found], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.set_title(f"{model}, {found[0]['n_plans']} plans", fontsize=10)
        axis.set_xlim(min(0, *(r["spearman"] for r in found)) - 0.15, 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_xlabel("Spearman with the accuracy after fine-tuning")
    figure.tight_layout()
    figure.savefig(RESULTS / "rank_correlation.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(CASES), nargs="+", default=sorted(CASES))
    parser.add_argument("--scorer", choices=SCORERS, nargs="+", default=SCORERS, help="practise takes longest")
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz", "imagenet_sample/labels.csv")
    done = [run(CASES[name], args.scorer) for name in args.model]
    rows, summary = [r for d in done for r in d[0]], [r for d in done for r in d[1]]
    rows = with_earlier("rank_correlation_plans.csv", [r | {"units": " ".join(r["units"])} for r in rows], ("model",))
    summary = with_earlier("rank_correlation.csv", summary, ("model",))
    summary = [r | {"spearman": float(r["spearman"])} for r in summary]
    write_csv("rank_correlation_plans.csv", rows)
    write_csv("rank_correlation.csv", summary)
    draw(rows, summary)
    for line in summary:
        figures = " ".join(f"{float(line[key]):6.3f}" for key in ("spearman", "spearman_drop", "spearman_linear"))
        print(f"{line['model']:13s} {line['prediction']:48s} {figures}")
    print(f"rows are kept under {CACHE}")


if __name__ == "__main__":
    main()
