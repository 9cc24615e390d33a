"""Checks of methods that put exits on a model."""

import itertools

import torch
from torch import Tensor, nn

from ttmpd.early_exit.base import EarlyExit, Equipped
from ttmpd.errors import UnsupportedError
from ttmpd.models.modules import clone
from ttmpd.surgery.exits.model import EarlyExitModel
from ttmpd.testing.common import answer, equal, quick, twice
from ttmpd.testing.tiny_models import (
    assert_untouched,
    require,
    tiny_model,
    tiny_samples,
    tiny_token_samples,
    tiny_transformer,
)


def _equipped(method: EarlyExit, n: int = 16) -> tuple[Equipped, nn.Module, Tensor]:
    """The model of the checks with exits, the model itself, and a batch that neither has seen."""
    model = tiny_model()
    return quick(method).equip(model, tiny_samples(n), batch_size=8), model, tiny_samples(9, seed=3).batch(slice(None))


def _middle(model: EarlyExitModel, batch: Tensor) -> float:
    """A threshold at which some of the batch leave at the first exit and some do not."""
    with torch.no_grad():
        sure = model.exit_logits(model.features(batch)[0])[0].softmax(-1).amax(-1)
    return float(sure.median())


def check_exits_untouched(method: EarlyExit) -> None:
    """Exits are put on a copy; its blocks keep their weights."""
    model, samples = tiny_model(), tiny_samples()
    with assert_untouched(model, samples):
        found = quick(method).equip(model, samples, batch_size=8).model
    require(equal(found.backbone.state_dict(), model.state_dict()), "the model must keep its weights under the exits")
    shared = {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in model.parameters()}
    require(not shared, "a model with exits must have weights of its own")


def check_exits_repeat(method: EarlyExit) -> None:
    """The same seed gives the same exits, whatever was drawn before."""
    first, second = twice(lambda: _equipped(method)[0])
    require(equal(first.model.state_dict(), second.model.state_dict()), "the same seed must give the same exits")
    require(torch.equal(first.exit_logits, second.exit_logits), "the same seed must give the same answers")


def check_exits_never(method: EarlyExit) -> None:
    """Above 1 the answers are those of the model, bit for bit, and so they come from the method."""
    found, model, batch = _equipped(method)
    require(found.model.threshold > 1, "a model must come with exits through which nobody leaves")
    for few in (batch, batch[:1]):
        wanted = answer(model, few)
        require(torch.equal(answer(found.model, few), wanted), "a threshold above 1 must not change an answer")
        with torch.no_grad():
            asked = found.model.answer(few)  # with every exit computed
        require(torch.equal(asked.logits, wanted), "exits that nobody takes must not change an answer")
        require(bool((asked.exits == len(found.model.heads)).all()), "above 1 every sample must run to the end")


def check_exits_always(method: EarlyExit) -> None:
    """At 0 everybody leaves at the first exit, and deeper ones are not even run."""
    found, _, batch = _equipped(method)
    model, calls = found.model, []
    with torch.no_grad():
        wanted = model.exit_logits(model.features(batch)[0])[0]
        model.threshold = 0.0
        model.backbone.get_submodule(model.spec.blocks[-1]).register_forward_hook(lambda *_: calls.append(1))
        asked = model.answer(batch)
    require(not bool(asked.exits.any()), "at 0 every sample must leave at the first exit")
    require(torch.allclose(asked.logits, wanted, atol=1e-5), "the answer must be that of the exit")
    require(not calls, "what lies behind the last sample must not be run")


def check_exits_batches(method: EarlyExit) -> None:
    """A batch that shrinks on the way gets the answers that its samples get one by one."""
    found, _, batch = _equipped(method)
    model = found.model
    model.threshold = _middle(model, batch)
    with torch.no_grad():
        whole, single = model.answer(batch), [model.answer(batch[i : i + 1]) for i in range(len(batch))]
    exits = torch.cat([one.exits for one in single])
    require(len(set(exits.tolist())) > 1, "samples of the check must leave at several exits")
    require(torch.equal(whole.exits, exits), f"exits must not depend on the batch, but got {whole.exits} and {exits}")
    logits = torch.cat([one.logits for one in single])
    require(torch.allclose(whole.logits, logits, atol=1e-4), "answers must not depend on the batch")
    require(torch.equal(answer(model, batch), whole.logits), "a call must answer with the same logits")


def check_exits_rise(method: EarlyExit) -> None:
    """The higher the threshold, the deeper every sample goes."""
    found, _, batch = _equipped(method)
    depths = []
    for threshold in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0, 1.1):
        found.model.threshold = threshold
        with torch.no_grad():
            depths.append(found.model.depths(batch))
    rising = all(bool((low <= high).all()) for low, high in itertools.pairwise(depths))
    require(rising, f"no sample may leave earlier under a higher threshold, but got {depths}")


def check_exits_copied(method: EarlyExit) -> None:
    """A copy has exits of its own, and they are in the state of the model."""
    found, _, batch = _equipped(method)
    model = found.model
    model.threshold = _middle(model, batch)
    wanted, other = answer(model, batch), clone(model)
    require(torch.equal(answer(other, batch), wanted), "a copy must answer alike")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in other.parameters():
        parameter.data.zero_()
    require(not torch.equal(answer(other, batch), wanted), "a copy must run on its own weights")
    require(torch.equal(answer(model, batch), wanted), "a copy must have weights of its own")
    other.load_state_dict(state)
    require(torch.equal(answer(other, batch), wanted), "the state of a model must hold its exits")


def check_exits_edges(method: EarlyExit) -> None:
    """Few samples, labels, tokens; a model without blocks is refused."""
    few, batch = quick(method), tiny_samples(5, seed=3).batch(slice(None))
    for n in (1, 2, 3):
        found = few.equip(tiny_model(), tiny_samples(n), labels=torch.arange(n), batch_size=2)
        require(found.exit_logits.shape[1:] == (n, 4), "answers must be one per exit and sample")
        require(bool(torch.isfinite(found.exit_logits).all()), f"{n} samples must give finite answers")
        found.model.threshold = 0.5
        require(bool(torch.isfinite(answer(found.model, batch)).all()), f"{n} samples must give finite answers")
    tokens = few.equip(tiny_transformer(), tiny_token_samples(), batch_size=8)
    require(len(tokens.facts) == len(tokens.model.heads) == 1, "two blocks must get one exit, and its facts")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    try:
        few.equip(plain, tiny_samples(4))
    except UnsupportedError:
        return
    raise AssertionError("a model without blocks must be refused")


CHECKS = (
    check_exits_untouched,
    check_exits_repeat,
    check_exits_never,
    check_exits_always,
    check_exits_batches,
    check_exits_rise,
    check_exits_copied,
    check_exits_edges,
)
