"""How few labelled samples will do, with a teacher's answers and without; and which samples to attack how strongly.

    python benchmarks/data_pruning.py            # digits: ten minutes on one core; stop and start as you like
    python benchmarks/data_pruning.py --puma     # digits under attack: five minutes on one core
    python benchmarks/data_pruning.py --cifar    # ResNet-20 on 2,000 images of CIFAR-10: about an hour on two cores

Digits: a teacher trained on all 1,437 training scans, students of the same network trained on a part of them, 500 steps
each whatever the part; five seeds of split, weights and order; accuracy on the other 360. CIFAR-10: the published
ResNet-56 teaches ResNet-20 from random weights; accuracy on the 10,000 test images. The expectations come from the
papers' claims and were written down before the first run; each is printed, and kept in the table, as held or failed.

Writes results/data_pruning.csv (--cifar: results/data_pruning_cifar.csv; --puma: results/puma.csv).
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import DATA, cached, cifar, require_data, write_csv
from ttmpd.data.open import open_samples
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.data.samples import Samples
from ttmpd.demo.digits import DigitNet, digits
from ttmpd.models.open import open_model
from ttmpd.models.run import predictions_of
from ttmpd.quality.margins import DeepFoolConfig, margins
from ttmpd.select.base import Selector
from ttmpd.select.el2n import EL2N
from ttmpd.select.forgetting import Forgetting
from ttmpd.select.puma import PUMA
from ttmpd.select.random import Random
from ttmpd.students.adversarial import Attack, attacked, pixels_of
from ttmpd.students.recipe import alpha_for
from ttmpd.students.train import train_student

FRACTIONS, ALPHAS, WIDTHS = (0.03, 0.1, 0.3, 1.0), (0.0, 0.25, 0.5, 0.75, 0.95, 1.0), (0.5, 1.0, 4.0)
SELECTORS: dict[str, Selector] = {"random": Random(), "el2n": EL2N(), "forgetting": Forgetting()}
SEEDS, N_TRAIN, STEPS, NOISE = range(5), 1437, 500, 0.2
COLLAPSE, RECOVERY = 10.0, 2.0
"""Points: EL2N on wrong labels collapses when it loses so many to random; it recovers when it comes so close again."""

# ----------------------------------------------------------------------------------------------------- what all share


def fresh(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with the random weights that ``seed`` draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def accuracy(model: nn.Module, samples: Samples, truth: Tensor) -> float:
    return 100 * float((predictions_of(model, samples, 256).argmax(-1) == truth).float().mean())


def split(seed: int) -> tuple[Samples, Tensor, Samples, Tensor]:
    """Digits to train on with their labels, digits to measure on with theirs."""
    pixels, labels = digits()
    samples = open_samples(pixels, Preprocessing.from_dict(DigitNet.pretrained_cfg))
    truth, order = torch.from_numpy(labels), np.random.default_rng(seed).permutation(len(labels)).tolist()
    first, rest = order[:N_TRAIN], order[N_TRAIN:]
    return samples.subset(first), truth[first], samples.subset(rest), truth[rest]


def summary(found: Iterable[float]) -> dict[str, Any]:
    """Mean and range over the seeds."""
    values = list(found)
    return {"accuracy": round(statistics.fmean(values), 2), "lowest": round(min(values), 2),
            "highest": round(max(values), 2), "n_seeds": len(values)}  # fmt: skip


def told(expectations: Iterable[tuple[str, str, bool, str]]) -> list[dict[str, Any]]:
    """Print each expectation as held or failed; rows for the table."""
    rows = []
    for name, text, held, why in expectations:
        verdict = "held" if held else "FAILED"
        print(f"{verdict:6s} ({name}) {text}: {why}")
        rows.append({"experiment": f"expectation {name}", "text": text, "verdict": verdict.lower(), "why": why})
    return rows


# -------------------------------------------------------------------------------------------------------------- digits


def convolutional(width: float) -> nn.Module:
    """Two 3x3 convolutions with batch normalisation; 16 and 32 channels at width 1."""
    a, b = round(16 * width), round(32 * width)
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
        nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * b, 10),
    )  # fmt: skip


def wrong_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """The labels, a share of them replaced by another class."""
    draw = torch.Generator().manual_seed(seed)
    moved = torch.rand(len(labels), generator=draw) < share
    return torch.where(moved, (labels + torch.randint(1, 10, (len(labels),), generator=draw)) % 10, labels)


@functools.cache
def digit_teacher(width: float, noise: float, seed: int) -> nn.Module:
    """Trained on all training digits, with the labels that the students get."""
    samples, labels, _, _ = split(seed)
    net = fresh(lambda: convolutional(width), 1000 + seed)
    return train_student(
        net, samples, wrong_labels(labels, noise, seed), fraction=1.0, views=1, steps=STEPS, seed=seed
    ).model


def digit_student(select: str, fraction: float, alpha: float, width: float, noise: float, seed: int) -> float:
    """Accuracy of one student."""
    samples, labels, test, truth = split(seed)
    found = train_student(
        fresh(lambda: convolutional(1.0), seed), samples, wrong_labels(labels, noise, seed),
        teacher=digit_teacher(width, noise, seed), select=SELECTORS[select], fraction=fraction, alpha=alpha, views=1,
        steps=STEPS, seed=seed,
    )  # fmt: skip
    return accuracy(found.model, test, truth)


class Digits:
    """Mean accuracies of digit students, each trained once."""

    def __init__(self) -> None:
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __call__(self, select: str, fraction: float, alpha: float, *, width: float = 1.0, noise: float = 0.0) -> float:
        key = (select if fraction < 1 else "random", fraction, alpha, width, noise)
        if key not in self.rows:
            name = "-".join(map(str, key))
            found = [cached(f"data_pruning/{name}-{seed}", functools.partial(digit_student, *key, seed))
                     for seed in SEEDS]  # fmt: skip
            names = ("select", "fraction", "alpha", "teacher_width", "label_noise")
            self.rows[key] = {"experiment": "student"} | dict(zip(names, key, strict=True)) | summary(found)
            print(name, self.rows[key]["accuracy"], flush=True)
        return float(self.rows[key]["accuracy"])

    def teacher(self, width: float, noise: float) -> dict[str, Any]:
        """The row of a teacher."""

        def measure(seed: int) -> float:
            return accuracy(digit_teacher(width, noise, seed), *split(seed)[2:])

        found = [cached(f"data_pruning/teacher-{width}-{noise}-{seed}", functools.partial(measure, seed))
                 for seed in SEEDS]  # fmt: skip
        return {"experiment": "teacher", "teacher_width": width, "label_noise": noise} | summary(found)


def digits_expectations(of: Digits) -> Iterable[tuple[str, str, bool, str]]:
    """The six of the plan: number, words, whether it held, the figures."""
    few = FRACTIONS[:-1]
    gains = {(s, f): of(s, f, alpha_for(f)) - of(s, f, 0.0) for s in SELECTORS for f in few}
    worst = min(gains, key=lambda key: gains[key])
    yield ("1", "a teacher helps every selector at every fraction below 1", min(gains.values()) > 0,
           f"least gain {gains[worst]:+.2f} points ({worst[0]} at {worst[1]:g})")  # fmt: skip
    lead = {f: of("random", f, 0.0) - of("el2n", f, 0.0) for f in (0.03, 0.1)}
    yield ("2", "without a teacher random beats EL2N up to a fraction of 0.1", min(lead.values()) > 0,
           ", ".join(f"{value:+.2f} at {f:g}" for f, value in lead.items()))  # fmt: skip
    lead = {f: of("random", f, alpha_for(f)) - of("el2n", f, alpha_for(f)) for f in FRACTIONS}
    yield ("3", "with a teacher random is nowhere more than 0.5 points below EL2N", min(lead.values()) >= -0.5,
           ", ".join(f"{value:+.2f} at {f:g}" for f, value in lead.items()))  # fmt: skip
    best = {f: max(ALPHAS, key=lambda alpha, f=f: of("random", f, alpha)) for f in FRACTIONS}  # type: ignore[misc]
    yield ("4", "the best alpha does not rise with the fraction", list(best.values()) == sorted(best.values())[::-1],
           ", ".join(f"{alpha:g} at {f:g}" for f, alpha in best.items()))  # fmt: skip
    noisy = {(s, a): of(s, 0.1, a, noise=NOISE) for s in ("random", "el2n") for a in (0.0, 1.0)}
    lost, back = (noisy["random", a] - noisy["el2n", a] for a in (0.0, 1.0))
    yield ("5", f"with {NOISE:.0%} wrong labels EL2N collapses without a teacher ({COLLAPSE:g} points below random) "
           f"and recovers with alpha 1 (within {RECOVERY:g})", lost >= COLLAPSE and back <= RECOVERY,
           f"{-lost:+.2f} and {-back:+.2f} points to random at 0.1")  # fmt: skip
    widths = {w: of("random", 0.03, alpha_for(0.03), width=w) for w in WIDTHS}
    yield ("6", "at a fraction of 0.03 the widest teacher is not the best", max(widths, key=lambda w: widths[w]) < 4,
           ", ".join(f"{value:.2f} % from x{w:g}" for w, value in widths.items()))  # fmt: skip


def run_digits() -> None:
    of = Digits()
    verdicts = told(list(digits_expectations(of)))
    for fraction in (0.03, 0.3):  # beside what the expectations need
        for select in ("random", "el2n"):
            for alpha in (0.0, 1.0):
                of(select, fraction, alpha, noise=NOISE)
    for width in WIDTHS:
        of("random", 0.1, alpha_for(0.1), width=width)
    teachers = [of.teacher(width, 0.0) for width in WIDTHS] + [of.teacher(1.0, NOISE)]
    print(write_csv("data_pruning.csv", [*teachers, *of.rows.values(), *verdicts]))


# ------------------------------------------------------------------------------------------------------------- CIFAR-10

CIFAR_TRAIN, CIFAR_KEPT, CIFAR_STEPS = 50_000, 2000, 3000


def run_cifar(seeds: Iterable[int], steps: int, kept: int) -> None:
    """Labels alone against labels and teacher, on images that are a 25th of those that the teacher knew."""
    require_data("zoo.py", "cifar10/train5k.npz", "cifar10/test.npz")
    alphas = (0.0, alpha_for(kept / CIFAR_TRAIN), 1.0)
    rows: list[dict[str, Any]] = []
    for alpha in alphas:
        found = [cached(f"data_pruning/cifar-{alpha}-{kept}-{steps}-{seed}",
                        functools.partial(cifar_student, alpha, seed, steps, kept)) for seed in seeds]  # fmt: skip
        rows.append({"experiment": "student", "alpha": alpha, "kept": kept, "steps": steps} | summary(found))
        print(rows[-1], flush=True)
    gain = rows[1]["accuracy"] - rows[0]["accuracy"]
    rows += told([("7", "the teacher is worth more than 5 points", gain > 5, f"{gain:+.2f} points")])
    print(write_csv("data_pruning_cifar.csv", rows))


def cifar_student(alpha: float, seed: int, steps: int, kept: int) -> float:
    """Accuracy of one ResNet-20 on the test images."""
    teacher, opened = (open_model(f"{DATA / 'zoo.py'}:{name}") for name in ("resnet56", "resnet20"))
    with np.load(DATA / "cifar10" / "train5k.npz") as file:
        samples, labels = open_samples(file["x"], opened.preprocessing), torch.from_numpy(file["y"])
    test, truth = cifar("cifar10")
    found = train_student(
        fresh(lambda: reset(opened.module), seed), samples, labels, teacher=teacher.module, alpha=alpha, seed=seed,
        fraction=kept / len(samples), steps=steps, balanced=True,
    )  # fmt: skip
    return accuracy(found.model, open_samples(test, opened.preprocessing), torch.from_numpy(truth))


def reset(model: nn.Module) -> nn.Module:
    """The model with new random weights, in place."""
    for module in model.modules():
        if callable(start_again := getattr(module, "reset_parameters", None)):
            start_again()
    return model


# ---------------------------------------------------------------------------------------------------------------- PUMA

ATTACK = Attack(eps=0.15, loss="trades")
PUMA_SEEDS, PUMA_STEPS, KEEP, SYNTHETIC = range(3), 1500, 0.5, 0.2


def perceptron() -> nn.Module:
    """64-64-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def mixed(samples: Samples, labels: Tensor, seed: int) -> tuple[Samples, Tensor]:
    """The samples and a fifth more: pairs of two classes mixed near the middle, labelled as the heavier one."""
    draw, n = torch.Generator().manual_seed(seed), round(SYNTHETIC * len(labels))
    pairs = torch.randint(len(labels), (8 * n, 2), generator=draw)
    one, other = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]][:n].unbind(1)
    weight = (0.5 + 0.1 * torch.rand(n, 1, 1, 1, generator=draw)).clamp(min=0.505)
    made = (weight * samples.inputs[one] + (1 - weight) * samples.inputs[other]).round().to(torch.uint8)
    ids = (*samples.ids, *(f"mix-{i}" for i in range(n)))
    return Samples(torch.cat([samples.inputs, made]), ids, samples.mean, samples.std), torch.cat([labels, labels[one]])


