"""The checks of the verb find what they look for."""

import dataclasses

import pytest
import torch

from ttmpd.early_exit.base import EarlyExit
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.testing import early_exit as checks

QUICK = RightTool(steps=2, views=1)


class InPlace(EarlyExit):
    """Wrong on purpose: changes the model it was given, by the state it finds."""

    source = "none"

    def equip(self, model, samples, *, labels=None, batch_size=64, seed=0):
        next(model.parameters()).data.add_(torch.rand(()))
        return QUICK.equip(model, samples, labels=labels, batch_size=batch_size, seed=seed)


class Open(EarlyExit):
    """Wrong on purpose: everybody leaves from the start, and nothing is refused."""

    source = "none"

    def equip(self, model, samples, *, labels=None, batch_size=64, seed=0):
        found = QUICK.equip(model if hasattr(model, "blocks") else checks.tiny_model(), samples)
        found.model.threshold = 0.0
        return found


class Forgetful(EarlyExit):
    """Wrong on purpose: the exit of a sample depends on the others in its batch, and answers are not finite."""

    source = "none"

    def equip(self, model, samples, *, labels=None, batch_size=64, seed=0):
        found = QUICK.equip(model, samples)
        head, inner = found.model.heads[0], found.model.heads[0].forward

        def forward(x):
            answer = inner(x)
            return answer - answer.mean(0) if len(x) > 1 else -answer

        head.forward = forward
        return dataclasses.replace(found, exit_logits=found.exit_logits * torch.nan)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (InPlace(), checks.check_exits_untouched),
        (InPlace(), checks.check_exits_repeat),
        (Open(), checks.check_exits_never),
        (Open(), checks.check_exits_edges),
        (Forgetful(), checks.check_exits_batches),
        (Forgetful(), checks.check_exits_edges),
    ],
)
def test_checks_reject_wrong_methods(wrong, check):
    with pytest.raises(AssertionError):
        check(wrong)
