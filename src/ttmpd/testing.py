"""The contract of every method as checks that run in about a second each, on a model of a few thousand weights.

    for check in checks_for("score"):
        check(MyScorer())

A check raises :class:`AssertionError` that says what was broken. :func:`methods_found` lists the methods by their files
and :func:`expected_failures` the checks that a method is known not to pass, with the reason.
"""

import copy
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.adapt.base import Adapter
from ttmpd.distill.base import Distiller, Work
from ttmpd.errors import BudgetUnreachableError
from ttmpd.guard import held_out_check
from ttmpd.method import VERBS, Method, from_dict, names
from ttmpd.modules import clone, count_parameters, evaluating, find_head
from ttmpd.plan.base import Planner, most_saved
from ttmpd.records import ACTIONS, Option, Samples, Score, Targets, Unit
from ttmpd.score.base import Scorer
from ttmpd.select.base import Selector
from ttmpd.specimens import TinyNet, require, tiny_model, tiny_samples, tiny_units, untouched
from ttmpd.units.base import Kind
from ttmpd.units.block import Block

Check = Callable[[Any], None]


def methods_found() -> tuple[tuple[str, str], ...]:
    """(verb, name) of every method that has a file."""
    return tuple((verb, name) for verb in VERBS for name in names(verb))


def checks_for(verb: str) -> tuple[Check, ...]:
    """The checks that every method of a verb passes."""
    return (*_CHECKS[""], *_CHECKS[verb])


def expected_failures(verb: str, name: str) -> dict[str, str]:
    """Check name -> why this method does not pass it."""
    return dict(_EXPECTED_FAILURES.get((verb, name), {}))


def quick(method: Method) -> Method:
    """The method with as few training steps as a check needs."""
    few = {"steps": 3, "batch": 6, "train_batch": 6}
    return method.with_settings(**{key: value for key, value in few.items() if hasattr(method, key)})


def _twice(run: Callable[[], Any]) -> tuple[Any, Any]:
    """The answers of two runs that start from different random states."""
    answers = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            answers.append(run())
    return answers[0], answers[1]


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


# ----------------------------------------------------------------------------------------------------------- any method


def check_builds_bare(method: Method) -> None:
    """The class builds without arguments, and says where the method comes from."""
    require(isinstance(type(method)(), type(method)), "a method must build without arguments")
    require(bool(type(method).source), "a method must name its source")


def check_hashable(method: Method) -> None:
    """Equal methods have equal hashes."""
    require(hash(method) == hash(copy.copy(method)), "equal methods must have equal hashes")


def check_round_trip(method: Method) -> None:
    """A method comes back from its plain data, through JSON too."""
    verb = type(method).__module__.split(".")[-2]
    data = json.loads(json.dumps(method.to_dict(), allow_nan=False))
    again = from_dict(verb, data)
    require(again == method, f"a method must come back from {data!r}, but got {again!r}")


# ---------------------------------------------------------------------------------------------------------------- score


def _scores(scorer: Scorer, model: nn.Module, units: Sequence[Unit], n: int = 12, seed: int = 0) -> tuple[Score, ...]:
    few = quick(scorer)
    assert isinstance(few, Scorer)
    return few.score(model, units, tiny_samples(n), actions=ACTIONS, batch_size=8, seed=seed)


def check_score_untouched(scorer: Scorer) -> None:
    """Scoring changes nothing."""
    model, few, samples = tiny_model(), quick(scorer), tiny_samples()
    units = tiny_units(model)
    assert isinstance(few, Scorer)
    with untouched(model, samples):
        few.score(model, units, samples, batch_size=8)


def check_score_repeats(scorer: Scorer) -> None:
    """The same seed gives the same scores, whatever was drawn before."""
    model = tiny_model()
    units = tiny_units(model)
    first, second = _twice(lambda: _scores(scorer, model, units))
    require(first == second, "the same seed must give the same scores")


def check_score_complete(scorer: Scorer) -> None:
    """One finite score per unit and action that is declared."""
    model = tiny_model()
    units = tiny_units(model)
    scores = _scores(scorer, model, units)
    wanted = [(unit.id, action) for unit in units for action in type(scorer).actions]
    found = [(score.unit, score.action) for score in scores]
    require(sorted(found) == sorted(wanted), f"scores must be one per unit and action, but got {found}")
    require(all(math.isfinite(score.harm) for score in scores), "scores must be finite")


