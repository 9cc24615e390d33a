"""Samples of a stream in bounded memory: a uniform choice of everything seen, and the last few."""

import random
import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ttmpd.data.preprocessing import Preprocessing
from ttmpd.errors import InvalidValueError

LARGEST = 65504.0
"""Values beyond this do not fit half precision; a sample that holds one is not kept."""
_ON_GRID = 0.05  # of a grey level: what float32 may lose between normalising and going back


class Reservoir:
    """A uniform sample of all usable rows of a stream: algorithm R, safe under concurrent calls.

    Rows are kept as 8-bit pixels where the preprocessing is known and all of them are pixels that went through it,
    which is exact, else in half precision. Memory is ``capacity`` times the values of a row, of one or two bytes each.

    Args:
        capacity: rows that are kept.
        preprocessing: the model's own, when known.
        seed: makes the choice repeatable for one stream in one order.

    Raises:
        InvalidValueError: ``capacity`` is not positive.

    Example:
        >>> reservoir = Reservoir(2)
        >>> reservoir.add(torch.tensor([[1.0], [2.0], [float("nan")], [3.0]]))
        3
        >>> len(reservoir), reservoir.n_seen, reservoir.n_refused
        (2, 3, 1)

    Source: algorithm R, Waterman, in Vitter, 1985 (Random sampling with a reservoir).
    """

    def __init__(self, capacity: int, preprocessing: Preprocessing | None = None, seed: int = 0) -> None:
        if capacity < 1:
            raise InvalidValueError(f"capacity must be at least 1, but got {capacity!r}")
        self.capacity, self.preprocessing = capacity, preprocessing
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._epoch = 0
        self._clear()

    def _clear(self) -> None:
        self.n_seen = self.n_refused = 0
        self._rows: Tensor | None = None
        self._written = torch.zeros(self.capacity, dtype=torch.long)  # which row of the stream lies in each place

    def __len__(self) -> int:
        return min(self.n_seen, self.capacity)

    @property
    def n_bytes(self) -> int:
        """Memory that the kept rows take."""
        rows = self._rows
        return 0 if rows is None else rows.nbytes

    def reset(self) -> None:
        """Forget all rows; the next ones may have another shape."""
        with self._lock:
            self._epoch += 1
            self._clear()

    def add(self, batch: Tensor) -> int:
        """Offer a batch of floating values, (B, ...); the number of its rows that can be used.

        Rows with NaN, infinity or values beyond ``LARGEST``, and rows shaped unlike the first, are refused and counted.

        Cost: the lock is held while places are drawn, and while drawn rows are written; not while values are looked at.
        """
        batch = batch.detach()
        usable = _usable(batch)
        with self._lock:
            if self._rows is not None and batch.shape[1:] != self._rows.shape[1:]:
                usable = []
            self.n_refused += len(batch) - len(usable)
            epoch, places = self._epoch, self._draw(usable)
        if places:
            index, slots, numbers = zip(*places, strict=True)
            rows = batch[list(index)].cpu()
            self._write(epoch, self._compact(rows), slots, numbers)
        return len(usable)

    def _draw(self, usable: Sequence[int]) -> list[tuple[int, int, int]]:
        """(row of the batch, place, number in the stream) of those that are taken in."""
        drawn = []
        for row in usable:
            self.n_seen += 1
            place = self.n_seen - 1 if self.n_seen <= self.capacity else self._rng.randrange(self.n_seen)
            if place < self.capacity:
                drawn.append((row, place, self.n_seen))
        return drawn

    def _write(self, epoch: int, rows: Tensor, places: Sequence[int], numbers: Sequence[int]) -> None:
        with self._lock:
            if epoch != self._epoch:  # emptied in between
                return
            if self._rows is None:
                self._rows = torch.empty(self.capacity, *rows.shape[1:], dtype=rows.dtype)
            if rows.shape[1:] != self._rows.shape[1:]:  # two first batches at once
                return
            if rows.dtype != self._rows.dtype:
                rows, self._rows = self._halves(rows), self._halves(self._rows)
            for row, place, number in zip(rows, places, numbers, strict=True):
                if number > self._written[place]:  # callers may come here in another order than they drew
                    self._rows[place], self._written[place] = row, number

    def _compact(self, rows: Tensor) -> Tensor:
        """Pixels where going back to them loses nothing, else half precision."""
        stored = self._rows
        if self.preprocessing is None or rows.shape[1:] != torch.Size(self.preprocessing.input_size):
            return rows.half()
        if stored is not None and stored.dtype != torch.uint8:
            return rows.half()
        mean, std = self._scale()
        levels = (rows.float() * std + mean) * 255
        pixels = levels.round()
        exact = (levels - pixels).abs().max() < _ON_GRID and pixels.min() >= 0 and pixels.max() <= 255
        return pixels.to(torch.uint8) if exact else rows.half()

    def _halves(self, rows: Tensor) -> Tensor:
        if rows.dtype != torch.uint8:
            return rows
        mean, std = self._scale()
        return ((rows.float() / 255 - mean) / std).half()

    def _scale(self) -> tuple[Tensor, Tensor]:
        preprocessing = self.preprocessing
        assert preprocessing is not None  # pixels are made with it alone
        return torch.tensor(preprocessing.mean).view(-1, 1, 1), torch.tensor(preprocessing.std).view(-1, 1, 1)

    def rows(self) -> Tensor:
        """A copy of the rows that are kept, (n, ...): uint8 pixels, or values in half precision."""
        with self._lock:
            return torch.empty(0) if self._rows is None else self._rows[self._written > 0]


class Recent:
    """The last few rows of a stream, as they came, on the device on which they came.

    Args:
        capacity: rows that are kept.
        per_batch: rows that are taken of one batch; they are copied.
    """

    def __init__(self, capacity: int = 64, per_batch: int = 16) -> None:
        self.capacity, self.per_batch = capacity, per_batch
        self._rows: deque[Tensor] = deque(maxlen=capacity)
        self._lock = threading.Lock()

    def add(self, batch: Tensor) -> None:
        """Take the first rows of a batch."""
        rows = batch[: self.per_batch].detach().clone()
        with self._lock:
            if self._rows and self._rows[-1].shape != rows.shape[1:]:
                self._rows.clear()
            self._rows.extend(rows)

    def rows(self) -> Tensor | None:
        """The finite rows that are kept, (n, ...); None where there are none."""
        with self._lock:
            rows = list(self._rows)
        finite = [row for row in rows if bool(torch.isfinite(row).all())]
        return torch.stack(finite) if finite else None

    def reset(self) -> None:
        """Forget all rows."""
        with self._lock:
            self._rows.clear()


def _usable(batch: Tensor) -> list[int]:
    """Positions of the rows that can be kept."""
    if not batch.is_floating_point() or batch.dim() < 2 or not batch.numel():
        return []
    # NaN makes both NaN, which fails every comparison; two such passes are many times faster than isfinite.
    flat = batch.flatten(1)
    usable: list[int] = ((flat.amax(1) <= LARGEST) & (flat.amin(1) >= -LARGEST)).nonzero().flatten().tolist()
    return usable
