"""A table of latencies over devices and batch sizes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttmpd.artifact.read import Artifact, load, read_artifact, stock_model
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, SamplesError
from ttmpd.latency.device import choose_device
from ttmpd.latency.exits import check_runtime, routed_timings
from ttmpd.latency.table import compare
from ttmpd.latency.timing import Timing
from ttmpd.method import method_of
from ttmpd.models.example import example_batch
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import mask_padding
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager
from ttmpd.surgery.exits.model import EarlyExitModel

_TIMED = 256
"""Samples on which exits are timed."""


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRow:
    """Milliseconds per batch of both models, and how many times faster the compressed one is, round by round."""

    batch_size: int
    original: Timing
    compressed: Timing
    speedup: Timing


def bench(
    folder: str | Path,
    source: str | None = None,
    *,
    batch_sizes: Sequence[int] = (),
    samples: Any = None,
    runtime: Runtime | str = Eager(),
    device: str = "auto",
) -> tuple[BenchRow, ...]:
    """The original against the compressed model of an artifact, interleaved on this machine.

    Args:
        folder: what ``compress`` wrote.
        source: id of the original model, needed when it came from your own code.
        batch_sizes: one row each; 1 and the artifact's own when empty.
        samples: real inputs; random values when None. A model with exits needs them: the mean over those that the exits
            were not trained on counts.
        runtime: runs both models; a runtime or its name.
        device: "auto", "cpu", "cuda", "mps".

    Raises:
        CheckpointError: the artifact cannot be loaded.
        InvalidValueError: a batch size is not positive, or nothing says how large an input is.
        UnsupportedError: the runtime cannot run one of the models.

    Example:
        >>> rows = bench("fast/", "ttmpd.testing.tiny_models:tiny_model", batch_sizes=[1, 4], device="cpu")
        >>> [row.batch_size for row in rows]
        [1, 4]
    """
    if any(size < 1 for size in batch_sizes):
        raise InvalidValueError(f"batch_sizes must be at least 1, but got {tuple(batch_sizes)}")
    runs = method_of("runtime", runtime) if isinstance(runtime, str) else runtime
    assert isinstance(runs, Runtime)
    artifact = read_artifact(folder)
    where = choose_device(device)
    stock = stock_model(artifact, source)
    if isinstance(artifact.preprocessing, Tokenization):
        mask_padding(stock, artifact.preprocessing)
    student = load(folder, stock)
    original, compressed = (net.to(where).eval() for net in (stock, student))
    if isinstance(compressed, EarlyExitModel):
        check_runtime(runs)
    opened = OpenedModel(stock, artifact.model_id, artifact.rebuildable, artifact.preprocessing)
    rows = []
    for size in batch_sizes or dict.fromkeys((1, artifact.batch_size)):
        if isinstance(compressed, EarlyExitModel):
            timings = routed_timings(original, compressed, _unseen(samples, opened, artifact), size)
        else:
            batch = example_batch(opened, samples, size, artifact.input_shape).to(where)
            timings = compare(original, compressed, batch, runtime=runs)
        ratio = timings.ratio("original", "compressed")
        rows.append(BenchRow(size, timings.timing("original"), timings.timing("compressed"), ratio))
    return tuple(rows)


def _unseen(data: Any, opened: OpenedModel, artifact: Artifact) -> Samples:
    """Some samples on which exits can be timed: those they were trained on would leave too early."""
    if data is None:
        raise InvalidValueError(
            "samples must be given for a model with exits, since each sample takes another time, but got none; pass "
            "samples of yours, on the command line --data"
        )
    samples = open_samples(data, opened.preprocessing, num_samples=_TIMED + len(artifact.sample_ids), enough=1)
    used = frozenset(artifact.sample_ids)
    unused = [number for number, name in enumerate(samples.ids) if name not in used]
    if not unused:
        raise SamplesError(
            f"bench must have samples that the exits have not seen, but all {len(samples)} were used; give other data"
        )
    return samples.subset(unused[:_TIMED])
