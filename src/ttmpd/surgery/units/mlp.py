"""MLP sublayers of transformer blocks, with the norm before them: the shortcut beside them stays."""

from typing import ClassVar

from torch import Tensor, nn

from ttmpd.models.tiny import tiny_tokens, tiny_transformer
from ttmpd.surgery.branches import branch_units, find_branches
from ttmpd.surgery.observation import Observation
from ttmpd.surgery.units.base import DepthUnits, UnitSearch


class Mlp(DepthUnits):
    """Whole MLPs beside a shortcut: ``x + f(norm(x))`` becomes ``x``, and ``norm(x + f(x))`` becomes ``norm(x)``.

    Example:
        >>> model, batch = Mlp().example()
        >>> [unit.id for unit in Mlp().find(model, batch).units]
        ['mlp:blocks.0.down', 'mlp:blocks.1.down']
    """

    source: ClassVar[str] = "CoFi (ACL 2022, arXiv 2204.00408): FFN layers as units; found here in the autograd graph"

    def search(self, observation: Observation) -> UnitSearch:
        """The MLP sublayers, in the order of the network."""
        branches = [branch for branch in find_branches(observation) if branch.is_mlp]
        units, refusals = branch_units(observation, self.name, branches)
        return UnitSearch(tuple(units), refusals)

    def example(self, n: int = 4) -> tuple[nn.Module, Tensor]:
        """Two transformer blocks, and tokens for them."""
        return tiny_transformer(), tiny_tokens(n)
