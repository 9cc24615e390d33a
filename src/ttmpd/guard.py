"""The guard of distillation: the head stays frozen, and held-out agreement with the teacher decides what is kept."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ttmpd.batches import Samples
from ttmpd.losses import tempered_loss
from ttmpd.modules import call, evaluating, find_head, hooks, module_at
from ttmpd.targets import Targets
from ttmpd.training import SHOWN, Check


def freeze(student: nn.Module, first: str, batch: Tensor) -> list[nn.Parameter]:
    """Stop training the head and, where ``first`` names a module, all that runs before it; returns what was training.

    Where nothing could learn then, what runs before is trained after all.
    """
    frozen = freeze_head(student, batch)
    if not first:
        return frozen
    before = freeze_before(student, first, batch)
    if any(parameter.requires_grad for parameter in student.parameters()):
        return frozen + before
    for parameter in before:
        parameter.requires_grad_(True)
    return frozen


def freeze_head(student: nn.Module, batch: Tensor) -> list[nn.Parameter]:
    """Stop training the layer that gives the logits; returns the parameters that were training before."""
    head = find_head(student, batch)
    if head is None:
        return []
    frozen = [p for p in module_at(student, head).parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def freeze_before(student: nn.Module, path: str, batch: Tensor) -> list[nn.Parameter]:
    """Stop training the layers that run before the module at ``path``; returns the parameters that were training.

    Before the first removed unit the student *is* the teacher. Nothing there needs to change, and neither gradients nor
    activations have to be kept: in networks whose first layers are the largest, that is most of a step.
    """
    calls: list[str] = []
    layers = {name: m for name, m in student.named_modules() if any(True for _ in m.parameters(recurse=False))}
    handles = [module_at(student, path).register_forward_pre_hook(lambda *_: calls.append(""))]
    handles += [m.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, m in layers.items()]
    with evaluating(student), hooks(handles):
        call(student, batch)
    here = calls.index("")
    frozen = []
    for name in sorted(set(calls[:here]) - set(calls[here:])):
        layers[name].eval()
        own = [p for p in layers[name].parameters(recurse=False) if p.requires_grad]
        if not list(layers[name].children()):  # what a container holds by itself may be used anywhere
            frozen += own
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def logits_of(model: nn.Module, samples: Samples, batch_size: int) -> Tensor:
    """(N, n_classes) logits of all samples, in eval mode, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        batches = samples.batches(batch_size, device)
        answers = [call(model, batch).float().cpu() for batch in batches]
    return torch.cat(answers) if answers else torch.empty(0)


def held_out_check(
    student: nn.Module, held_out: Samples, targets: Targets, batch_size: int
) -> Callable[[], Check] | None:
    """A check of the student against the stored answers on the held-out samples; None when there are none."""
    if not len(held_out):
        return None

    def check() -> Check:
        logits = logits_of(student, held_out, batch_size)
        alike = float((logits.argmax(-1) == targets.held_out.argmax(-1)).float().mean())
        return Check(alike, tempered_loss(logits, targets.held_out), len(held_out))

    return check


def mixture(end: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights that lie by ``share`` of the way from ``end`` to ``start``; what is counted stays as in ``end``."""
    return {
        name: torch.lerp(value, start[name], share) if value.is_floating_point() else value.clone()
        for name, value in end.items()
    }


def mix_with_start(
    student: nn.Module, start: Mapping[str, Tensor], share: float, check: Callable[[], Check], end: Check
) -> bool:
    """Move a trained student back to where it started by that share of the way, unless it is shown to be worse there.

    Args:
        student: changed in place.
        start: its state before training.
        share: 0 leaves it as it is, 1 would be the start.
        check: measures it.
        end: what the check said of it at the end of training.

    Returns:
        Whether the student was moved.

    Source: WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903): the mean of the weights before and after
    fine-tuning is often better than both. Here without its choice of the share on labelled samples.
    """
    if not share:
        return False
    trained = {name: value.detach().clone() for name, value in student.state_dict().items()}
    student.load_state_dict(mixture(trained, start, share))
    if end.better_than(check(), by=SHOWN):
        student.load_state_dict(trained)
        return False
    return True
