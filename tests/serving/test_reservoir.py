"""A uniform choice in bounded memory, whoever calls, and what is refused."""

import threading

import pytest
import torch

from ttmpd.data.preprocessing import Preprocessing
from ttmpd.errors import InvalidValueError
from ttmpd.serving.reservoir import Recent, Reservoir

PIXELS = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def prepared(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    return (pixels.float() / 255 - mean) / std


def numbers(reservoir: Reservoir) -> list[int]:
    return sorted(int(value) for value in reservoir.rows()[:, 0])


def test_every_row_of_a_stream_has_the_same_chance():
    n, capacity, runs = 60, 12, 400
    counts = torch.zeros(n)
    for seed in range(runs):
        reservoir = Reservoir(capacity, seed=seed)
        for batch in torch.arange(n, dtype=torch.float32)[:, None].split(7):
            reservoir.add(batch)
        counts[numbers(reservoir)] += 1
    expected = runs * capacity / n
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 100  # 59 degrees of freedom: 100 is exceeded by chance once in 1,500
    assert counts.sum() == runs * capacity


def test_the_same_stream_gives_the_same_choice():
    chosen = []
    for _ in range(2):
        reservoir = Reservoir(5, seed=3)
        for batch in torch.arange(100, dtype=torch.float32)[:, None].split(9):
            reservoir.add(batch)
        chosen.append(numbers(reservoir))
    assert chosen[0] == chosen[1]


def test_concurrent_callers_lose_nothing():
    reservoir = Reservoir(50)
    parts = torch.arange(2000, dtype=torch.float32)[:, None].split(250)  # half precision tells these apart

    def offer(part: torch.Tensor) -> None:
        for batch in part.split(3):
            reservoir.add(batch)

    threads = [threading.Thread(target=offer, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reservoir.n_seen == 2000
    assert len(set(numbers(reservoir))) == 50


def test_what_cannot_be_used_is_refused_and_counted():
    reservoir = Reservoir(10)
    batch = torch.ones(5, 4)
    batch[0, 1], batch[1, 2], batch[2, 3] = float("nan"), float("inf"), 1e5
    assert reservoir.add(batch) == 2
    assert reservoir.add(torch.ones(3, 7)) == 0  # another shape than the first
    assert reservoir.add(torch.ones(2, 4, dtype=torch.long)) == 0
    assert reservoir.add(torch.empty(0, 4)) == 0
    assert (reservoir.n_seen, reservoir.n_refused, len(reservoir)) == (2, 8, 2)


def test_a_reset_forgets_rows_and_shape():
    reservoir = Reservoir(4)
    reservoir.add(torch.ones(3, 2))
    reservoir.reset()
    assert (len(reservoir), reservoir.n_bytes, reservoir.rows().numel()) == (0, 0, 0)
    assert reservoir.add(torch.ones(3, 5)) == 3


def test_pixels_are_kept_exactly_in_a_byte_each():
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    reservoir = Reservoir(6, PIXELS)
    reservoir.add(prepared(pixels))
    assert torch.equal(reservoir.rows(), pixels)
    assert reservoir.n_bytes == 6 * 3 * 64


def test_values_between_pixels_are_kept_in_half_precision():
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    reservoir = Reservoir(8, PIXELS)
    reservoir.add(prepared(pixels))
    between = prepared(pixels) + 0.003
    reservoir.add(between)  # what is there goes to half precision with it
    rows = reservoir.rows()
    assert rows.dtype == torch.float16
    assert torch.allclose(rows.float(), torch.cat((prepared(pixels), between)), atol=2e-3)


def test_other_sizes_than_the_preprocessing_makes_are_not_taken_for_pixels():
    reservoir = Reservoir(4, PIXELS)
    reservoir.add(torch.zeros(2, 3, 16, 16))
    assert reservoir.rows().dtype == torch.float16


def test_the_memory_is_bounded_by_the_capacity():
    reservoir = Reservoir(16)
    for _ in range(100):
        reservoir.add(torch.randn(10, 3, 4, 4))
    assert reservoir.n_bytes == 16 * 48 * 2
    assert reservoir.rows().shape == (16, 3, 4, 4)


def test_a_capacity_must_be_positive():
    with pytest.raises(InvalidValueError, match="capacity must be at least 1"):
        Reservoir(0)


def test_recent_rows_are_the_last_ones_and_copies():
    recent = Recent(4, per_batch=3)
    batch = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    recent.add(batch)
    batch.fill_(9.0)
    recent.add(torch.tensor([[5.0], [float("nan")]]))
    found = recent.rows()
    assert found is not None
    assert found[:, 0].tolist() == [2.0, 3.0, 5.0]
    recent.add(torch.ones(1, 2))  # another shape begins anew
    found = recent.rows()
    assert found is not None
    assert found.shape == (1, 2)
    recent.reset()
    assert recent.rows() is None
