"""Checks of adapters."""

import torch
from torch import nn

from ttmpd.adapt.base import Adapter
from ttmpd.models.run import evaluating
from ttmpd.testing.common import answer, equal, twice
from ttmpd.testing.tiny_models import assert_untouched, require, tiny_model, tiny_samples


def check_adapt_untouched(adapter: Adapter) -> None:
    """Adaptation makes a new model."""
    model, samples = tiny_model(), tiny_samples()
    with assert_untouched(model, samples):
        adapted = adapter.adapt(model, samples, batch_size=8)
    shared = {p.data_ptr() for p in adapted.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    require(not shared or adapted.model is model, "an adapted model must have weights of its own")


def check_adapt_repeats(adapter: Adapter) -> None:
    """The same seed gives the same model."""
    first, second = twice(lambda: adapter.adapt(tiny_model(), tiny_samples(), batch_size=8).model.state_dict())
    require(equal(first, second), "the same seed must give the same model")


def check_adapt_edges(adapter: Adapter) -> None:
    """Few samples give finite predictions; a model without batch statistics is handed on, or trained."""
    batch = tiny_samples(4).batch(slice(None))
    for n in (1, 2, 3, 9):
        adapted = adapter.adapt(tiny_model(), tiny_samples(n), batch_size=2).model
        with evaluating(adapted):
            require(bool(torch.isfinite(answer(adapted, batch)).all()), f"{n} samples must give finite answers")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    result = adapter.adapt(plain, tiny_samples(), batch_size=8)
    require(result.model is plain or bool(type(adapter).needs), "a model without batch statistics must be handed on")
    require(bool(result.note), "a note must say what was done")


CHECKS = (
    check_adapt_untouched,
    check_adapt_repeats,
    check_adapt_edges,
)
