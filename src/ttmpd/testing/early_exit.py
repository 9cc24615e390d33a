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
    """The checked model with exits, the model itself, and a batch that neither was trained on."""
    model = tiny_model()
    return quick(method).equip(model, tiny_samples(n), batch_size=8), model, tiny_samples(9, seed=3).batch(slice(None))


def _middle(model: EarlyExitModel, batch: Tensor) -> float:
    """A threshold at which some of the batch leave at the first exit and some do not."""
    with torch.no_grad():
        confidence = model.exit_logits(model.features(batch)[0])[0].softmax(-1).amax(-1)
    return float(confidence.median())


def check_exits_untouched(method: EarlyExit) -> None:
    """Exits are put on a copy; its blocks keep their weights."""
    model, samples = tiny_model(), tiny_samples()
    with assert_untouched(model, samples):
        exits = quick(method).equip(model, samples, batch_size=8).model
    require(
        equal(exits.backbone.state_dict(), model.state_dict()),
        "the model must keep its weights under the exits",
    )
    shared = {p.data_ptr() for p in exits.parameters()} & {p.data_ptr() for p in model.parameters()}
    require(not shared, "a model with exits must have weights of its own")


def check_exits_repeat(method: EarlyExit) -> None:
    """The same seed gives the same exits, whatever was drawn before."""
    first, second = twice(lambda: _equipped(method)[0])
    require(equal(first.model.state_dict(), second.model.state_dict()), "the same seed must give the same exits")
    require(torch.equal(first.exit_logits, second.exit_logits), "the same seed must give the same answers")


def check_exits_never(method: EarlyExit) -> None:
    """With a threshold above 1, as the method sets it, predictions equal those of the model bit for bit."""
    equipped, model, batch = _equipped(method)
    require(equipped.model.threshold > 1, "a model must come with exits through which nobody leaves")
    for inputs in (batch, batch[:1]):
        expected = answer(model, inputs)
        require(torch.equal(answer(equipped.model, inputs), expected), "a threshold above 1 must not change an answer")
        with torch.no_grad():
            answered = equipped.model.answer(inputs)  # with every exit computed
        require(torch.equal(answered.logits, expected), "exits that nobody takes must not change an answer")
        require(bool((answered.exits == len(equipped.model.heads)).all()), "above 1 every sample must run to the end")


def check_exits_always(method: EarlyExit) -> None:
    """At a threshold of 0 every sample leaves at the first exit, and deeper layers are not run."""
    equipped, _, batch = _equipped(method)
    model, calls = equipped.model, []
    with torch.no_grad():
        expected = model.exit_logits(model.features(batch)[0])[0]
        model.threshold = 0.0
        model.backbone.get_submodule(model.spec.blocks[-1]).register_forward_hook(lambda *_: calls.append(1))
        answered = model.answer(batch)
    require(not bool(answered.exits.any()), "at 0 every sample must leave at the first exit")
    require(torch.allclose(answered.logits, expected, atol=1e-5), "the answer must be that of the exit")
    require(not calls, "what lies behind the last sample must not be run")


def check_exits_batches(method: EarlyExit) -> None:
    """A batch that shrinks on the way gets the same predictions as its samples one by one."""
    equipped, _, batch = _equipped(method)
    model = equipped.model
    model.threshold = _middle(model, batch)
    with torch.no_grad():
        whole, single = model.answer(batch), [model.answer(batch[i : i + 1]) for i in range(len(batch))]
    exits = torch.cat([alone.exits for alone in single])
    require(len(set(exits.tolist())) > 1, "samples of the check must leave at several exits")
    require(torch.equal(whole.exits, exits), f"exits must not depend on the batch, but got {whole.exits} and {exits}")
    logits = torch.cat([alone.logits for alone in single])
    require(torch.allclose(whole.logits, logits, atol=1e-4), "answers must not depend on the batch")
    require(torch.equal(answer(model, batch), whole.logits), "a call must answer with the same logits")


def check_exits_rise(method: EarlyExit) -> None:
    """With a higher threshold no sample leaves earlier."""
    equipped, _, batch = _equipped(method)
    depths = []
    for threshold in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0, 1.1):
        equipped.model.threshold = threshold
        with torch.no_grad():
            depths.append(equipped.model.depths(batch))
    rising = all(bool((low <= high).all()) for low, high in itertools.pairwise(depths))
    require(rising, f"no sample may leave earlier under a higher threshold, but got {depths}")


def check_exits_copied(method: EarlyExit) -> None:
    """A copy has exits of its own, and they are in the state of the model."""
    equipped, _, batch = _equipped(method)
    model = equipped.model
    model.threshold = _middle(model, batch)
    expected, other = answer(model, batch), clone(model)
    require(torch.equal(answer(other, batch), expected), "a copy must answer alike")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in other.parameters():
        parameter.data.zero_()
    require(not torch.equal(answer(other, batch), expected), "a copy must run on its own weights")
    require(torch.equal(answer(model, batch), expected), "a copy must have weights of its own")
    other.load_state_dict(state)
    require(torch.equal(answer(other, batch), expected), "the state of a model must hold its exits")


def check_exits_edges(method: EarlyExit) -> None:
    """Few samples, labels, tokens; a model without blocks is refused."""
    quick_method, batch = quick(method), tiny_samples(5, seed=3).batch(slice(None))
    for n in (1, 2, 3):
        equipped = quick_method.equip(tiny_model(), tiny_samples(n), labels=torch.arange(n), batch_size=2)
        require(equipped.exit_logits.shape[1:] == (n, 4), "answers must be one per exit and sample")
        require(bool(torch.isfinite(equipped.exit_logits).all()), f"{n} samples must give finite answers")
        equipped.model.threshold = 0.5
        require(bool(torch.isfinite(answer(equipped.model, batch)).all()), f"{n} samples must give finite answers")
    tokens = quick_method.equip(tiny_transformer(), tiny_token_samples(), batch_size=8)
    require(len(tokens.facts) == len(tokens.model.heads) == 1, "two blocks must get one exit, and its facts")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    try:
        quick_method.equip(plain, tiny_samples(4))
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
