"""Every method that has a file x every check of its verb; and the checks themselves, on methods that break them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.adapt.none import NoAdaptation
from ttmpd.errors import InvalidValueError, UnknownMethodError
from ttmpd.method import from_dict, method_class, names
from ttmpd.plan.greedy import Greedy
from ttmpd.plan.knapsack import Knapsack
from ttmpd.records import Score
from ttmpd.score.base import Scorer
from ttmpd.select.base import Selector
from ttmpd.surgery.units.base import DepthUnits
from ttmpd.surgery.units.block import Block
from ttmpd.testing import (
    EXPECTED_FAILURES,
    adapt,
    all_methods,
    checks_for,
    expected_failures,
    methods,
    plan,
    score,
    select,
    units,
)
from ttmpd.testing.tiny_models import assert_untouched


def _cases() -> Iterator[Any]:
    for verb, name in all_methods():
        reasons = expected_failures(verb, name)
        for check in checks_for(verb):
            reason = reasons.get(check.__name__)
            marks = [pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)] if reason else []
            yield pytest.param(verb, name, check, id=f"{verb}-{name}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("verb", "name", "check"), list(_cases()))
def test_contract(verb, name, check):
    check(method_class(verb, name)())  # raises AssertionError


def test_every_verb_has_methods():
    methods = all_methods()
    assert {verb for verb, _ in methods} == {
        "select",
        "adapt",
        "units",
        "score",
        "plan",
        "distill",
        "early_exit",
        "runtimes",
        "tasks",
    }
    assert {("score", "ttmpd"), ("plan", "knapsack"), ("distill", "one_time"), ("units", "block")} <= set(methods)


def test_expected_failures_name_methods_and_checks_that_exist():
    for verb, name in EXPECTED_FAILURES:
        known = {check.__name__ for check in checks_for(verb)}
        assert name in names(verb)
        assert set(expected_failures(verb, name)) <= known


# --- the checks find what they look for


def test_untouched_finds_every_kind_of_trace(net, samples):
    def leave_hook() -> None:
        net.stem.register_forward_hook(lambda *_: None)

    def change_weight() -> None:
        net.head.weight.data[0, 0] += 1

    def change_buffer() -> None:
        net.stem[1].running_mean += 1

    def change_gradient() -> None:
        list(net.parameters())[1].grad.zero_()

    def drop_gradient() -> None:
        net.zero_grad(set_to_none=True)

    def unfreeze() -> None:
        net.requires_grad_(True)

    def to_eval() -> None:
        net.eval()

    def add_attribute() -> None:
        net.blocks[0].note = 1

    def stub() -> None:
        net.blocks[0].forward = lambda x: x

    def exchange() -> None:
        net.dropout = nn.Dropout(0.0)

    def change_pixel() -> None:
        samples.inputs[0] += 1

    def draw() -> None:
        torch.rand(1)

    traces = (
        leave_hook, change_weight, change_buffer, change_gradient, drop_gradient, unfreeze, to_eval, add_attribute,
        stub, exchange, change_pixel, draw,
    )  # fmt: skip
    for trace in traces:
        with pytest.raises(AssertionError), assert_untouched(net, samples):
            trace()
    with assert_untouched(net, samples):
        pass


class Constant(Scorer):
    """Wrong on purpose: touches nothing and knows nothing."""

    def scores(self, job):
        return (Score("x", "drop", 1e9),)


class Careless(Knapsack.__mro__[1]):  # type: ignore[misc]
    """Wrong on purpose: chooses whatever comes first."""

    def choose(self, options, needed_ms, *, seed=0):
        return tuple(options[:1])


class WrongDrop(DepthUnits):  # type: ignore[misc]
    """Wrong on purpose: it leaves the unit in."""

    def search(self, observation):
        return Block().search(observation)

    def example(self, n=4):
        return Block().example(n)

    def drop(self, student, unit):
        pass


class InPlace(Adapter):
    """Wrong on purpose: changes the model that it was given, by the state it finds, and says nothing."""

    def adapt(self, teacher, samples, *, batch_size=64, seed=0):
        next(teacher.parameters()).data.add_(torch.rand(()))
        return Adapted(teacher, "")


class Repeating(Selector):
    """Wrong on purpose: the same sample again and again, drawn from the state it finds."""

    source = "none"

    def choose(self, teacher, pool, n, labels, *, batch_size, seed):
        return [int(torch.randint(len(pool), ()))] * n


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (Constant(), score.check_score_complete),
        (Constant(), score.check_score_edges),
        (Careless(), plan.check_plan_meets),
        (Careless(), plan.check_plan_unreachable),
        (Careless(), plan.check_plan_of_nothing),
        (WrongDrop(), units.check_masked_equals_cut),
        (WrongDrop(), units.check_parameters_fall),
        (Constant(), methods.check_builds_bare),
        (InPlace(), adapt.check_adapt_untouched),
        (InPlace(), adapt.check_adapt_repeats),
        (InPlace(), adapt.check_adapt_edges),
        (Repeating(), select.check_select_positions),
        (Repeating(), select.check_select_repeats),
        (Repeating(), select.check_select_untouched),
        (Repeating(), select.check_select_edges),
    ],
)
def test_checks_reject_wrong_methods(wrong, check):
    with pytest.raises(AssertionError):
        check(wrong)


# --- methods as plain data


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownMethodError, match="knapsack") as caught:
        method_class("plan", "nothing")
    assert caught.value.choices == names("plan")
    assert "base" not in caught.value.choices


def test_the_null_object_comes_back_from_data():
    assert from_dict("adapt", NoAdaptation().to_dict()) == NoAdaptation()


def test_settings_are_parsed_from_text_to_the_type_of_the_default():
    method = method_class("score", "ttmpd")().with_settings(ridge="0.5", max_samples="7")
    assert (method.ridge, method.max_samples) == (0.5, 7)
    distiller = method_class("distill", "one_time")().with_settings(train_norm="false", views="2")
    assert (distiller.train_norm, distiller.views) == (False, 2)
    assert method_class("adapt", "norm")().with_settings(weights="0,0.5").weights == (0.0, 0.5)


@pytest.mark.parametrize(
    ("verb", "name", "settings", "message"),
    [
        ("score", "ttmpd", {"rigde": 1}, "rigde"),
        ("score", "ttmpd", {"ridge": "much"}, "float"),
        ("score", "ttmpd", {"ridge": -1.0}, "ttmpd.ridge"),
        ("distill", "one_time", {"train_norm": "perhaps"}, "true or false"),
        ("distill", "one_time", {"views": 0}, "one_time.views"),
        ("plan", "greedy", {"depth": 1}, "depth"),
        ("plan", "greedy", {"step": 0.0}, "greedy.step"),
        ("units", "block", {"depth": 1}, "none"),
        ("select", "puma", {"norm": "l7"}, "l2, linf"),
    ],
)
def test_wrong_settings_are_refused(verb, name, settings, message):
    with pytest.raises(InvalidValueError, match=message):
        method_class(verb, name)().with_settings(**settings)


def test_methods_are_frozen_values():
    assert Greedy() == Greedy()
    assert Knapsack(max_front=5) != Knapsack()
    with pytest.raises(AttributeError):
        Knapsack().max_front = 3  # type: ignore[misc]
