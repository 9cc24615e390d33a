"""A module with its id and preprocessing."""

from dataclasses import dataclass, replace

from torch import nn

from ttmpd.data.preprocessing import Preparation
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError
from ttmpd.records import NOTHING_FOLDED, UNCHANGED, Folded, Lossless, Removal


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A model, where it came from, and how it wants its inputs.

    Args:
        module: the model; in eval mode, except that a module that was passed in is as it was. One that takes text looks
            past the padding by itself when it is called with token ids alone.
        id: the id as it was given; "" for a module that was passed in.
        rebuildable: whether the id is enough to build it again without running foreign code.
        preprocessing: its own preprocessing, of images or text, when it says so.
        class_names: name of each class, when known.
        removed: what is gone already, when it was opened from an artifact; ``id`` then names the stock model.
        used_ids: content hashes of the unlabelled samples that made it what it is.
        lossless: what else was done to it, when it was opened from an artifact.
        folded: what became of its replacements, when it was opened from an artifact.
    """

    module: nn.Module
    id: str
    rebuildable: bool
    preprocessing: Preparation | None = None
    class_names: tuple[str, ...] = ()
    removed: tuple[Removal, ...] = ()
    used_ids: tuple[str, ...] = ()
    lossless: Lossless = UNCHANGED
    folded: Folded = NOTHING_FOLDED

    def reading(self, max_length: int | None) -> "OpenedModel":
        """This model with a limit to the tokens that are read of a sample; None changes nothing.

        The module is left as it is: the record says how samples are read, and an artifact carries it on.

        Args:
            max_length: tokens of a sample, no more than the model can take.

        Raises:
            InvalidValueError: it takes no text, or cannot read so many.
        """
        if max_length is None:
            return self
        if not isinstance(self.preprocessing, Tokenization):
            raise InvalidValueError(f"max_length must be left out for a model that takes no text, but got {max_length}")
        return replace(self, preprocessing=replace(self.preprocessing, max_length=max_length))