def withstood(model: nn.Module, samples: Samples, truth: Tensor) -> float:
    """Accuracy under PGD of the full radius."""
    batch, radius = samples.batch(slice(None)), torch.full((len(samples),), ATTACK.eps)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = attacked(model, batch, lambda logits: F.cross_entropy(logits, truth), radius=radius, attack=ATTACK,
                         pixels=pixels_of(samples))  # fmt: skip
    with torch.no_grad():
        return 100 * float((model(moved).argmax(-1) == truth).float().mean())


@functools.cache
def guide(seed: int) -> nn.Module:
    """The margin model: a robust one, trained on all samples."""
    samples, labels, _, _ = split(seed)
    pool, truth = mixed(samples, labels, seed)
    net = fresh(perceptron, 1000 + seed)
    return train_student(net, pool, truth, fraction=1.0, views=1, steps=PUMA_STEPS, seed=seed, attack=ATTACK).model


def puma_student(method: str, loss: str, seed: int) -> dict[str, float]:
    """Clean and robust accuracy of one student."""
    samples, labels, test, truth = split(seed)
    pool, wanted = mixed(samples, labels, seed)
    rule = method.partition("+")[2] or "eps"
    settings: dict[str, Any] = {"fraction": KEEP, "select": PUMA(norm="linf")}
    if method == "drop low margins":
        margin = margins(guide(seed), pool, DeepFoolConfig(norm="linf"), labels=wanted)
        chosen = margin.topk(round(KEEP * len(pool))).indices.sort().values.tolist()
        pool, wanted, settings = pool.subset(chosen), wanted[chosen], {"fraction": 1.0}
    elif method in ("all", "random"):
        settings = {"fraction": 1.0 if method == "all" else KEEP}
    attack = Attack(eps=ATTACK.eps, loss=loss, rule=rule)
    found = train_student(
        fresh(perceptron, seed), pool, wanted, teacher=guide(seed), alpha=0.0, views=1, steps=PUMA_STEPS, seed=seed,
        attack=attack, **settings,
    )  # fmt: skip
    return {"clean": accuracy(found.model, test, truth), "robust": withstood(found.model, test, truth)}


