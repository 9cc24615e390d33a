import pytest

from ttmpd.latency.timing import Timings
from ttmpd.pipeline.report_data import latency_report, training_report
from ttmpd.records import Lossless, Plan
from ttmpd.training.loop import TrainingResult

PLAN = Plan((), 0.0, 20.0, 10.0, 10.0)


@pytest.mark.parametrize(("slower", "noisy"), [(1.1, False), (1.5, True)])
def test_timings_of_a_busy_machine_say_so(slower: float, noisy: bool) -> None:
    timings = Timings({"original": (20.0, 20.0, 20.0 * slower, 20.0 * slower), "compressed": (10.0,) * 4})
    assert ("The rounds differ much" in latency_report(timings, PLAN, 8).caution) == noisy


@pytest.mark.parametrize(("planned_ms", "moved"), [((), False), ((9.2,), False), ((8.0,), True), ((12.0,), True)])
def test_a_speedup_that_is_not_the_one_of_the_plan_says_so(planned_ms: tuple[float, ...], moved: bool) -> None:
    timings = Timings({"original": (20.0,) * 4, "compressed": (10.0,) * 4})
    caution = latency_report(timings, PLAN, 8, planned_ms).caution
    assert ("not the one that the plan was chosen for" in caution) == moved


def test_what_is_lossless_is_there_only_where_it_was_timed() -> None:
    lossless = Lossless((("conv", "norm"),))
    rounds = {"original": (20.0,) * 4, "compressed": (10.0,) * 4}
    assert latency_report(Timings(rounds), PLAN, 8, lossless=lossless).lossless is None
    report = latency_report(Timings(rounds | {"lossless": (16.0,) * 4}), PLAN, 8, lossless=lossless).lossless
    assert report is not None and (report.speedup, report.changes) == (1.25, "1 batch norms folded")


def test_training_keeps_its_checks_by_name() -> None:
    report = training_report(TrainingResult(4, "finished", False, 2, (1.0,), ((0, 0.5, 2.0), (2, 0.75, 1.0)), 0.25))
    assert [(check.step, check.agreement, check.loss) for check in report.checks] == [(0, 0.5, 2.0), (2, 0.75, 1.0)]
    assert (report.best_step, report.start_weight) == (2, 0.25)
