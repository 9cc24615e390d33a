"""Records check themselves; intervals against known values."""

import dataclasses
import json
import math

import pytest
import torch

from ttmpd.data.samples import Samples
from ttmpd.errors import InvalidValueError
from ttmpd.latency.timing import Timing
from ttmpd.records import DepthUnit, Option, Plan, Removal, Score, WidthUnit, unit_from_dict
from ttmpd.surgery.cut import cut


def unit(path: str = "blocks.0", **changes) -> DepthUnit:
    facts = {"shape": (6, 4, 4), "layout": "channels_first", "activation": "", "n_params": 1, "macs": 1}
    return DepthUnit(kind="block", path=path, module="Block", **(facts | changes))


def members(**changes) -> WidthUnit:
    facts = {"n_members": 4, "producers": ("a",), "consumers": ("blocks.0",), "widths": (3, 1)}
    return WidthUnit("head", "blocks.0", "B", (4, 4), "channels_last", 1, 1, **(facts | changes))


@pytest.mark.parametrize(
    "record",
    [unit(), unit(branch=True, form="pair", upstream=(("norm", "plain"), ("attention", "tuple"))), members()],
)
def test_units_and_removals_come_back_from_plain_data(record):
    action, kept = ("narrow", (1, 3)) if isinstance(record, WidthUnit) else ("drop", ())
    removal = Removal(record, action, kept)
    assert unit_from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert Removal.from_dict(json.loads(json.dumps(removal.to_dict()))) == removal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_members": 0}, "at least 1"),
        ({"consumers": ("b",)}, "must begin with its path"),
        ({"widths": (4,)}, "must lie below 4"),
        ({"form": "?"}, "form of"),
        ({"shape": ()}, "shape of"),
        ({"layout": "?"}, "layout of"),
    ],
)
def test_units_refuse_what_cannot_be(change, message):
    with pytest.raises(InvalidValueError, match=message):
        dataclasses.replace(members(), **change)


def test_only_narrowed_units_keep_members():
    with pytest.raises(InvalidValueError, match="only a unit that is narrowed"):
        Option("a", "drop", 1.0, 1.0, (1,))
    with pytest.raises(InvalidValueError, match="other units"):
        Option("a", "drop", 1.0, 1.0, holders=("b", "a"))
    with pytest.raises(InvalidValueError, match="action of 'a' must be one of"):
        Score("a", "conv", 1.0)


def test_options_of_units_that_hold_one_another_exclude_each_other():
    heads = Option("heads", "narrow", 1.0, 1.0, (0,), holders=("block", "attention"))
    attention, mlp = (Option(name, "drop", 1.0, 1.0, holders=("block",)) for name in ("attention", "mlp"))
    block = Option("block", "drop", 1.0, 1.0)
    for one, other in ((heads, heads), (heads, attention), (heads, block), (attention, block), (mlp, block)):
        assert one.excludes(other)
        assert other.excludes(one)
    assert not heads.excludes(mlp)
    assert not attention.excludes(mlp)


def test_unit_width_and_name():
    assert unit().channels == 6
    assert unit(shape=(5, 7), layout="channels_last").channels == 7
    assert unit().id == "blocks.0"
    assert members().id == "head:blocks.0"


@pytest.mark.parametrize("harm", [math.nan, math.inf, -math.inf])
def test_score_must_be_finite(harm):
    with pytest.raises(InvalidValueError, match="harm must be finite"):
        Score("x", "drop", harm)
    with pytest.raises(InvalidValueError, match="saved_ms must be finite"):
        Option("x", "drop", 0.0, harm)


def test_time_must_not_be_negative_but_a_saving_may():
    with pytest.raises(InvalidValueError, match="at least 0"):
        Timing(-1.0, 0.0, 0.0, 1)
    assert Option("x", "linear", 0.1, -0.5).saved_ms == -0.5


