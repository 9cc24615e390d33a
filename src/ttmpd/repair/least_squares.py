"""Least squares from running sums: what every closed-form fit of this package is solved by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 4096
"""Rows whose products are summed in their own precision."""

Solve = Callable[[], tuple[Tensor, Tensor | None]]
"""Answers (weight, bias) for the outputs that are wanted when it is called; see :meth:`NormalEquations.solve`."""


@dataclass
class NormalEquations:
    """Running sums of a weighted regression of ``y`` on ``[x 1]``, in float64.

    Memory is O(n_inputs^2) however many rows are added.

    Args:
        n_inputs: width of ``x``.
        n_outputs: width of ``y``.
        device: of the rows.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> sums = NormalEquations(1, 1)
        >>> sums.add(x, 3 * x + 1)
        >>> weight, bias = sums.solve(torch.zeros(1, 1), torch.zeros(1), ridge=0.0)
        >>> round(float(weight), 6), round(float(bias), 6)
        (3.0, 1.0)
    """

    n_inputs: int
    n_outputs: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        # MPS has no float64: there the small sums live on the CPU.
        self.at = torch.device("cpu") if self.device.type == "mps" else self.device
        self.gram = torch.zeros(self.n_inputs + 1, self.n_inputs + 1, dtype=torch.float64, device=self.at)
        self.cross = torch.zeros(self.n_inputs + 1, self.n_outputs, dtype=torch.float64, device=self.at)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` (rows, n_inputs), ``y`` (rows, n_outputs), ``weight`` (rows,); those of weight 0 are skipped.

        Products of these rows, few at a time, are taken in the precision of ``x``: for wide layers single precision is
        twice as fast and as good, since the sums over all of them are float64 anyway.
        """
        for left, given, wanted in self._parts(x, y, weight):
            self.gram += left.T @ given
            self.cross += left.T @ wanted

    def want(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Want other outputs of all the rows that were added: the same ``x`` and ``weight`` with another ``y``."""
        self.cross.zero_()
        for left, _, wanted in self._parts(x, y, weight):
            self.cross += left.T @ wanted

    def _parts(self, x: Tensor, y: Tensor, weight: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(weighted [x 1], [x 1], y), few enough at a time for single precision."""
        if weight is not None:
            weight = weight.to(x.device)
            there = weight > 0
            x, y, weight = x[there], y[there.to(y.device)], weight[there]
        precision = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, len(x), AT_ONCE):
            few = slice(start, start + AT_ONCE)
            part = F.pad(x[few].to(self.at, precision), (0, 1), value=1.0)
            yield (part if weight is None else part * weight[few].to(part)[:, None]), part, y[few].to(part)

    def penalty(self, ridge: float) -> float:
        """``ridge`` times the mean square of an input, over all rows; never quite nothing."""
        return (ridge * float(self.gram.diagonal()[:-1].mean()) if self.n_inputs else 0.0) + 1e-12

    def solve(
        self, old: Tensor, old_bias: Tensor, ridge: float, free_bias: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) that minimise the squared error plus ``penalty(ridge) x |weight - old|^2``.

        Args:
            old: (n_outputs, n_inputs), what the ridge draws the weight to.
            old_bias: (n_outputs,).
            ridge: see :meth:`penalty`; of several solutions without one, the nearest to ``old``.
            free_bias: whether there is a bias; else it stays ``old_bias`` and None is answered.

        Returns:
            float32 on the device of the rows.
        """
        return self.solver(old, old_bias, free_bias)(ridge)()

    def solver(self, old: Tensor, old_bias: Tensor, free_bias: bool = True) -> Callable[[float], Solve]:
        """:meth:`solve` for several ridges, and for each of them several sets of wanted outputs.

        What they share is worked up once: nothing may be added meanwhile.
        """
        start = torch.cat([old.double().T, old_bias.double()[None]]).to(self.at)
        n, base = self.n_inputs + free_bias, self.gram @ start

        def with_ridge(ridge: float) -> Solve:
            invert = _inverted(self._penalized(ridge)[:n, :n], ridge > 0)

            def solved() -> tuple[Tensor, Tensor | None]:
                found = start.clone()
                found[:n] += invert((self.cross - base)[:n])
                weight, bias = found[:-1].T.to(self.device, torch.float32), found[-1].to(self.device, torch.float32)
                return weight, bias if free_bias else None

            return solved

        return with_ridge

    def inverse(self, ridge: float) -> Tensor:
        """Inverse of the penalised moments of ``[x 1]``; with a larger ridge where rounding leaves them indefinite."""
        ridge = max(ridge, 1e-15)
        while True:
            factor, failed = torch.linalg.cholesky_ex(self._penalized(ridge))
            if not int(failed) or ridge > 1e9:
                return torch.cholesky_inverse(factor)
            ridge *= 10

    def _penalized(self, ridge: float) -> Tensor:
        system = self.gram.clone()
        system.diagonal()[:-1] += self.penalty(ridge)
        system.diagonal()[-1] += 1e-12
        return system


def _inverted(system: Tensor, definite: bool) -> Callable[[Tensor], Tensor]:
    """What multiplies by the inverse of the system; of a singular one the pseudo-inverse: the shortest solutions."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if definite and not int(failed):
        return lambda right: torch.cholesky_solve(right, factor)
    driver = "gelsd" if system.device.type == "cpu" else None
    return lambda right: torch.linalg.lstsq(system, right, driver=driver)[0]
