"""Ridge least squares from running sums: the solver of every closed-form fit in this package."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 4096
"""Rows whose products are summed in their own precision."""

BLOCK = 2048
"""Columns of the second moments that are summed at once: what a product takes beside them."""

Solve = Callable[[], tuple[Tensor, Tensor | None]]
"""Returns (weight, bias) for the targets that are set when it is called; see :meth:`NormalEquations.solve`."""


@dataclass
class NormalEquations:
    """The normal equations of a weighted regression of ``y`` on ``[x 1]``, summed in float64.

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
        # MPS has no float64: there the sums, which are small, stay on the CPU.
        self.sum_device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.gram = torch.zeros(self.n_inputs + 1, self.n_inputs + 1, dtype=torch.float64, device=self.sum_device)
        self.cross = torch.zeros(self.n_inputs + 1, self.n_outputs, dtype=torch.float64, device=self.sum_device)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: ``x`` (rows, n_inputs), ``y`` (rows, n_outputs), ``weight`` (rows,); those of weight 0 are skipped.

        Products of ``CHUNK_ROWS`` rows at a time are taken in the precision of ``x``: for wide layers single precision
        is twice as fast and as accurate, since the sums over all chunks are in float64. Of wide ones only one half of
        the products is computed, block by block: they are symmetric.
        """
        for weighted, design, targets in self._chunks(x, y, weight):
            for start in range(0, self.n_inputs + 1, BLOCK):
                columns, before = slice(start, start + BLOCK), slice(start)
                products = weighted[:, columns].T @ design[:, : start + BLOCK]
                self.gram[columns, : start + BLOCK] += products
                self.gram[before, columns] += products[:, before].T
            self.cross += weighted.T @ targets

    def set_targets(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Replace the outputs of all rows that were added: pass the same ``x`` and ``weight`` with another ``y``."""
        self.cross.zero_()
        for weighted, _, targets in self._chunks(x, y, weight):
            self.cross += weighted.T @ targets

    def _chunks(self, x: Tensor, y: Tensor, weight: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(weighted [x 1], [x 1], y), at most ``CHUNK_ROWS`` rows at a time."""
        if weight is not None:
            weight = weight.to(x.device)
            counts = weight > 0
            x, y, weight = x[counts], y[counts.to(y.device)], weight[counts]
        precision = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, len(x), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            design = F.pad(x[chunk].to(self.sum_device, precision), (0, 1), value=1.0)
            weighted = design if weight is None else design * weight[chunk].to(design)[:, None]
            yield weighted, design, y[chunk].to(design)

    def penalty(self, ridge: float) -> float:
        """``ridge`` times the mean over inputs of their summed squares; never exactly zero."""
        return (ridge * float(self.gram.diagonal()[:-1].mean()) if self.n_inputs else 0.0) + 1e-12

    def solve(
        self, old: Tensor, old_bias: Tensor, ridge: float, free_bias: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) that minimise the squared error plus ``penalty(ridge) x |weight - old|^2``.

        Args:
            old: (n_outputs, n_inputs) weight that the ridge pulls the solution towards.
            old_bias: (n_outputs,).
            ridge: relative strength, see :meth:`penalty`; with 0 the solution closest to ``old`` is taken.
            free_bias: fit the bias, too; otherwise it is held at ``old_bias`` and None is returned for it.

        Returns:
            float32 tensors on the device of the rows.
        """
        return self.solver(old, old_bias, free_bias)(ridge)()

    def solver(self, old: Tensor, old_bias: Tensor, free_bias: bool = True) -> Callable[[float], Solve]:
        """:meth:`solve` for several ridges, and several targets for each: ``solver(old, old_bias)(ridge)()``.

        What the solutions share is computed once, so no rows may be added in between; the matrix is factorised once per
        ridge, and each call after :meth:`set_targets` is a back-substitution.
        """
        start = torch.cat([old.double().T, old_bias.double()[None]]).to(self.sum_device)
        n, base = self.n_inputs + free_bias, self.gram @ start

        def with_ridge(ridge: float) -> Solve:
            solve_system = _solver_of(self._penalized(ridge)[:n, :n], ridge > 0)

            def solve() -> tuple[Tensor, Tensor | None]:
                solution = start.clone()
                solution[:n] += solve_system((self.cross - base)[:n])
                solution = solution.to(self.device, torch.float32)
                return solution[:-1].T, solution[-1] if free_bias else None

            return solve

        return with_ridge

    def inverse(self, ridge: float) -> Tensor:
        """Inverse of the penalised Gram matrix of ``[x 1]``; the ridge grows where rounding leaves it indefinite."""
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


def _solver_of(system: Tensor, definite: bool) -> Callable[[Tensor], Tensor]:
    """A function that solves the system for a right-hand side; of a singular one, the solution of least norm."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if definite and not int(failed):
        return lambda right: torch.cholesky_solve(right, factor)
    driver = "gelsd" if system.device.type == "cpu" else None
    return lambda right: torch.linalg.lstsq(system, right, driver=driver)[0]
