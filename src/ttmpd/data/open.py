"""Open samples: a folder of images, text, arrays, datasets, iterables; what cannot be used is reported, never fatal."""

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ttmpd.data import tables
from ttmpd.data.files import FORMS, place_of
from ttmpd.data.preprocessing import Preparation, Preprocessing
from ttmpd.data.rows import Indexed, Row, described
from ttmpd.data.samples import Samples
from ttmpd.data.sources import open_rows
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, SamplesError

_log = logging.getLogger("ttmpd")

STREAM_FACTOR = 20
"""Items of a stream that are read at most, for each sample that is wanted."""


def open_samples(
    data: Any,
    preprocessing: Preparation | None,
    *,
    num_samples: int | None = None,
    enough: int | None = None,
    seed: int = 0,
) -> Samples:
    """The samples at ``data``, prepared for a model.

    Args:
        data: a folder of images, a .npz or .npy file, a Samples record, a tensor, an array, a Dataset, a DataLoader, or
            an iterable of samples or of batches; labels beside the inputs are ignored. uint8 is taken for pixels
            (NHWC, NCHW or NHW) and goes through ``preprocessing``; floating values go to the model as they are. For a
            text model: a .txt file (a sample a line), .tsv, .csv or .jsonl (column ``sentence`` or ``text``), each also
            .gz, a folder of .txt files (a sample each), or strings, or token ids, in any of the other forms.
        preprocessing: the model's own; None keeps pixel arrays in their size and scales them to 0..1.
        num_samples: how many to choose at random, without replacement, in random order; None takes all in their order.
        enough: a warning is logged where there are fewer; None takes ``num_samples``.
        seed: makes the choice repeatable.

    Raises:
        SamplesError: nothing usable is there; the message lists what was skipped.
        InvalidValueError: ``num_samples`` is not positive.

    Cost: only the chosen images of a folder are decoded; of a stream without a length at most 20 times
    ``num_samples`` items are read.

    Example:
        >>> import torch
        >>> open_samples(torch.rand(40, 3, 8, 8), None, num_samples=5)
        <5 samples of 3x8x8 float32, 0 skipped>
    """
    if num_samples is not None and num_samples < 1:
        raise InvalidValueError(f"num_samples must be at least 1, but got {num_samples!r}")
    _check_kind(data, preprocessing)
    if isinstance(data, Samples):
        order = random.Random(seed).sample(range(len(data)), min(num_samples or 0, len(data)))
        return data if num_samples is None else data.subset(order)
    source = open_rows(data, preprocessing, seed)
    if num_samples is None:
        rows = source.load(range(source.size)) if isinstance(source, Indexed) else list(source)
    else:
        rows = (
            _choose(source, num_samples, seed) if isinstance(source, Indexed) else _reservoir(source, num_samples, seed)
        )
    samples = _pack(rows, preprocessing, data)
    n_expected = num_samples if enough is None else enough
    if n_expected is not None and len(samples) < n_expected:
        _log.warning("%d usable samples, fewer than the %d asked for", len(samples), n_expected)
    for note, n in samples.notes:
        _log.warning("%d of %d samples: %s", n, len(samples), note)
    return samples


def _check_kind(data: Any, preprocessing: Preparation | None) -> None:
    """Refuse samples that were made for another kind of model."""
    if not isinstance(data, Samples) or preprocessing is None:
        return
    if data.is_text != isinstance(preprocessing, Tokenization):
        kinds = ("text", "images") if data.is_text else ("images or values", "text")
        raise SamplesError(f"samples must be of the model's kind, but are {kinds[0]}, and the model takes {kinds[1]}")


def stream_samples(data: Any, preprocessing: Preparation | None, *, chunk: int = 512) -> Iterator[Samples]:
    """All samples at ``data`` in the order of their paths or rows, as records of at most ``chunk`` samples.

    For evaluation on much data: never more than one chunk is decoded at once. Args and Raises as :func:`open_samples`;
    what was skipped is in the record of its chunk.
    """
    if chunk < 1:
        raise InvalidValueError(f"chunk must be at least 1, but got {chunk!r}")
    _check_kind(data, preprocessing)
    if isinstance(data, Samples):
        yield from (data.subset(range(start, min(start + chunk, len(data)))) for start in range(0, len(data), chunk))
        return
    source = open_rows(data, preprocessing, 0)
    pending: list[Row] = []
    first: Tensor | None = None
    for rows in _chunks(source, chunk):
        pending += rows
        if any(row.value is not None for row in pending):
            samples = _pack(pending, preprocessing, data, first)
            first, pending = samples.inputs[0], []
            yield samples
    if first is None:
        _pack(pending, preprocessing, data)
    elif pending:
        _log.warning("skipped %d samples at the end, the first is %s: %s", *_first_skipped(pending))


