"""A report in which everything has been said."""

import base64
import dataclasses
import io
import math
import random

from PIL import Image

from reports import SMALL
from ttmpd.artifact.measurements import (
    AttemptReport,
    Disagreement,
    ExitReport,
    ExitsReport,
    FrontPoint,
    HeldOut,
    LatencyReport,
    Lesson,
    LosslessReport,
    Speedup,
    TargetReport,
    ThresholdPoint,
    Training,
    TrainingCheck,
    UnitReport,
    WidthReport,
)
from ttmpd.artifact.run_report import (
    Adaptation,
    MethodReport,
    ModelReport,
    RunReport,
    RuntimeReport,
    SamplesReport,
    StudentReport,
    TaskReport,
    TokenLengths,
)
from ttmpd.latency.device import Machine
from ttmpd.latency.timing import Timing
from ttmpd.quality.proportion import Proportion

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SAMPLES = SamplesReport(
    425,
    75,
    (3, 224, 224),
    (("a.jpg", "cannot be read"), ("notes.txt", "is no image")),
    (("gray", 3),),
    TokenLengths(12.5, 11.0, 40),
)
METHODS = {
    "adapt": MethodReport("norm", {"prior": 256}),
    "score": MethodReport("ttmpd", {"ridge": 1e-3, "batch_size": 64}),
    "plan": MethodReport("knapsack", {"max_front": 20000}),
    "distill": MethodReport("one_time", {"steps": 200, "lr": 0.02, "n_views": 4}),
}
NOT_REMOVABLE = (
    *((f"layer{i}.0", "changes the shape of its input") for i in (2, 3, 4)),
    ("stem.pool", "holds no parameters"),
)
KINDS = ("BasicBlock", "Bottleneck")


