"""Checks of selectors."""

import math

import torch

from ttmpd.data.samples import Samples
from ttmpd.select.base import Selector
from ttmpd.testing.common import twice
from ttmpd.testing.tiny_models import assert_untouched, require, tiny_model, tiny_samples


def check_select_positions(selector: Selector) -> None:
    """``n`` different positions in the pool, ascending, with labels and without."""
    model, pool = tiny_model(), tiny_samples()
    for n, labels in ((1, None), (len(pool) - 1, None), (5, torch.arange(len(pool)) % 4)):
        chosen = selector.select(model, pool, n, labels=labels, batch_size=5)
        require(list(chosen) == sorted(set(chosen)) and len(chosen) == n, f"{n} must be chosen, but got {chosen}")
        inside = all(type(place) is int and 0 <= place < len(pool) for place in chosen)
        require(inside, f"positions must lie in the pool, but got {chosen}")


def check_select_repeats(selector: Selector) -> None:
    """The same seed gives the same choice, whatever was drawn before."""
    model, pool = tiny_model(dropout=0.5), tiny_samples(20)
    first, second = twice(lambda: selector.select(model, pool, 9, batch_size=8, seed=3))
    require(first == second, "the same seed must give the same choice")


def check_select_untouched(selector: Selector) -> None:
    """Selecting changes nothing."""
    model, pool = tiny_model(dropout=0.5), tiny_samples()
    with assert_untouched(model, pool):
        selector.select(model, pool, 4, batch_size=5)


def check_select_edges(selector: Selector) -> None:
    """A pool of no more than ``n`` samples is chosen whole; samples with NaN are chosen last."""
    model = tiny_model()
    for n in (1, 2, 3):
        whole = selector.select(model, tiny_samples(n), 3)
        require(whole == tuple(range(n)), f"a pool of {n} must be chosen whole, but got {whole}")
    values = tiny_samples().batch(slice(None))
    values[[0, 7]] = math.nan
    chosen = selector.select(model, Samples(values, tiny_samples().ids), 4, batch_size=5)
    require(len(set(chosen)) == 4, f"samples with NaN must not break the choice, but got {chosen}")
    if type(selector).uses_teacher:
        require(not {0, 7} & set(chosen), f"samples that give no finite answer must come last, but got {chosen}")


CHECKS = (
    check_select_positions,
    check_select_repeats,
    check_select_untouched,
    check_select_edges,
)
