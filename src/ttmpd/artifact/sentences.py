"""What a report says in words: what was done, whether the target is met, before and after."""

from collections import Counter
from typing import TYPE_CHECKING

from ttmpd.artifact.format import (
    UNKNOWN,
    change,
    count,
    device,
    interval,
    number,
    percent,
    plural,
    probability,
    spread,
    times,
)

if TYPE_CHECKING:  # --help must not load PyTorch
    from ttmpd.artifact.measurements import LatencyReport, UnitReport
    from ttmpd.artifact.run_report import RunReport
    from ttmpd.latency.timing import Timing
    from ttmpd.quality.proportion import Proportion

ACTIONS = {"keep": "kept", "drop": "dropped", "linear": "replaced by a linear map", "narrow": "narrowed"}
"""What was done to a unit."""
MADE = {
    "compressed": "compressed",
    "adapted": "adapted",
    "exits": "with early exits",
    "student": "trained as a student",
}
"""What became of the model, by the kind of the report."""
COLUMNS = {
    "compressed": ("Original", "Compressed"),
    "adapted": ("Original", "Adapted"),
    "exits": ("Without exits", "With exits"),
    "student": ("Teacher", "Student"),
}
"""The two models that are compared, by the kind of the report."""
NEVER_SURE = 1.0
"""A threshold above this is one that no sample reaches."""

Row = tuple[str, str, str, str]
"""What, before, after, and by how much it changed."""


def done_to(unit: "UnitReport") -> str:
    """What was done to a unit, with the members that stayed."""
    if unit.action == "narrow":
        return f"narrowed to {unit.n_kept} of {unit.n_members}"
    return ACTIONS[unit.action]


def circumstances(report: "RunReport") -> str:
    """What the milliseconds belong to: device, threads, batch size, runtime with its version."""
    batch = [f"batches of {report.latency.batch_size}"] if report.latency else []
    runtime = f"{report.runtime.name} {report.runtime.version}"
    return ", ".join([device(report.machine), *batch, f"runtime {runtime}"])


def task_sentence(report: "RunReport") -> str:
    """What the model predicts, how that is known, and what agreement means."""
    task = report.task
    origin = "detected from the model" if task.detected else "as it was named"
    same = f" Agreement means {task.same}." if task.same and report.lesson is None else ""
    return f"Task: {task.name}, {origin}; it predicts for each {task.each}.{same}"


def compared_with(report: "RunReport") -> str:
    """The model that agreement is with."""
    if report.kind == "compressed":
        adapter = report.methods.get("adapt")
        return "the original" if adapter is None or adapter.name == "none" else "the adapted model"
    return {"adapted": "the original", "exits": "the model without exits", "student": "the teacher"}[report.kind]


def runtime_sentence(report: "RunReport") -> str:
    """How the milliseconds of single units were brought into the runtime; "" where they were measured in it."""
    if report.runtime.ratio == 1:
        return ""
    return (
        "Single units were timed in eager PyTorch; their milliseconds were multiplied by "
        f"{number(report.runtime.ratio)}, the ratio of the whole model's in {report.runtime.name} to those in eager."
    )


def sentences(report: "RunReport") -> list[str]:
    """What was done, whether the target is met, and what to be careful about."""
    done = {"compressed": _compressed, "adapted": _adapted, "exits": _exits, "student": _student}[report.kind](report)
    caution = f"{report.latency.caution}." if report.latency and report.latency.caution else ""
    return [text for text in (done, target_sentence(report), _unfitted(report), caution, report.restarted) if text]


def _unfitted(report: "RunReport") -> str:
    """Which layers were left as they are because their fit is beyond the device; "" where there are none."""
    if not report.unfitted:
        return ""
    path, reason = report.unfitted[0]
    n = plural(len(report.unfitted), "layer")
    return f"Not fitted again after the removals: {n}, the first of them {path}, which {reason}."


def _compressed(report: "RunReport") -> str:
    lossless = report.latency.lossless if report.latency else None
    before = ""
    if lossless:
        before = f"Without changing a prediction, {lossless.changes} made it {times(lossless.speedup)} as fast. "
    actions = Counter(unit.action for unit in report.removed)
    if not actions:
        return f"{before}Nothing was removed."
    kinds = ", ".join(f"{n} {ACTIONS[action]}" for action, n in sorted(actions.items(), key=lambda item: item[0]))
    return f"{before}{len(report.removed)} of {len(report.units)} removable units were removed or narrowed: {kinds}."


def _adapted(report: "RunReport") -> str:
    return f"Nothing was removed; the model was adapted to {plural(report.samples.n_fit, 'unlabelled sample')}."


