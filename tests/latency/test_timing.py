"""The timing protocol, with a clock that the test turns."""

import dataclasses

import pytest
import torch
from torch import nn

from ttmpd.errors import InvalidValueError
from ttmpd.latency import table as savings
from ttmpd.latency.device import machine
from ttmpd.latency.table import UnitLatency
from ttmpd.latency.timing import Timings, interleaved, quartiles, time_models
from ttmpd.models.run import evaluating
from ttmpd.records import WidthUnit
from ttmpd.surgery.units.channel import Channel
from ttmpd.testing.tiny_models import example_of_kind, tiny_model, tiny_units


class Clock:
    """Stands still unless a call takes its time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        """A candidate that takes the given seconds in turn, the last ones for ever."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_every_candidate_runs_once_per_round_in_a_changing_order():
    clock = Clock()
    interleaved({n: clock.call(n, 0.001) for n in "abcd"}, rounds=10, warmup=2, clock=clock)
    rounds = [clock.calls[i : i + 4] for i in range(0, len(clock.calls), 4)]
    assert len(rounds) == 12
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3


def test_warm_up_is_run_and_not_counted():
    clock = Clock()
    found = interleaved({"a": clock.call("a", 9.0, 9.0, 0.001, 0.002, 0.003)}, rounds=3, warmup=2, clock=clock)
    assert found.ms["a"] == pytest.approx((1.0, 2.0, 3.0))
    assert len(clock.calls) == 5


def test_medians_quartiles_and_ratio_by_hand():
    rounds = Timings({"slow": (10.0, 20.0, 30.0, 40.0, 50.0), "fast": (5.0, 5.0, 10.0, 40.0, 10.0)})
    timing = rounds.timing("slow")
    assert (timing.low_ms, timing.median_ms, timing.high_ms, timing.n_rounds) == (20.0, 30.0, 40.0, 5)
    # Round by round: 2, 4, 3, 1, 5. The ratio of the medians would be 3 too, its quartiles would not.
    ratio = rounds.ratio("slow", "fast")
    assert (ratio.low_ms, ratio.median_ms, ratio.high_ms) == (2.0, 3.0, 4.0)


def test_ratio_is_taken_within_rounds():
    rounds = Timings({"slow": (10.0, 100.0), "fast": (5.0, 50.0)})  # a busy second round
    assert rounds.ratio("slow", "fast").median_ms == 2.0
    assert rounds.ratio("slow", "fast").low_ms == 2.0


def test_quartiles_of_one_value():
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_fast_calls_get_more_rounds():
    clock = Clock()
    found = interleaved({"a": clock.call("a", 0.25)}, rounds=2, warmup=0, min_seconds=1.5, clock=clock)
    assert len(found.ms["a"]) == 6


def test_rounds_end_even_when_the_seconds_are_never_reached():
    clock = Clock()
    found = interleaved({"a": clock.call("a", 0.0)}, rounds=2, warmup=1, min_seconds=5.0, clock=clock)
    assert len(found.ms["a"]) == 40


def timed_until(precision, *seconds):
    """How many rounds it takes a steady candidate and one of the given seconds in turn."""
    clock = Clock()
    candidates = {"a": clock.call("a", 1.0), "b": clock.call("b", *seconds)}
    found = interleaved(candidates, rounds=5, warmup=0, max_seconds=20.0, precision=precision, clock=clock)
    return len(found.ms["a"])


def test_rounds_go_on_until_the_ratio_is_known():
    assert timed_until(0.01, 1.0) == 5
    assert timed_until(0.01, *[0.9, 1.1] * 2, 1.0) > 5
    assert timed_until(0.5, *[0.9, 1.1] * 2, 1.0) == 5


def test_a_ratio_that_is_never_known_takes_twice_as_long_at_most():
    assert timed_until(0.0, *[0.5, 1.5] * 50) == 20  # 40 seconds


@pytest.mark.parametrize(("n", "rounds", "warmup"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_nothing_to_time_is_refused(n, rounds, warmup):
    candidates = {str(i): lambda: None for i in range(n)}
    with pytest.raises(InvalidValueError, match="timing"):
        interleaved(candidates, rounds=rounds, warmup=warmup)


def test_models_are_timed_in_eval_mode_without_gradients_and_left_as_found():
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Watch(2, 2).train()
    found = time_models({"one": model, "same": model}, torch.zeros(1, 2), rounds=3, min_seconds=0.0)
    assert set(seen) == {(False, False)}
    assert model.training
    assert len(found.ms["one"]) == len(found.ms["same"]) == 3


def test_machine_says_what_the_milliseconds_belong_to():
    found = machine("cpu")
    assert found.type == "cpu"
    assert found.threads == torch.get_num_threads()


# --- members


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0, 3.0, 2.0], [4.0, 3.0, 2.0]),
        ([4.0, 2.0, 3.0, 1.0], [4.0, 2.5, 2.5, 1.0]),
        ([2.0, 3.0, 4.0], [3.0, 3.0, 3.0]),  # the whole is noise, too
        ([3.0, 1.0, 2.0, 3.0], [3.0, 2.0, 2.0, 2.0]),
    ],
)
def test_fewer_members_never_take_longer(values, expected):
    assert savings._falling(values) == pytest.approx(expected)