PUMA_METHODS = ("all", "random", "drop low margins", "puma", "puma+clip", "puma+quantile")


def run_puma() -> None:
    rows, means = [], {}
    for loss in ("trades", "pgd"):
        for method in PUMA_METHODS:
            found = [cached(f"puma/{method}-{loss}-{seed}", functools.partial(puma_student, method, loss, seed))
                     for seed in PUMA_SEEDS]  # fmt: skip
            row = {"experiment": "student", "method": method, "loss": loss, "kept": 1.0 if method == "all" else KEEP,
                   "eps": ATTACK.eps, "steps": PUMA_STEPS, "n_seeds": len(found)}  # fmt: skip
            for name in ("clean", "robust"):
                values = [one[name] for one in found]
                means[loss, method, name] = statistics.fmean(values)
                row |= {name: round(statistics.fmean(values), 2), f"{name}_lowest": round(min(values), 2),
                        f"{name}_highest": round(max(values), 2)}  # fmt: skip
            rows.append(row)
            print(loss, method, row["clean"], row["robust"], flush=True)
    verdicts = [row for loss in ("trades", "pgd") for row in told(puma_expectations(loss, means))]
    print(write_csv("puma.csv", rows + verdicts))


def puma_expectations(loss: str, means: dict[Any, float]) -> Iterable[tuple[str, str, bool, str]]:
    """The three of the plan, for one loss."""
    order = ("puma+clip", "puma", "random", "drop low margins")
    clean = [means[loss, method, "clean"] for method in order]
    yield (f"1 {loss}", "clean accuracy: PUMA with clipped radii > without >= random >= low margins dropped",
           clean[0] > clean[1] >= clean[2] >= clean[3], " / ".join(f"{value:.2f} %" for value in clean))  # fmt: skip
    change = means[loss, "puma+clip", "robust"] - means[loss, "all", "robust"]
    yield (f"2 {loss}", "robust accuracy of PUMA with clipped radii at most 2 points below that with all data",
           change >= -2, f"{change:+.2f} points")  # fmt: skip
    change = means[loss, "puma", "clean"] - means[loss, "all", "clean"]
    yield (f"3 {loss}", "high margins dropped, radii as they are: clean accuracy is lost against all data", change < 0,
           f"{change:+.2f} points")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--puma", action="store_true")
    parser.add_argument("--seeds", type=int, default=1, help="of --cifar")
    parser.add_argument("--steps", type=int, default=CIFAR_STEPS, help="of --cifar")
    parser.add_argument("--kept", type=int, default=CIFAR_KEPT, help="of --cifar")
    args = parser.parse_args()
    if args.cifar:
        run_cifar(range(args.seeds), args.steps, args.kept)
    elif args.puma:
        run_puma()
    else:
        run_digits()


if __name__ == "__main__":
    main()
