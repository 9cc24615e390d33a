"""The exits of a model as plain data, and the predictions that a batch gets from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ttmpd.errors import InvalidValueError
from ttmpd.records import Layout
from ttmpd.surgery.exits.pooling import POOLS, Pool

NEVER = 2.0
"""A threshold that no confidence reaches: every sample runs to the end."""


@dataclass(frozen=True, slots=True)
class Exit:
    """One exit: samples may leave the model behind its block.

    Args:
        path: the block behind which it stands.
        reads: the blocks whose outputs its head reads, in calling order; the last one is ``path``.
        pool: how these outputs become vectors.
        layout: which axis of them holds the channels.
        n_features: length of all vectors together.
    """

    path: str
    reads: tuple[str, ...]
    pool: Pool
    layout: Layout
    n_features: int

    def __post_init__(self) -> None:
        if not self.reads or self.reads[-1] != self.path:
            raise InvalidValueError(f"reads of an exit must end with {self.path!r}, but got {self.reads}")
        if self.pool not in POOLS or self.layout not in ("channels_first", "channels_last") or self.n_features < 1:
            raise InvalidValueError(
                f"an exit must have one of the pools {', '.join(POOLS)}, a layout and features, but got {self.pool!r}, "
                f"{self.layout!r} and {self.n_features!r}"
            )


@dataclass(frozen=True, slots=True)
class Exits:
    """All exits of a model: enough, with the weights, to put them on the same model again.

    Args:
        exits: in calling order.
        blocks: paths of all blocks, in calling order.
        followers: those of them that are called with more than what the block before handed on.
        n_classes: of the model.
        fixed: names of arguments of blocks whose first axis is not that of the samples, see :func:`leaves`.
        padding: token id behind the end of a text; None for what is no text.
        compact: whether the batch may shrink within the model; else those that left are computed along.
        saved_shares: what leaving at each exit saves, as a share of what leaving at the first one does; empty for one
            threshold for all of them, see :meth:`thresholds`.
    """

    exits: tuple[Exit, ...]
    blocks: tuple[str, ...]
    n_classes: int
    followers: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    padding: int | None = None
    compact: bool = True
    saved_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        paths = [exit_.path for exit_ in self.exits]
        blocks = set(self.blocks)
        if not {*self.followers, *paths, *(path for exit_ in self.exits for path in exit_.reads)} <= blocks:
            raise InvalidValueError("exits must read blocks of the model, but name others")
        if not paths or sorted(set(paths), key=self.blocks.index) != paths:
            raise InvalidValueError(f"exits must stand behind different blocks, in their order, but got {paths}")
        if self.n_classes < 1:
            raise InvalidValueError(f"n_classes of exits must be at least 1, but got {self.n_classes}")
        if len(self.saved_shares) not in (0, len(paths)) or not all(0 < share <= 1 for share in self.saved_shares):
            raise InvalidValueError(f"saved_shares must be one share of 0 to 1 per exit, but got {self.saved_shares}")

    def thresholds(self, threshold: float) -> tuple[float, ...]:
        """The probability from which a sample leaves at each exit: ``threshold`` at the first, more at later ones.

        A wrong answer costs the same everywhere, but leaving late saves little time: the doubt that is allowed falls
        with what leaving saves. At 0 all samples leave at the first exit, above 1 none leaves at any.
        """
        if threshold > 1:
            return (NEVER,) * len(self.exits)
        return tuple(1 - (1 - threshold) * value for value in self.saved_shares or (1.0,) * len(self.exits))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` turns back into an equal record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Exits":
        """The record that :meth:`to_dict` described.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or of another kind.
        """
        exits = tuple(
            Exit(str(row["path"]), tuple(map(str, row["reads"])), row["pool"], row["layout"], int(row["n_features"]))
            for row in data["exits"]
        )
        padding = data["padding"]
        return cls(
            exits,
            tuple(map(str, data["blocks"])),
            int(data["n_classes"]),
            tuple(map(str, data["followers"])),
            tuple(map(str, data["fixed"])),
            None if padding is None else int(padding),
            bool(data["compact"]),
            tuple(map(float, data["saved_shares"])),
        )


@dataclass(frozen=True, eq=False)
class ExitPredictions:
    """Predictions of one batch, and the exit that produced each.

    Args:
        logits: (B, n_classes).
        exits: (B,) number of the exit where each sample left, counted from 0; the number of exits for the end.
    """

    logits: Tensor
    exits: Tensor