def check_score_edges(scorer: Scorer) -> None:
    """No units give no scores; one sample is enough for finite ones of an ordinary size."""
    model = tiny_model()
    require(_scores(scorer, model, ()) == (), "no units must give no scores")
    scores = _scores(scorer, model, tiny_units(model), n=1)
    require(bool(scores) and all(abs(s.harm) < 1e6 for s in scores), "one sample must give scores of an ordinary size")


def check_score_of_nothing(scorer: Scorer) -> None:
    """A unit whose branch is all zeros adds nothing: it hurts least, under every action."""
    for number in range(3):
        model = tiny_model()
        for parameter in model.blocks[number].parameters():
            parameter.data.zero_()
        units = tiny_units(model)
        for action in type(scorer).actions:
            harms = [score.harm for score in _scores(scorer, model, units) if score.action == action]
            require(
                all(harms[number] < harm for i, harm in enumerate(harms) if i != number),
                f"a unit that adds nothing must hurt least ({action}), but unit {number} of {harms} does not",
            )


# ----------------------------------------------------------------------------------------------------------------- plan


def tiny_options(seed: int = 0, n_units: int = 7) -> tuple[Option, ...]:
    """Two options per unit: "drop" saves more and hurts more than "linear"; one stand-in costs time."""
    draw = random.Random(seed)
    options = []
    for number in range(n_units):
        saved, harm = draw.uniform(0.5, 2.0), draw.uniform(0.1, 1.0)
        options.append(Option(f"unit {number}", "drop", harm, saved))
        share = -0.1 if number == 0 else draw.uniform(0.3, 0.9)
        options.append(Option(f"unit {number}", "linear", harm * draw.uniform(0.2, 0.9), saved * share))
    return tuple(options)


def _budgets(options: Sequence[Option], n: int = 12) -> list[float]:
    return [most_saved(options) * i / n for i in range(n + 1)]


def check_plan_meets(planner: Planner) -> None:
    """Every reachable budget is met, with at most one option per unit, all of them from the offer."""
    for seed in range(5):
        options = tiny_options(seed)
        for needed in _budgets(options):
            chosen = planner.choose(options, needed, seed=seed)
            units = [option.unit for option in chosen]
            require(len(set(units)) == len(units), "a plan must choose one option per unit")
            require(set(chosen) <= set(options), "a plan must choose among the options")
            saved = sum(option.saved_ms for option in chosen)
            require(saved >= needed - 1e-6, f"a plan must save {needed} ms, but saves {saved}")


def check_plan_unreachable(planner: Planner) -> None:
    """What cannot be reached is said, with what can."""
    options = tiny_options()
    best = sum(max(o.saved_ms for o in options if o.unit == unit) for unit in {o.unit for o in options})
    for offer, most in ((options, best), ((), 0.0)):
        try:
            planner.choose(offer, best + 0.01)
        except BudgetUnreachableError as error:
            require(abs(error.best_ms - most) < 1e-9, f"best_ms must be {most}, but got {error.best_ms}")
        else:
            raise AssertionError("a plan that cannot be met must raise BudgetUnreachableError")


def check_plan_of_nothing(planner: Planner) -> None:
    """When nothing has to go, nothing is removed; not even where there is nothing."""
    require(planner.choose(tiny_options(), 0.0) == (), "a plan that need not save must remove nothing")
    require(planner.choose(tiny_options(), -1.0) == (), "a plan that need not save must remove nothing")
    require(planner.choose((), 0.0) == (), "no options must give an empty plan")


def check_plan_monotone(planner: Planner) -> None:
    """More time to keep never means more harm."""
    for seed in range(5):
        options = tiny_options(seed)
        harms = [sum(o.harm for o in planner.choose(options, needed, seed=seed)) for needed in _budgets(options)]
        rises = all(low <= high + 1e-9 for low, high in itertools.pairwise(harms))
        require(rises, f"harm must rise with what must be saved, but got {harms}")