def picture(rng: random.Random) -> str:
    image = Image.new("RGB", (8, 8))
    tint = [rng.randrange(256) for _ in range(3)]
    image.putdata([tuple(min(255, c // 2 + rng.randrange(110)) for c in tint) for _ in range(64)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def units(rng: random.Random, n: int) -> tuple[UnitReport, ...]:
    """A third of them dropped or replaced; behind them one that is narrowed."""
    made = []
    for i in range(n):
        drop = rng.expovariate(3.0) + 0.02
        made.append(
            UnitReport(
                id=f"{'' if i % 5 else 'mlp:'}layer{1 + 4 * i // n}.{i % 6}",
                module=KINDS[i % 2],
                shape=(16 * 2 ** (4 * i // n), 32, 32),
                parameters=4672 * 2 ** (4 * i // n),
                macs=4718592,
                ms=2 + 4 * rng.random(),
                replacement_ms={"linear": 0.4},
                harms={"drop": drop, "linear": drop * rng.uniform(0.3, 0.95)},
                parts={"damage": 2 * drop, "repaired_damage": drop},
            )
        )
    for unit in sorted(made, key=lambda unit: unit.harms["linear"])[: n // 3]:
        action = rng.choice(("drop", "linear"))
        made[made.index(unit)] = dataclasses.replace(unit, action=action, saved_ms=unit.ms - 0.4)
    widths = (WidthReport(4, 1.5, 0.01), WidthReport(3, 1.0, 0.03), WidthReport(0, None, 0.5))
    narrowed = UnitReport(
        "head:layer1.attn", "Attention", (64, 16), 16640, 1048576, 2.0,
        n_members=6, widths=widths, action="narrow", n_kept=4, saved_ms=0.5,
    )  # fmt: skip
    return (*made, narrowed)


def latency(rng: random.Random) -> LatencyReport:
    return LatencyReport(
        batch_size=64,
        original=Timing(107.8, 106.4, 109.3, 30),
        compressed=Timing(58.9, 58.1, 59.7, 30),
        speedup=Speedup(1.83, 1.8, 1.86),
        original_rounds=tuple(rng.gauss(107.8, 2) for _ in range(30)),
        compressed_rounds=tuple(rng.gauss(58.9, 1) for _ in range(30)),
        predicted_ms=57.2,
        lossless=LosslessReport("28 batch norms folded", Timing(90.2, 89.0, 91.1, 30), 1.19),
    )


def held_out(rng: random.Random) -> HeldOut:
    teacher = [rng.randrange(10) for _ in range(75)]
    return HeldOut(
        names=tuple(f"{i}.png" for i in range(75)),
        teacher=tuple(teacher),
        student=tuple(t if rng.random() < 0.84 else rng.randrange(10) for t in teacher),
        teacher_confidence=tuple(min(0.999, rng.betavariate(6, 1.5)) for _ in teacher),
        student_confidence=tuple(min(0.999, rng.betavariate(5, 2)) for _ in teacher),
    )


def disagreements(rng: random.Random, answers: HeldOut) -> tuple[Disagreement, ...]:
    return tuple(
        Disagreement(
            name=answers.names[i],
            teacher=answers.teacher[i],
            student=answers.student[i],
            teacher_confidence=answers.teacher_confidence[i],
            student_confidence=answers.student_confidence[i],
            png=picture(rng) if i % 7 else "",
        )
        for i in range(75)
        if answers.teacher[i] != answers.student[i]
    )


def training(rng: random.Random) -> Training:
    checks = tuple(
        TrainingCheck(
            step,
            round((56 + 8 * (1 - math.exp(-step / 50)) + rng.random()) / 75, 3),
            0.9 * math.exp(-step / 60) + 0.3,
        )
        for step in range(0, 201, 20)
    )
    losses = tuple(check.loss * 1.1 for check in checks[1:])
    return Training(200, "finished", False, 180, 0.25, losses, checks)


def rich(n_units: int = 23) -> RunReport:
    """Everything a compression may tell."""
    rng = random.Random(0)
    answers = held_out(rng)
    return RunReport(
        kind="compressed",
        version="0.1.0",
        created="2026-03-02T10:11:12+00:00",
        seed=0,
        command="ttmpd compress --model timm:resnet50.a1_in1k --data photos --speedup 1.8 --output small",
        model=ModelReport("timm:resnet50.a1_in1k", "ResNet", True, 25557032, 4089184256),
        student=StudentReport(15180116, 2321057792),
        task=TaskReport("classification", "sample", "the same class", True, {"parts": [""], "widths": [10]}),
        machine=Machine("AMD EPYC", "cpu", 2, "2.15.0", "kept"),
        runtime=RuntimeReport("onnx", "1.24.1", 0.62),
        settings={"speedup": 1.8, "budget": None, "amp": False, "time_budget": 120, "units": ["block", "mlp"]},
        methods=METHODS,
        samples=SAMPLES,
        class_names=CLASSES,
        seconds={"adapt": 2.1, "find": 0.2, "timing": 4.0, "score": 7.0, "plan": 1.0, "repair": 2.0, "prepare": 3.0,
                 "distill": 40.2, "measure": 4.1},
        restarted="The interrupted run was made on another device: timings are made anew.",
        adaptation=Adaptation("normalisation statistics mixed, 40% from 425 samples", {"weight": 0.4}),
        units=units(rng, n_units),
        not_removable=NOT_REMOVABLE,
        target=TargetReport("speedup 1.8", True, False, 59.9, 0.31),
        attempts=tuple(AttemptReport(p, m) for p, m in ((59.0, 62.4), (57.9, 60.6), (57.2, 58.9))),
        front=tuple(FrontPoint(t / 20, 5.39 * t, 0.0125 * (20 - t) ** 1.8, 20 - t) for t in range(7, 20)),
        latency=latency(rng),
        agreement=Proportion(0.84, 0.741, 0.906, 75),
        agreement_before=Proportion(0.747, 0.638, 0.831, 75),
        held_out=answers,
        disagreements=disagreements(rng, answers),
        training=training(rng),
        hugging_face="ResNetForImageClassification",
    )  # fmt: skip


def with_exits() -> RunReport:
    """Everything a run of ``early-exit`` may tell."""
    exits = (
        ExitReport("blocks.1", 0.92, 0.5, 3.1, 0.8, 1.4, 0.08, 0.02),
        ExitReport("blocks.3", 0.96, 0.2, 5.0),
    )
    curve = tuple(ThresholdPoint(t / 10, 3 + t / 2, 0.7 + 0.03 * t, (0.5, 0.2, 0.3)) for t in range(10))
    return dataclasses.replace(
        rich(),
        kind="exits",
        student=StudentReport(26000000, None),
        exits=ExitsReport("2 exits were trained", True, 0.92, 0.93, 500, 4.6, exits, 0.3, 8.2, curve),
        units=(),
        training=None,
        agreement_before=None,
        front=(),
    )


def of_student() -> RunReport:
    """Everything a run of ``train-student`` may tell."""
    accuracy, of_teacher = Proportion(0.9, 0.8, 0.95, 30), Proportion(1.0, 0.9, 1.0, 30)
    lesson = Lesson("hf:org/big", 0.75, 120, ("a", "b", "c"), 4, accuracy, of_teacher)
    small = dataclasses.replace(SMALL, kind="student", lesson=lesson)
    return dataclasses.replace(small, training=training(random.Random(0)), methods={"select": MethodReport("random")})