def test_a_unit_that_goes_with_another_is_refused_in_a_plan_and_in_a_cut():
    block, inner = unit(), unit("blocks.0.mlp")
    branch = dataclasses.replace(unit("blocks.1.down"), branch=True, upstream=(("blocks.1.up", "plain"),))
    crossing = dataclasses.replace(members(), path="blocks.2", producers=("blocks.1.up",), consumers=("blocks.2",))
    for pair in ((block, inner), (inner, block), (branch, crossing)):
        removals = tuple(Removal(u, "drop" if isinstance(u, DepthUnit) else "narrow", ()) for u in pair)
        with pytest.raises(InvalidValueError, match=f"must lie apart, but .*{pair[0].id}.*; leave one out"):
            Plan(removals, 0.0, 2.0, 1.0, 1.0)
        with pytest.raises(InvalidValueError, match="must lie apart"):
            cut(torch.nn.Identity(), removals)
    Plan((Removal(block, "drop"), Removal(branch, "drop")), 0.0, 2.0, 1.0, 1.0)


def test_plan_names_each_unit_once():
    twice = (Removal(unit(), "drop"), Removal(unit(), "linear"))
    with pytest.raises(InvalidValueError, match="each unit once"):
        Plan(twice, 0.0, 2.0, 1.0, 1.0)
    with pytest.raises(InvalidValueError, match="budget_ms"):
        Plan((), 0.0, 2.0, math.nan, 1.0)
    plan = Plan((Removal(unit(), "drop"), Removal(unit("blocks.1"), "linear")), 0.0, 2.0, 1.0, 1.0)
    assert plan.actions == {"blocks.0": "drop", "blocks.1": "linear"}


def test_samples_scale_pixels_by_the_models_mean_and_deviation():
    pixels = torch.tensor([[[[0]], [[255]]], [[[51]], [[102]]]], dtype=torch.uint8)
    samples = Samples(pixels, ("a", "b"), mean=(0.5, 0.0), std=(0.5, 2.0))
    batch = samples.batch(slice(None))
    assert batch.dtype == torch.float32
    assert batch.flatten().tolist() == pytest.approx([-1.0, 0.5, -0.6, 0.2])


def test_samples_leave_other_values_as_they_are():
    values = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    assert Samples(values, ("a",)).batch(slice(None)).tolist() == [[1.5, -2.0]]


def test_samples_have_one_id_each():
    with pytest.raises(InvalidValueError, match="one id each"):
        Samples(torch.zeros(3, 2), ("a", "b"))


def test_subset_keeps_inputs_ids_and_names_together():
    samples = Samples(torch.arange(4.0)[:, None], ("a", "b", "c", "d"), names=("0", "1", "2", "3"))
    few = samples.subset([2, 0])
    assert (few.inputs.flatten().tolist(), few.ids, few.names) == ([2.0, 0.0], ("c", "a"), ("2", "0"))
    assert len(samples.subset([])) == 0


def test_batches_cover_all_samples_in_order():
    samples = Samples(torch.arange(5.0)[:, None], tuple("abcde"))
    assert [batch.flatten().tolist() for batch in samples.batches(2)] == [[0, 1], [2, 3], [4]]


def test_batches_of_text_are_as_long_as_their_longest_sample():
    ids = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0], [1, 2, 3, 0]])
    samples = Samples(ids, tuple("abcd"), padding=0)
    assert [batch.tolist() for batch in samples.batches(2)] == [[[5, 6], [7, 0]], [[8, 0, 0], [1, 2, 3]]]
    assert samples.batch(slice(0, 2)).shape == (2, 4)


@pytest.mark.parametrize(("n_rounds", "error"), [(25, 0.1858), (100, 0.0929)])
def test_the_error_of_a_median_is_that_of_normal_noise(n_rounds, error):
    # Quartiles of a normal distribution lie 1.349 deviations apart; its median varies by sqrt(pi / 2n) of them.
    assert Timing(10.0, 9.5, 10.5, n_rounds).error_ms == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "is_image"), [((2, 3, 4, 4), True), ((2, 1, 4, 4), True), ((2, 6, 4, 4), False), ((2, 9), False)]
)
def test_is_image(shape, is_image):
    assert Samples(torch.zeros(shape), ("a", "b")).is_image is is_image


def test_samples_say_what_they_are_and_not_their_pixels():
    samples = Samples(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ("a", "b"), skipped=(("c", "broken"),))
    assert repr(samples) == "<2 samples of 3x8x8 uint8, 1 skipped>"
