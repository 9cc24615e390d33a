"""Adaptation and compression under 15 shifts: which teacher, and what its student keeps.

    python benchmarks/shift.py --part teachers            # accuracy and calibration of every adapter
    python benchmarks/shift.py --part weights             # is norm's mixing weight beaten by a constant?
    python benchmarks/shift.py --part students            # students at half the latency, from every teacher
    python benchmarks/shift.py --part practise            # PRACTISE + MiR, shortened, at the same target

CIFAR-10 test images, clean, under 15 shifts (`ttmpd.data.corruptions`, severities 3 and 5), and after JPEG
compression (a set of its own). 500 unlabelled images for everything, by seed; accuracy on 2,000 of the others. PRACTISE
+ MiR from the source teacher has 20 adaptor steps a block and 200 of MiR, as many as the others' distillation: at its
defaults one student takes hours. Every cell is kept on disk as it is finished; a part reads what is there.
Writes results/shift_teachers.csv, shift_weights.csv, shift_students.csv and shift_students.png.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import CACHE, DATA, RESULTS, cached, cifar, earlier, require_data, with_earlier, write_csv
from ttmpd.adapt.base import Adapter
from ttmpd.adapt.eata import EATA
from ttmpd.adapt.eata_c import EATAC
from ttmpd.adapt.none import NoAdaptation
from ttmpd.adapt.norm import Norm
from ttmpd.adapt.tent import Tent
from ttmpd.data.corruptions import CORRUPTIONS, corrupted
from ttmpd.data.open import open_samples
from ttmpd.distill.mimic import Mimic
from ttmpd.models.modules import clone, to_fast_format
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import evaluate
from ttmpd.plan.greedy import Greedy
from ttmpd.score.practise import Practise

ADAPTERS: dict[str, Adapter] = {
    "source": NoAdaptation(), "norm": Norm(), "tent": Tent(), "eata": EATA(), "eata_c": EATAC(),
    "eata_c, losses alone": EATAC(parts=0),
}  # fmt: skip
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
N_FIT, N_TEST, TARGET = 500, 2000, "0.5x"
OWN_SETS = ("clean", "jpeg_set")
"""No shift, and the JPEG-compressed test set; they have no severity."""

Arrays = tuple[np.ndarray, np.ndarray]


@functools.cache
def images(shift: str, severity: int, seed: int) -> tuple[np.ndarray, Arrays]:
    """(pixels to adapt to, (pixels, labels) to test on)."""
    pixels, labels = cifar("cifar10_jpeg" if shift == "jpeg_set" else "cifar10")
    order = np.random.default_rng(seed).permutation(len(pixels))[: N_FIT + N_TEST]
    pixels, labels = pixels[order], labels[order]
    if shift not in OWN_SETS:
        pixels = corrupted(pixels, shift, severity, seed)
    return pixels[:N_FIT], (pixels[N_FIT:], labels[N_FIT:])


def quality(model: torch.nn.Module, test: Arrays, opened: OpenedModel) -> dict[str, float]:
    """Accuracy and expected calibration error in percent."""
    found = evaluate(dataclasses.replace(opened, module=model), test[0], test[1].tolist()).model
    assert found.accuracy is not None
    assert found.calibration_error is not None
    return {"accuracy": round(100 * found.accuracy.share, 2), "ece": round(100 * found.calibration_error, 2)}


def teacher(model: str, shift: str, severity: int, seed: int, name: str, method: Adapter) -> dict[str, Any]:
    """One adapted teacher."""
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    few, test = images(shift, severity, seed)
    samples = open_samples(few, opened.preprocessing)
    source = to_fast_format(clone(opened.module).eval())
    start = time.perf_counter()
    adapted = method.adapt(source, samples, seed=seed)
    seconds = round(time.perf_counter() - start, 2)
    row = {"model": model, "shift": shift, "severity": severity, "seed": seed, "teacher": name}
    facts = {key: round(value, 3) for key, value in adapted.facts.items()}
    return row | quality(adapted.model, test, opened) | {"seconds": seconds} | facts


def student(model: str, shift: str, severity: int, seed: int, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One student at half the latency."""
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    few, test = images(shift, severity, seed)
    result = compress(opened, few, latency=TARGET, num_samples=N_FIT, seed=seed, **settings)
    assert result.report.latency is not None
    ratio = result.report.latency.speedup
    return (
        {"model": model, "shift": shift, "severity": severity, "seed": seed, "student": name, "target": TARGET}
        | quality(result.model, test, opened)
        | {
            "speedup": round(ratio.median, 3),
            "removed": len(result.plan.removals),
            "seconds": round(sum(result.report.seconds.values()), 1),
        }
    )


