"""Closed-form repair: every layer after a removal is fitted to the teacher's outputs, one after the other.

Linear replacements, layers that read the members of narrowed units and all later layers are fitted in the order of the
network, each on the *student's* own inputs, so that later layers make up for what earlier ones could not repair.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.models.modules import module_at
from ttmpd.models.run import StopForwardError, evaluating
from ttmpd.progress import track
from ttmpd.records import RefitScope, Removal
from ttmpd.repair.limits import ROWS
from ttmpd.repair.positions import PositionSample, sample_positions
from ttmpd.repair.refit import FitRows, refit, rescale_members
from ttmpd.repair.refit_points import RefitPoint, Role, find_refit_points, watch_points
from ttmpd.repair.runner import Call, ModuleRunner
from ttmpd.repair.unfold import input_rows, rows
from ttmpd.surgery.cut import build

MAX_TARGETS = 64 * 2**20
"""Values of the teacher's outputs that are held at once; for more the teacher runs again."""


MAX_INPUT_VALUES = 128 * 2**20
"""Values that the inputs of a container may have, over all samples; beyond, fewer samples enter."""


def repaired(
    teacher: nn.Module,
    removals: Sequence[Removal],
    samples: Samples,
    *,
    ridge: float | None = None,
    batch_size: int = 64,
    sensitivity: float = 0.9,
    refit_scope: RefitScope = "all_later_layers",
    rows: int = ROWS,
) -> nn.Module:
    """The student of a plan, brought as close to the teacher as closed forms can.

    Args:
        teacher: the original model; not changed.
        removals: in the order of the network.
        samples: unlabelled samples; a few hundred are enough.
        ridge: see :func:`ttmpd.repair.refit.refit`.
        batch_size: samples per forward pass.
        sensitivity: 0 weighs all positions alike, 1 by the squared gradients of the final features alone.
        refit_scope: "all_later_layers" fits every layer from the first removal on but the output layer, "removed_only"
            the linear replacements and the layers that read narrowed members; "rescale" gives each member that stays
            one factor (KCM), up to the first layer whose factors cannot be trusted.
        rows: of every fit: so many pixels or tokens, evenly from all samples.

    Returns:
        A new model in eval mode.

    Source: least-squares reconstruction on the student's own inputs (He et al., ICCV 2017, arXiv 1707.06168); here of
    all layers after a removal, of sums with shortcuts, and aware of the clipping that follows.

    Cost: one batch with gradients, one teacher pass, about one pass of the student, and per layer one run of its
    container; more teacher passes if its outputs are too many to be held.
    """
    student, device = build(teacher, removals), next(teacher.parameters()).device
    points: list[RefitPoint] = []
    if removals:
        pair, later_layers = samples.batch(slice(0, 2), device), refit_scope == "all_later_layers"
        points = find_refit_points(teacher, student, removals, pair, later_layers=later_layers)
    fits = _Fits(teacher, student, samples, batch_size, sensitivity, rows)
    with evaluating(teacher), evaluating(student):
        for point, fit_rows in track(fits.in_order(points), "repair", len(points)):
            if refit_scope != "rescale":
                refit(student, point, fit_rows, ridge)
            elif not rescale_members(student, point, fit_rows):
                break
    return student


@dataclass(frozen=True, eq=False)
class _Fits:
    """Collects the rows of one point after the other, while the layers of the student before it are fitted already."""

    teacher: nn.Module
    student: nn.Module
    samples: Samples
    batch_size: int
    sensitivity: float
    n_rows: int

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def in_order(self, points: Sequence[RefitPoint]) -> Iterator[tuple[RefitPoint, FitRows]]:
        """Every point with its rows; the caller fits the layer before it asks for the next one."""
        if not points:
            return
        containers = [path for path, _ in groupby(point.container for point in points)]
        runner = ModuleRunner(self.student, containers, self.samples, self.batch_size, self.device)
        samples = self.samples.first(max(32, MAX_INPUT_VALUES // runner.max_input_values))
        runner = dataclasses.replace(runner, samples=samples)
        limit = -(-self.n_rows // len(samples))
        sampled = sample_positions(self.teacher, points, samples, self.sensitivity, limit=limit)
        for group in _groups(points, sampled):
            targets = self._targets(group, sampled)
            for point in group:
                yield point, self._rows(runner, point, sampled, targets.pop(point.id))

    def _rows(
        self, runner: ModuleRunner, point: RefitPoint, sampled: PositionSample, targets: Sequence[Tensor]
    ) -> FitRows:
        """The rows of a point, without those of padding, which in text are often most of all."""
        columns = []
        batches = torch.split(runner.samples.inputs, self.batch_size)
        for call, batch, y in zip(runner.calls(point.container), batches, targets, strict=True):
            x, residual = _student_rows(runner, point, call, sampled.positions(point, batch))
            weight = sampled.row_weights(point, batch, len(x)).to(x.device)
            counts = _nonzero(weight)
            columns.append((x[counts], y, x[:0] if residual is None else residual[counts], weight[counts]))
        x, y, residual, weight = (torch.cat(column) for column in zip(*columns, strict=True))
        return FitRows(x, y, residual if len(residual) else x.new_zeros(1, 1), weight)

    def _targets(self, points: Sequence[RefitPoint], sampled: PositionSample) -> dict[str, list[Tensor]]:
        """The teacher's rows at the points, batch by batch; what comes after the last of them is not run."""
        targets: dict[str, list[Tensor]] = {point.id: [] for point in points}

        def note(point: RefitPoint, role: Role, value: Tensor) -> None:
            if (role == "sum") == point.adds_to_residual:
                part = rows(value, point.layout, sampled.positions(point, batch))
                part = part[_nonzero(sampled.row_weights(point, batch, len(part)).to(part.device))]
                targets[point.id].append(part[:, list(point.kept_outputs)] if point.kept_outputs else part)
                if len({len(batches) for batches in targets.values()}) == 1:
                    raise StopForwardError

        with watch_points(self.teacher, points, note, inputs=False):
            for batch in sampled.samples.batches(self.batch_size, self.device):
                with contextlib.suppress(StopForwardError):
                    self.teacher(batch)
        return targets


def _student_rows(
    runner: ModuleRunner, point: RefitPoint, call: Call, positions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(inputs of the layer, what is added to its output or None) at the positions, for one batch."""
    layer, tensors = module_at(runner.model, point.layer), dict[str, Tensor]()

    def note(_point: RefitPoint, role: Role, value: Tensor) -> None:
        is_input = role == "input"
        tensors[role] = (
            input_rows(value, point.layout, positions, layer) if is_input else rows(value, point.layout, positions)
        )
        if role == ("sum" if point.adds_to_residual else "input"):
            raise StopForwardError

    with watch_points(runner.model, [point], note), contextlib.suppress(StopForwardError):
        runner.run(point.container, call)
    return tensors["input"], tensors["sum"] - tensors["output"] if point.adds_to_residual else None


def _nonzero(weight: Tensor) -> Tensor | slice:
    """Index of the rows with a weight above zero; a slice, which copies nothing, where all have one."""
    counts = weight > 0
    return slice(None) if bool(counts.all()) else counts


def _groups(points: Sequence[RefitPoint], sampled: PositionSample) -> Iterator[list[RefitPoint]]:
    """The points in groups whose targets fit in memory together; each group takes a teacher pass."""
    group: list[RefitPoint] = []
    total = 0
    for point in points:
        size = sampled.n_rows(point) * point.channels
        if group and total + size > MAX_TARGETS:
            yield group
            group, total = [], 0
        group.append(point)
        total += size
    yield group
