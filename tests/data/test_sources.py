"""Kinds of data: a further one is a line; labels beside an array are no samples."""

from dataclasses import dataclass

import pytest
import torch

from ttmpd.data import sources
from ttmpd.data.open import open_samples
from ttmpd.data.rows import rows_of_array
from ttmpd.data.sources import SOURCES, Source
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import SamplesError


@dataclass
class _Noise:
    """A kind of data that the package does not know."""

    n: int


def test_a_further_kind_of_data_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SamplesError, match="but got _Noise"):
        open_samples(_Noise(3), None)
    noise = Source(
        lambda data: isinstance(data, _Noise),
        lambda data, reader, seed: rows_of_array(torch.full((data.n, 1, 8, 8), float(seed)), reader),
    )
    monkeypatch.setattr(sources, "SOURCES", [*SOURCES, noise])
    samples = open_samples(_Noise(3), None, seed=7)
    assert samples.inputs.shape == (3, 1, 8, 8)
    assert samples.inputs.unique().tolist() == [7.0]


def test_labels_beside_token_ids_are_ignored() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    samples = open_samples((ids, torch.tensor([1, 1])), Tokenization("", padding=0, max_length=8))
    assert samples.inputs.tolist() == ids.tolist()


def test_a_single_number_is_no_array_of_samples() -> None:
    for preparation in (None, Tokenization("", padding=0, max_length=8)):
        with pytest.raises(SamplesError, match="first axis of samples"):
            open_samples(torch.tensor(3), preparation)