def test_noise_adds_up_to_smaller_savings_than_with_a_running_minimum():
    # Every width takes the same time: whatever is saved is noise.
    noise = 10 + torch.randn(500, 9, generator=torch.Generator().manual_seed(0))
    pooled = [savings._falling(values.tolist()) for values in noise]
    mean = sum(values[0] - values[4] for values in pooled) / len(pooled)
    running = float((noise[:, 0] - noise[:, :5].min(1).values).mean())
    assert 0 <= mean < 0.6 * running


def test_of_many_widths_every_second_one_is_timed_and_the_others_lie_on_the_line():
    widths = (56, 48, 40, 32, 24, 16, 8)
    unit = WidthUnit("channel", "b", "Conv2d", (4, 8, 8), "channels_first", 1, 1, 64, ("a",), ("b",), widths)
    assert savings._timed_widths(unit) == (56, 40, 24, 8)
    assert savings._timed_widths(dataclasses.replace(unit, widths=(32, 16))) == (32, 16)
    median = {"0 unit": 10.0, "0 56": 9.0, "0 40": 9.5, "0 24": 5.0, "0 8": 4.0}  # 40 took longer than 56: noise
    timing = savings._timing(unit, 0, median)
    wanted = {56: 9.25, 48: 9.25, 40: 9.25, 32: 7.125, 24: 5.0, 16: 4.5, 8: 4.0}
    saved = {n: timing.saved_ms("narrow", n) for n in wanted}
    assert saved == pytest.approx({n: 10.0 - ms for n, ms in wanted.items()})
    assert timing.ms == pytest.approx(6.0 * 64 / 56)


def test_a_unit_is_timed_on_the_list_that_it_was_given_even_if_the_model_goes_on_filling_it():
    class Layer(nn.Module):
        def __init__(self, n_inputs: int) -> None:
            super().__init__()
            self.squeeze, self.grow = nn.Conv2d(n_inputs, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, features):
            return self.grow(self.norm(self.squeeze(torch.cat(features, 1))).relu())

    class Dense(nn.Module):
        """As DenseNet does it: one list, to which every layer's answer is appended."""

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(Layer(n) for n in (3, 7, 11, 15)), nn.Linear(19, 3)

        def forward(self, x):
            features = [x]
            for layer in self.layers:
                features.append(layer(features))
            return self.head(torch.cat(features, 1).mean((2, 3)))

    torch.manual_seed(0)
    model, batch = Dense().eval(), torch.randn(4, 3, 8, 8)
    units = Channel().find(model, batch).units
    assert [unit.path for unit in units] == [f"layers.{n}.grow" for n in range(4)]
    timings = savings.time_units(model, units, batch, rounds=1, min_seconds=0.0)
    assert [timing.unit for timing in timings] == [unit.id for unit in units]
    with evaluating(model):
        given = savings._recorded_calls(model, ["layers.0", "layers.2"], batch)
    assert [len(given[f"layers.{n}"][0][0]) for n in (0, 2)] == [1, 3]


def test_members_save_no_more_than_the_block_that_holds_them() -> None:
    model, samples = example_of_kind("channel")
    inside = Channel().find(model, samples.batch(slice(2))).units[0]
    block = dataclasses.replace(tiny_units(tiny_model())[0], path=inside.path.rpartition(".")[0])
    elsewhere = dataclasses.replace(inside, path="other.conv", consumers=("other.conv",), producers=("other.first",))
    widths = {"8": 3.0, "0": 0.0}
    made = [
        UnitLatency(block.id, 2.0, {}),
        *(UnitLatency(unit.id, 6.0, {}, widths) for unit in (inside, elsewhere)),
    ]
    whole, bounded, free = savings._bounded([block, inside, elsewhere], made)
    assert (whole, free) == (made[0], made[2])
    assert bounded.ms == 2.0
    assert bounded.widths == {"8": 1.0, "0": 0.0}