def check_plan_repeats(planner: Planner) -> None:
    """The same seed gives the same plan, and Python's own random state is left alone."""
    options = tiny_options()
    state = random.getstate()
    plans = [planner.choose(options, 4.0, seed=3) for _ in range(2)]
    require(plans[0] == plans[1], "the same seed must give the same plan")
    require(state == random.getstate(), "the random state of Python must stay as it was")


# ---------------------------------------------------------------------------------------------------------------- units


def _found(kind: Kind) -> tuple[TinyNet, Tensor, tuple[Unit, ...]]:
    model, batch = tiny_model(), tiny_samples(4).batch(slice(None))
    units = kind.find(model, batch).units
    require(len(units) >= 2, "the model of the checks must hold at least two units")
    return model, batch, units


def _answer(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(batch)
    return answer


def check_units_untouched(kind: Kind) -> None:
    """Finding, masking and cutting change nothing; an earlier mask leaves no trace."""
    model, batch, units = _found(kind)
    with untouched(model):
        kind.find(model, batch)
        kind.cut(model, units)
        with kind.mask(model, units):
            pass
    require(kind.find(model, batch).units == units, "the same model must have the same units")


def check_masked_equals_cut(kind: Kind) -> None:
    """The masked model answers like the cut one, for each unit and for all together, and unlike the whole one."""
    model, batch, units = _found(kind)
    whole = _answer(model, batch)
    for chosen in [(), *((unit,) for unit in units), units]:
        with kind.mask(model, chosen):
            masked = _answer(model, batch)
        gap = float((masked - _answer(kind.cut(model, chosen), batch)).abs().max())
        require(gap <= 1e-5, f"masked output must equal cut output, but they differ by {gap} for {len(chosen)} units")
        require(torch.equal(masked, whole) == (not chosen), "a removal must change the answer, and nothing else may")
    require(torch.equal(_answer(model, batch), whole), "the model must answer as before once the mask is off")


def check_parameters_fall(kind: Kind) -> None:
    """As many weights go as the units say."""
    model, _, units = _found(kind)
    for chosen in ((), units[:1], units):
        gone = count_parameters(model) - count_parameters(kind.cut(model, chosen))
        stated = sum(unit.n_params for unit in chosen)
        require(gone == stated, f"{stated} parameters must go with {len(chosen)} units, but {gone} went")


def check_cuts_commute(kind: Kind) -> None:
    """The order of cuts does not matter, and building a stand-in draws nothing."""
    model, batch, units = _found(kind)
    first, second = units[:1], units[1:2]
    state = torch.get_rng_state()
    kind.stand_in(units[0])
    require(torch.equal(state, torch.get_rng_state()), "the random state of torch must stay as it was")
    answers = [
        _answer(student, batch)
        for student in (
            kind.cut(kind.cut(model, first), second),
            kind.cut(kind.cut(model, second), first),
            kind.cut(model, (*first, *second)),
        )
    ]
    require(torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2]), "cuts must commute")


def check_cut_exports(kind: Kind) -> None:
    """``torch.export`` takes the cut model, and the exported program answers alike."""
    model, batch, units = _found(kind)
    student = kind.cut(model, units[:1])
    program = torch.export.export(student, (batch,)).module()
    alike = torch.allclose(program(batch), _answer(student, batch), atol=1e-5)
    require(alike, "the exported program must answer alike")


# -------------------------------------------------------------------------------------------------------------- distill


def _student(teacher: nn.Module) -> nn.Module:
    return Block().cut(teacher, tiny_units(teacher)[1:2])


