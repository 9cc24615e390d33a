"""A batch to try a model on when no samples are given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttmpd.data.open import open_samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import random_ids


def example_batch(opened: OpenedModel, samples: Any = None, batch_size: int = 64, shape: Sequence[int] = ()) -> Tensor:
    """A batch of the right shape: real inputs, repeated to the size, or random values.

    Args:
        opened: says how large its input is.
        samples: real inputs, or None.
        batch_size: rows of the batch.
        shape: of one input, for a model that does not say it; the number of tokens for one that takes text.

    Raises:
        InvalidValueError: nothing says how large an input is.
    """
    if samples is not None:
        opened_samples = open_samples(samples, opened.preprocessing, num_samples=batch_size)
        return opened_samples.trimmed(torch.arange(batch_size) % len(opened_samples))
    if isinstance(opened.preprocessing, Tokenization):
        longest = opened.preprocessing.max_length
        return random_ids(opened.module, opened.preprocessing, (batch_size, *(shape or (longest,))))
    if opened.preprocessing is not None:
        shape = opened.preprocessing.input_size
    if not shape:
        raise InvalidValueError(
            "a model must say how large its input is, but has no preprocessing; give some samples (--data), or set a "
            "dict `pretrained_cfg` on the module with input_size, mean and std"
        )
    return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))