def _first_skipped(rows: Sequence[Row]) -> tuple[int, str, str]:
    return len(rows), rows[0].name, rows[0].reason


def _chunks(source: Indexed | Iterator[Row], chunk: int) -> Iterator[list[Row]]:
    if isinstance(source, Indexed):
        for start in range(0, source.size, chunk):
            yield source.load(range(start, min(start + chunk, source.size)))
        return
    rows: list[Row] = []
    for row in source:
        rows.append(row)
        if len(rows) == chunk:
            yield rows
            rows = []
    if rows:
        yield rows


def _choose(source: Indexed, num_samples: int, seed: int) -> list[Row]:
    """``num_samples`` usable rows in a random order; skipped ones are replaced by further ones."""
    order = random.Random(seed).sample(range(source.size), source.size)
    rows: list[Row] = []
    start = missing = 0
    while start < len(order) and (missing := num_samples - sum(row.value is not None for row in rows)) > 0:
        rows += source.load(order[start : start + missing])
        start += missing
    return rows


def _reservoir(rows: Iterable[Row], num_samples: int, seed: int) -> list[Row]:
    """Algorithm R (Waterman): every usable row that is read has the same chance; then shuffled.

    A stream may have no end: no more than ``STREAM_FACTOR`` times what is wanted is read of it.
    """
    rng = random.Random(seed)
    chosen: list[Row] = []
    skipped: list[Row] = []
    n_usable = 0
    for n_read, row in enumerate(rows):
        if n_read == STREAM_FACTOR * num_samples:
            _log.warning("the stream was not read to its end: samples are chosen from its first %d items", n_read)
            break
        if row.value is None:
            skipped.append(row)
            continue
        n_usable += 1
        if len(chosen) < num_samples:
            chosen.append(row)
        elif (place := rng.randrange(n_usable)) < num_samples:
            chosen[place] = row
    rng.shuffle(chosen)
    return chosen + skipped


def _pack(rows: Sequence[Row], preprocessing: Preparation | None, data: Any, like: Tensor | None = None) -> Samples:
    """One record of all usable rows that are shaped like the first; texts may differ in length."""
    text = preprocessing if isinstance(preprocessing, Tokenization) else None
    usable: list[tuple[Row, Tensor]] = []
    skipped: list[tuple[str, str]] = []
    for row in rows:
        value = row.value
        like = value if like is None else like
        if value is None or like is None:
            skipped.append((row.name, row.reason))
        elif text is None and (value.shape, value.dtype) != (like.shape, like.dtype):
            skipped.append((row.name, f"is {described(value)}, but others are {described(like)}"))
        else:
            usable.append((row, value))
    if not usable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        problem = f"skipped all {len(skipped)}: {listed}" if skipped else "it is empty"
        forms = FORMS if text is None else tables.FORMS
        rule = f"data must hold usable samples, but got none at {place_of(data)} ({problem})"
        raise SamplesError(f"{rule}; pass {forms}", skipped)
    values = [value for _, value in usable]
    inputs = torch.stack(values) if text is None else pad_sequence(values, True, text.padding)
    names, ids = tuple(row.name for row, _ in usable), tuple(row.id for row, _ in usable)
    samples = Samples(inputs, ids, skipped=tuple(skipped), names=names)
    if text is not None:
        notes = Counter(note for row, _ in usable for note in row.notes)
        return replace(samples, padding=text.padding, notes=tuple(notes.items()))
    if inputs.dtype != torch.uint8:
        return samples
    if isinstance(preprocessing, Preprocessing):
        return replace(samples, mean=preprocessing.mean, std=preprocessing.std)
    return replace(samples, mean=(0.0,) * inputs.shape[1], std=(1.0,) * inputs.shape[1])


def by_length(samples: Samples, run: int) -> Samples:
    """Texts reordered so that each run of ``run`` holds texts of similar length: batches then have hardly any padding.

    Runs are not sorted by length: consecutive ones hold short and long texts, as the whole set does, and the first one
    texts of medium length. The longest texts that fill no run come last. Samples that are no text keep their order.
    """
    mask = samples.token_mask(samples.inputs)
    if mask is None:
        return samples
    runs = torch.split(mask.sum(1).argsort(stable=True), run)
    n_whole = len(samples) // run
    places = sorted(range(n_whole), key=lambda i: _halving(i + 1))  # of the runs, shortest texts first
    order = sorted(range(n_whole), key=places.__getitem__)
    return samples.subset(torch.cat([*(runs[i] for i in order), *runs[n_whole:]]).tolist())


def _halving(i: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, ... for i = 1, 2, 3, ...: any run of them is spread evenly (van der Corput, 1935)."""
    fraction, part = 0.0, 0.5
    while i:
        fraction, part, i = fraction + part * (i % 2), part / 2, i // 2
    return fraction