def _distilled(
    distiller: Distiller, teacher: nn.Module, student: nn.Module, n: int = 12, n_held: int = 6, **settings: Any
) -> tuple[Samples, Targets, Work]:
    """Run both phases; ``student`` is trained in place."""
    few = quick(distiller).with_settings(**settings)
    assert isinstance(few, Distiller)
    samples, held_out = tiny_samples(n), tiny_samples(n_held, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(folder=Path(folder), batch_size=8, amp="off")
        targets = few.prepare(teacher, samples, held_out, work)
        few.fit(student, samples, held_out, targets, work)
    return held_out, targets, work


def check_distill_untouched(distiller: Distiller) -> None:
    """Teacher, samples and random state stay; of the student only values change."""
    teacher, samples = tiny_model(dropout=0.5), tiny_samples()
    student = _student(teacher)
    flags = [p.requires_grad for p in student.parameters()]
    few = quick(distiller)
    assert isinstance(few, Distiller)
    with tempfile.TemporaryDirectory() as folder, untouched(teacher, samples):
        work = Work(folder=Path(folder), batch_size=8, amp="off")
        few.fit(student, samples, samples, few.prepare(teacher, samples, samples, work), work)
    require(flags == [p.requires_grad for p in student.parameters()], "requires_grad of the student must come back")
    require(not student.training, "the student must come back in eval mode")


def check_distill_repeats(distiller: Distiller) -> None:
    """The same seed gives the same weights, dropout or not."""

    def run() -> dict[str, Tensor]:
        teacher = tiny_model(dropout=0.5)
        student = _student(teacher)
        _distilled(distiller, teacher, student, n_held=0)
        return student.state_dict()

    require(_equal(*_twice(run)), "the same seed must give the same student")


def check_teacher_asked_once(distiller: Distiller) -> None:
    """When ``one_time``, no sample meets the teacher after ``prepare``; otherwise some do."""
    teacher, samples, held_out = tiny_model(), tiny_samples(), tiny_samples(4, seed=2)
    student, few, calls = _student(teacher), quick(distiller), 0
    assert isinstance(few, Distiller)

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with tempfile.TemporaryDirectory() as folder:
        work = Work(folder=Path(folder), batch_size=8, amp="off")
        targets = few.prepare(teacher, samples, held_out, work)
        handle = teacher.stem.register_forward_pre_hook(count)
        few.fit(student, samples, held_out, targets, work)
        handle.remove()
    once = type(distiller).one_time
    require((calls == 0) == once, f"one_time is {once}, but fit called the teacher {calls} times")
    require((targets.teacher is None) == once, "a method that is one_time must not keep the teacher, any other must")


def check_head_unchanged(distiller: Distiller) -> None:
    """The layer that gives the logits keeps its weights while others train."""
    teacher = tiny_model()
    student = _student(teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    head = find_head(student, tiny_samples(2).batch(slice(None)))
    _distilled(distiller, teacher, student, n_held=0)
    after = student.state_dict()
    require(head == "head", f"the head of the checked model must be found, but got {head}")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    require(not any(name.startswith("head.") for name in changed), "the head must stay as it was")
    require("stem.0.weight" in changed, "the weights before the head must be trained")


def check_never_worse(distiller: Distiller) -> None:
    """A ruinous learning rate leaves the student no worse on the held-out samples than it came."""
    teacher = tiny_model()
    student = clone(teacher)
    next(student.parameters()).data.mul_(1.02)  # nearly as good as the teacher: there is much to lose
    start = clone(student)
    held_out, targets, _ = _distilled(distiller, teacher, student, lr=1e3)
    before = held_out_check(start, held_out, targets, 8)
    after = held_out_check(student, held_out, targets, 8)
    assert before is not None
    assert after is not None
    require(not before().better_than(after()), f"the student must not get worse, but went from {before()} to {after()}")


def check_distill_edges(distiller: Distiller) -> None:
    """A single sample and nothing held out; no steps leave the student as it came."""
    teacher = tiny_model()
    _distilled(distiller, teacher, _student(teacher), n=1, n_held=0)
    student = _student(teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    _distilled(distiller, teacher, student, steps=0)
    require(_equal(student.state_dict(), before), "no steps must change nothing")


# ---------------------------------------------------------------------------------------------------------------- adapt


def check_adapt_untouched(adapter: Adapter) -> None:
    """Adaptation makes a new model."""
    model, samples = tiny_model(), tiny_samples()
    with untouched(model, samples):
        adapted = adapter.adapt(model, samples, batch_size=8)
    shared = {p.data_ptr() for p in adapted.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    require(not shared or adapted.model is model, "an adapted model must have weights of its own")


def check_adapt_repeats(adapter: Adapter) -> None:
    """The same seed gives the same model."""
    first, second = _twice(lambda: adapter.adapt(tiny_model(), tiny_samples(), batch_size=8).model.state_dict())
    require(_equal(first, second), "the same seed must give the same model")


def check_adapt_edges(adapter: Adapter) -> None:
    """A single sample gives finite answers; a model without batch statistics answers like before, or has adapted."""
    batch = tiny_samples(4).batch(slice(None))
    for n in (1, 2, 3, 9):
        adapted = adapter.adapt(tiny_model(), tiny_samples(n), batch_size=2).model
        with evaluating(adapted):
            require(bool(torch.isfinite(_answer(adapted, batch)).all()), f"{n} samples must give finite answers")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    result = adapter.adapt(plain, tiny_samples(), batch_size=8)
    require(result.model is plain or bool(type(adapter).needs), "a model without batch statistics must be handed on")
    require(bool(result.note), "a note must say what was done")


# --------------------------------------------------------------------------------------------------------------- select


def check_select_positions(selector: Selector) -> None:
    """As many positions as asked for, different ones, ascending, in the pool; with labels and without."""
    model, pool = tiny_model(), tiny_samples()
    for n, labels in ((1, None), (len(pool) - 1, None), (5, torch.arange(len(pool)) % 4)):
        chosen = selector.select(model, pool, n, labels=labels, batch_size=5)
        require(list(chosen) == sorted(set(chosen)) and len(chosen) == n, f"{n} must be chosen, but got {chosen}")
        inside = all(type(place) is int and 0 <= place < len(pool) for place in chosen)
        require(inside, f"positions must lie in the pool, but got {chosen}")


def check_select_repeats(selector: Selector) -> None:
    """The same seed gives the same choice, whatever was drawn before."""
    model, pool = tiny_model(dropout=0.5), tiny_samples(20)
    first, second = _twice(lambda: selector.select(model, pool, 9, batch_size=8, seed=3))
    require(first == second, "the same seed must give the same choice")


def check_select_untouched(selector: Selector) -> None:
    """Selecting changes nothing."""
    model, pool = tiny_model(dropout=0.5), tiny_samples()
    with untouched(model, pool):
        selector.select(model, pool, 4, batch_size=5)


def check_select_edges(selector: Selector) -> None:
    """A pool that holds no more is chosen whole; a single sample too; no sample breaks it, whatever its values."""
    model = tiny_model()
    for n in (1, 2, 3):
        whole = selector.select(model, tiny_samples(n), 3)
        require(whole == tuple(range(n)), f"a pool of {n} must be chosen whole, but got {whole}")
    values = tiny_samples().batch(slice(None))
    values[[0, 7]] = math.nan
    chosen = selector.select(model, Samples(values, tiny_samples().ids), 4, batch_size=5)
    require(len(set(chosen)) == 4, f"samples with NaN must not break the choice, but got {chosen}")
    if type(selector).looks:
        require(not {0, 7} & set(chosen), f"samples that give no finite answer must come last, but got {chosen}")


_CHECKS: dict[str, tuple[Check, ...]] = {
    "": (check_builds_bare, check_hashable, check_round_trip),
    "select": (check_select_positions, check_select_repeats, check_select_untouched, check_select_edges),
    "score": (
        check_score_untouched, check_score_repeats, check_score_complete, check_score_edges, check_score_of_nothing,
    ),
    "plan": (
        check_plan_meets, check_plan_unreachable, check_plan_of_nothing, check_plan_monotone, check_plan_repeats,
    ),
    "units": (
        check_units_untouched, check_masked_equals_cut, check_parameters_fall, check_cuts_commute, check_cut_exports,
    ),
    "distill": (
        check_distill_untouched, check_distill_repeats, check_teacher_asked_once, check_head_unchanged,
        check_never_worse, check_distill_edges,
    ),
    "adapt": (check_adapt_untouched, check_adapt_repeats, check_adapt_edges),
}  # fmt: skip

_EXPECTED_FAILURES: dict[tuple[str, str], dict[str, str]] = {
    ("score", "random"): {"check_score_of_nothing": "random harms know nothing of the unit: the control"},
    ("distill", "mimic"): {"check_never_worse": "the baseline has no guard: it is kept as its authors run it"},
}
