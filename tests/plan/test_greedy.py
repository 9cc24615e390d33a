from ttmpd.plan.greedy import Greedy
from ttmpd.records import Option

A = Option("a", "drop", 2.0, 4.0)  # 0.5 harm per ms
B = Option("b", "drop", 1.0, 1.0)  # 1.0
C = Option("c", "drop", 0.2, 1.0)  # 0.2
D = Option("d", "drop", 0.0, -1.0)  # saves nothing


def test_least_harm_per_millisecond_first():
    options = [A, B, C, D]
    assert Greedy().choose(options, 0.5) == (C,)
    assert Greedy().choose(options, 1.5) == (C, A)
    assert Greedy().choose(options, 6.0) == (C, A, B)


def test_ties_go_by_name_and_not_by_order():
    options = [Option(name, "drop", 1.0, 1.0) for name in "zxy"]
    assert [o.unit_id for o in Greedy().choose(options, 2.0)] == ["x", "y"]


def test_the_action_is_changed_only_when_the_units_are_used_up():
    drop, linear = Option("a", "drop", 3.0, 2.0), Option("a", "linear", 0.1, 1.0)
    assert Greedy().choose([drop, linear, B], 1.0) == (linear,)
    assert Greedy().choose([drop, linear, B], 2.0) == (linear, B)
    assert set(Greedy().choose([drop, linear, B], 3.0)) == {drop, B}