def own_students() -> dict[str, dict[str, Any]]:
    """Settings of TT-MPD's students; what is not named is the default of ``compress``."""
    return {f"ttmpd from {name}": {"adapt": method} for name, method in ADAPTERS.items()}


def practise_students() -> dict[str, dict[str, Any]]:
    """Settings of the baseline."""
    shortened = {"score": Practise(steps=20), "distill": Mimic(steps=200), "holdout": 0.0}
    return {"practise + mir": {"adapt": NoAdaptation(), "actions": ("drop",), "plan": Greedy()} | shortened}


def table(part: str, only: list[str]) -> tuple[str, dict[str, Callable[..., dict[str, Any]]]]:
    """(folder of the part's rows, what computes a row by name)."""
    if part == "teachers":
        rows = {n: functools.partial(teacher, name=n, method=m) for n, m in ADAPTERS.items()}
        return "shift_teachers", _kept(rows, only)
    if part == "weights":
        rows = {
            f"norm {w:g}": functools.partial(teacher, name=f"norm {w:g}", method=Norm(weights=(w,))) for w in WEIGHTS
        }
        return "shift_weights", _kept(rows, only)
    wanted = own_students() if part == "students" else practise_students()
    return "shift_students", _kept({n: functools.partial(student, name=n, settings=s) for n, s in wanted.items()}, only)


def _kept(rows: dict[str, Any], only: list[str]) -> dict[str, Any]:
    return {name: row for name, row in rows.items() if not only or name in only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("teachers", "weights", "students", "practise"), nargs="+", required=True)
    parser.add_argument("--model", nargs="+", default=("resnet20", "resnet56"))
    parser.add_argument("--severity", type=int, nargs="+", default=(3, 5))
    parser.add_argument("--shift", nargs="+", choices=(*CORRUPTIONS, *OWN_SETS), default=(*OWN_SETS, *CORRUPTIONS))
    parser.add_argument("--seed", type=int, nargs="+", default=(0,))
    parser.add_argument("--only", nargs="+", default=[], help="names of teachers or students")
    args = parser.parse_args()
    require_data("zoo.py", "cifar10/test.npz", "cifar10_jpeg/test.npz")
    for part in args.part:
        folder, rows = table(part, args.only)
        for model, shift, seed in itertools.product(args.model, args.shift, args.seed):
            for severity in (0,) if shift in OWN_SETS else args.severity:
                for name, compute in rows.items():
                    key = f"{folder}/{model}-{shift}-{severity}-{seed}-{name}"
                    print(
                        cached(key, functools.partial(compute, model, shift, severity, seed), stamped=True), flush=True
                    )
        about = ("model", "shift", "severity", "seed", "student" if folder == "shift_students" else "teacher")
        print(write_csv(f"{folder}.csv", with_earlier(f"{folder}.csv", finished(folder), about)))
        if folder == "shift_students":
            draw()


def draw(model: str = "resnet56", severity: str = "5") -> None:
    """Accuracy under each shift: the model as it is, PRACTISE's student, TT-MPD's."""
    import matplotlib.pyplot as plt

    def found(name: str, column: str, wanted: str) -> dict[str, float]:
        rows = [
            row for row in earlier(name) if (row["model"], row["severity"], row[column]) == (model, severity, wanted)
        ]
        return {row["shift"]: float(row["accuracy"]) for row in rows}

    bars = {
        "the model as it is": (found("shift_teachers.csv", "teacher", "source"), "#8a94a0"),
        "PRACTISE + MiR, half the latency": (found("shift_students.csv", "student", "practise + mir"), "#d99a1c"),
        "TT-MPD, half the latency": (found("shift_students.csv", "student", "ttmpd from norm"), "#2a6f97"),
    }
    figure, axes = plt.subplots(figsize=(10, 3.6))
    for number, (label, (accuracies, color)) in enumerate(bars.items()):
        places = [CORRUPTIONS.index(shift) + 0.27 * (number - 1) for shift in accuracies]
        axes.bar(places, list(accuracies.values()), 0.25, color=color, label=label)
    axes.set_xticks(range(len(CORRUPTIONS)), [shift.replace("_", "\n") for shift in CORRUPTIONS], fontsize=7)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(RESULTS / "shift_students.png", dpi=120)


def finished(folder: str) -> list[dict[str, Any]]:
    """All rows of a part that are on disk."""
    return [json.loads(path.read_text()) for path in sorted(Path(CACHE, folder).glob("*.json"))]


if __name__ == "__main__":
    main()
