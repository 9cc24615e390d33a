"""Closed-form repair: every layer behind a removal is fitted again, along the student, to what the teacher answers.

Stand-ins, layers that read the members of narrowed units and all layers behind them are fitted in the order of the
network, each on the *student's* own inputs, so that a later one makes up for what the ones before could not repair.
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
from ttmpd.repair.positions import PositionSample, sample_positions
from ttmpd.repair.refit import FitRows, refit, rescale_members
from ttmpd.repair.refit_points import RefitPoint, find_refit_points, watch_points
from ttmpd.repair.runner import Call, ModuleRunner
from ttmpd.repair.unfold import input_rows, rows
from ttmpd.surgery.cut import build

ROWS = 1 << 15
"""Rows of every fit."""


MAX_STORED = 64 * 2**20
"""Values of the teacher's answers that are held at once; for more the teacher runs again."""


MAX_GIVEN = 128 * 2**20
"""Values that a module may be given in all, which is run by itself to fit its layers; fewer samples enter beyond."""


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
    """The student of a plan, as near to the teacher as closed forms bring it.

    Args:
        teacher: the model as found; not changed.
        removals: in the order of the network.
        samples: unlabelled samples; a few hundred are enough.
        ridge: see :func:`ttmpd.repair.refit.refit`.
        batch_size: samples per forward pass.
        sensitivity: how far positions are weighted by what they mean to the final features; 0 counts all alike.
        refit_scope: "all_later_layers" fits every layer from the first removal on but the output layer, "removed_only"
            the linear replacements and the layers that read narrowed members; "rescale" gives each member that stays
            one factor (KCM), up to the first layer whose factors cannot be trusted.
        rows: of every fit: so many pixels or tokens, evenly from all samples.

    Returns:
        A new model in eval mode.

    Source: least-squares reconstruction on the student's own inputs (He et al., ICCV 2017, arXiv 1707.06168); here of
    all layers behind a removal, of sums with shortcuts, and aware of the clipping behind them.

    Cost: one batch with gradients, one teacher pass, about one pass of the student, and per layer one run of the module
    that holds it; more teacher passes where its answers are too many to be held.
    """
    student, device = build(teacher, removals), next(teacher.parameters()).device
    few = samples.batch(slice(0, 2), device)
    sites = (
        find_refit_points(teacher, student, removals, few, behind=refit_scope == "all_later_layers") if removals else []
    )
    fits = _Fits(teacher, student, samples, batch_size, sensitivity, rows)
    with evaluating(teacher), evaluating(student):
        for site, given in track(fits.along(sites), "repair", len(sites)):
            if refit_scope != "rescale":
                refit(student, site, given, ridge)
            elif not rescale_members(student, site, given):
                break
    return student


@dataclass(frozen=True, eq=False)
class _Fits:
    """Reads the rows of one site after the other, while the student before it is fitted already."""

    teacher: nn.Module
    student: nn.Module
    samples: Samples
    batch_size: int
    sensitivity: float
    n_rows: int

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def along(self, sites: Sequence[RefitPoint]) -> Iterator[tuple[RefitPoint, FitRows]]:
        """Every site with its rows; whoever takes them fits the layer before the next is asked for."""
        if not sites:
            return
        hosts = [host for host, _ in groupby(site.host for site in sites)]
        parts = ModuleRunner(self.student, hosts, self.samples, self.batch_size, self.device)
        samples = self.samples.first(max(32, MAX_GIVEN // parts.most_values))
        parts = dataclasses.replace(parts, samples=samples)
        limit = -(-self.n_rows // len(samples))
        entering = sample_positions(self.teacher, sites, samples, self.sensitivity, limit=limit)
        for bunch in _bunches(sites, entering):
            wanted = self._wanted(bunch, entering)
            for site in bunch:
                yield site, self._given(parts, site, entering, wanted.pop(site.id))

    def _given(
        self, parts: ModuleRunner, site: RefitPoint, entering: PositionSample, wanted: Sequence[Tensor]
    ) -> FitRows:
        """The rows of a site; those of padding, in text often the most of all, are left out."""
        found = []
        batches = torch.split(parts.samples.inputs, self.batch_size)
        for run, batch, y in zip(parts.calls(site.host), batches, wanted, strict=True):
            x, added = _read(parts, site, run, entering.index(site, batch))
            weight = entering.weights(site, batch, len(x)).to(x.device)
            counts = _counting(weight)
            found.append((x[counts], y, x[:0] if added is None else added[counts], weight[counts]))
        x, y, shortcut, weight = (torch.cat(column) for column in zip(*found, strict=True))
        return FitRows(x, y, shortcut if len(shortcut) else x.new_zeros(1, 1), weight)

    def _wanted(self, sites: Sequence[RefitPoint], entering: PositionSample) -> dict[str, list[Tensor]]:
        """The teacher's rows at the sites, batch by batch; what lies behind them is not run."""
        found: dict[str, list[Tensor]] = {site.id: [] for site in sites}

        def note(site: RefitPoint, what: str, value: Tensor) -> None:
            if (what == "sum") == site.joined:
                part = rows(value, site, entering.index(site, batch))
                part = part[_counting(entering.weights(site, batch, len(part)).to(part.device))]
                found[site.id].append(part[:, list(site.kept)] if site.kept else part)
                if len({len(parts) for parts in found.values()}) == 1:
                    raise StopForwardError

        with watch_points(self.teacher, sites, note, inputs=False):
            for batch in entering.samples.batches(self.batch_size, self.device):
                with contextlib.suppress(StopForwardError):
                    self.teacher(batch)
        return found


def _read(parts: ModuleRunner, site: RefitPoint, given: Call, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what the layer reads, what is added to its answer if anything is) at the positions, for one batch."""
    layer, seen = module_at(parts.model, site.layer), dict[str, Tensor]()

    def note(_site: RefitPoint, what: str, value: Tensor) -> None:
        seen[what] = input_rows(value, site, index, layer) if what == "input" else rows(value, site, index)
        if what == ("sum" if site.joined else "input"):
            raise StopForwardError

    with watch_points(parts.model, [site], note), contextlib.suppress(StopForwardError):
        parts.run(site.host, given)
    return seen["input"], seen["sum"] - seen["own"] if site.joined else None


def _counting(weight: Tensor) -> Tensor | slice:
    """Rows that weigh anything; nothing is copied where all do."""
    there = weight > 0
    return slice(None) if bool(there.all()) else there


def _bunches(sites: Sequence[RefitPoint], entering: PositionSample) -> Iterator[list[RefitPoint]]:
    """The sites in groups whose wanted rows are held at once; a teacher pass each."""
    bunch: list[RefitPoint] = []
    total = 0
    for site in sites:
        size = entering.n_rows(site) * site.channels
        if bunch and total + size > MAX_STORED:
            yield bunch
            bunch, total = [], 0
        bunch.append(site)
        total += size
    yield bunch
