"""The contract of a method that puts exits on a model."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.method import Method
from ttmpd.surgery.exits.model import EarlyExitModel, with_only


@dataclass(frozen=True, eq=False)
class Equipped:
    """A model with trained exits and a threshold above 1, so that no sample leaves early yet.

    Args:
        model: a new model, its threshold above 1; the one passed in stays as it was.
        exit_logits: (n_exits, N, n_classes) calibrated logits of every exit, each by exits that were not trained on
            that sample, so that their confidence is that on new samples.
        logits: (N, n_classes) logits of the model itself.
        classes: (N,) classes the exits were calibrated to: the model's predictions, or the labels.
        facts: numbers for the report, a row per exit.
        note: one line for the user.
    """

    model: EarlyExitModel
    exit_logits: Tensor
    logits: Tensor
    classes: Tensor
    facts: tuple[dict[str, float], ...] = field(default=())
    note: str = ""

    def only(self, numbers: Sequence[int], saved_shares: Sequence[float] = ()) -> "Equipped":
        """A copy that has only some of the exits; for ``saved_shares`` see :class:`ttmpd.surgery.exits.spec.Exits`."""
        facts = tuple(self.facts[number] for number in numbers) if self.facts else ()
        fewer = f"; {len(numbers)} of them are worth their time" if len(numbers) < len(self.exit_logits) else ""
        model, logits = with_only(self.model, numbers, saved_shares), self.exit_logits[list(numbers)]
        return replace(self, model=model, exit_logits=logits, facts=facts, note=self.note + fewer)


class EarlyExit(Method, abc.ABC):
    """Adds exits to a frozen model, through which confident samples leave early."""

    prune: bool = True
    """Remove exits that cost more time than they save at the target latency."""
    by_time: bool = True
    """Lower the threshold of exits that save more time; else all exits have the same threshold."""

    @abc.abstractmethod
    def equip(
        self, model: nn.Module, samples: Samples, *, labels: Tensor | None = None, batch_size: int = 64, seed: int = 0
    ) -> Equipped:
        """A copy of the model with trained and calibrated exits.

        Args:
            model: on the device where it shall run; pruned or not.
            samples: from the place of use.
            labels: (N,) classes of the samples; without them exits learn the model's own predictions.
            batch_size: samples per pass.
            seed: of everything random.

        Raises:
            UnsupportedError: no block of this model can carry an exit.
        """