def _exits(report: "RunReport") -> str:
    """Where samples may leave, and when."""
    exits = report.exits
    if exits is None or not exits.exits:
        return "No exit was worth its time."
    if exits.threshold > NEVER_SURE:
        when = f"the threshold is {probability(exits.threshold)}, which no probability reaches: none leaves early"
    else:
        values = [exit.threshold for exit in exits.exits]
        bounds = dict.fromkeys(probability(value) for value in (min(values), max(values)))
        when = f"one does where its prediction has a probability of at least {' to '.join(bounds)}"
    return f"Samples may leave behind {plural(len(exits.exits), 'block')}; {when}."


def _student(report: "RunReport") -> str:
    """What a student was trained on, and with whom."""
    lesson, steps = report.lesson, report.training.steps if report.training else 0
    if lesson is None:
        return ""
    chosen = f"{len(lesson.sample_names)} of {plural(lesson.n_samples, 'labelled sample')}"
    selector = f", chosen by {report.methods['select'].name}" if "select" in report.methods else ""
    teacher = (
        f", with the predictions of {lesson.teacher} at a weight of {number(lesson.alpha)}" if lesson.alpha else ""
    )
    return f"Trained for {plural(steps, 'step')} on {chosen}{selector}{teacher}."


def target_sentence(report: "RunReport") -> str:
    """Whether the target is met; "" where none was set."""
    target = report.target
    if target is None:
        return ""
    # The speedup first: machines change their pace between planning and the last measurement, ratios do not.
    measured = f": measured {times(report.latency.speedup.median)} as fast" if report.latency else ""
    verdict = f"is {'met' if target.met else 'missed'}{' within the spread' if target.within_spread else ''}"
    return f"The target, {target.asked}, {verdict}{measured}."


def before_after(report: "RunReport") -> list[Row]:
    """Rows of the table: what, before, after, change."""
    rows = [] if report.latency is None else _latency_rows(report.latency)
    model, student = report.model, report.student
    if report.kind == "student":
        rows += [("Parameters", "", count(student.parameters), ""), ("MACs per sample", "", count(student.macs), "")]
    else:
        for name, before, after in (
            ("Parameters", model.parameters, student.parameters), ("MACs per sample", model.macs, student.macs),
        ):  # fmt: skip
            rows.append((name, count(before), count(after), change(before, after)))
    agreement = f"Agreement with {compared_with(report)}"
    rows += _agreement_row(f"{agreement}, before distillation", report.agreement_before)
    rows += _agreement_row(agreement + ", at the end" * bool(report.training), report.agreement)
    return rows + _accuracy_rows(report)


def _latency_rows(latency: "LatencyReport") -> list[Row]:
    original, compressed, size = latency.original, latency.compressed, latency.batch_size
    faster = f"{times(latency.speedup.median)} as fast"
    rows = [(f"Milliseconds per batch of {size}", spread_of(original), spread_of(compressed), faster)]
    if latency.lossless:
        words, gained = f"… after {latency.lossless.changes} alone", f"{times(latency.lossless.speedup)} as fast"
        rows.append((words, "", spread_of(latency.lossless.timing), gained))
    before, after = (1000 * size / timing.median_ms if timing.median_ms else None for timing in (original, compressed))
    return [*rows, ("Samples per second", number(before), number(after), change(before, after))]


def _agreement_row(name: str, agreement: "Proportion | None") -> list[Row]:
    return [] if agreement is None else [(name, "", interval_of(agreement), "")]


def _accuracy_rows(report: "RunReport") -> list[Row]:
    if report.lesson is None or report.lesson.accuracy is None:
        return []
    student, teacher = report.lesson.accuracy, report.lesson.teacher_accuracy
    words = f"Accuracy on {plural(student.n, 'held-out sample')}"
    return [(words, "" if teacher is None else interval_of(teacher), interval_of(student), "")]


def spread_of(timing: "Timing") -> str:
    """Median milliseconds with their quartiles."""
    return spread(timing.median_ms, timing.low_ms, timing.high_ms)


def interval_of(share: "Proportion") -> str:
    """A share with its interval."""
    return interval(share.share, share.low, share.high)


def best_step(report: "RunReport") -> str:
    """Which weights training kept; "" where nothing was trained."""
    training = report.training
    if training is None:
        return ""
    if training.rolled_back:
        return "the start was better and was restored"
    start = f", averaged with the start, which counts {percent(training.start_weight)}" if training.start_weight else ""
    return f"the weights of step {training.best_step} were kept{start}"


def shown(value: object) -> str:
    """Any setting, readable."""
    if value is None or value in ("", [], {}, ()):
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(item)}" for name, item in value.items())
    return str(value)
