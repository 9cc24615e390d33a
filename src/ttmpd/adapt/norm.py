"""Move the normalisation statistics towards the data as deep as the data's shift, and not their classes, explains."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ttmpd.adapt._statistics import (
    Statistics,
    layers_with_statistics,
    load_statistics,
    mix_statistics,
    predictions_and_order,
    statistics_of,
)
from ttmpd.adapt.base import Adapted, Adapter
from ttmpd.data.samples import Samples
from ttmpd.method import check_fields, check_range
from ttmpd.models.modules import clone
from ttmpd.models.run import predictions_of
from ttmpd.progress import track
from ttmpd.quality.evidence import Answers, parting
from ttmpd.training.task import task_of

MOST_ROWS = 50_000
"""Predictions that are compared: of pixels and tokens, which resemble their neighbors, every so many-th."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Statistics that were tried.

    Args:
        early: share of the data's in the early layers.
        late: the same in all others.
        statistics: of all layers.
        answers: to the samples under them.
    """

    early: float
    late: float
    statistics: Statistics
    answers: Answers


class Norm(Adapter):
    """Statistics = (1 - w) x source + w x data, early layers first, and only where answers show that it helps.

    Early layers' statistics carry the shift, late layers' carry the mixture of classes: with all of them new, clean
    data of few classes ruin a model. So the early layers move first, by the share under which the samples explain
    most of the variety of the answers; the late layers follow by the same share where that makes answers surer, for
    variety that late layers add earns nothing. What is chosen must explain clearly more than the source does, else the
    model stays as it came. Only where even the gentlest move makes the two answer differently more often than their
    doubts allow for is a shift so plain that it is enough not to explain clearly less.
    """

    source: ClassVar[str] = (
        "statistics mixing: Schneider et al., 2020 (arXiv 2006.16971); criterion: information maximisation (Krause et "
        "al., 2010) over the entropy of the mean answer (Theil, 1970); early layers first and the comparison with the "
        "source: this project's choice"
    )
    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Candidates for w, beside 0, which leaves the teacher as it is; one alone is taken for all layers, unasked."""
    depth: float = 2 / 3
    """Share of the layers, from the input on, that are early."""
    certainty: float = 2.0
    """Standard errors from which a difference to the source is clear."""
    max_samples: int = 512
    """Samples that are used, from the first on."""

    def __post_init__(self) -> None:
        check_range("norm.weights, their number", len(self.weights), 1)
        for weight in self.weights:
            check_range("norm.weights", weight, 0.0, 1.0)
        check_fields(self, depth=(0.0, 1.0), certainty=0.0, max_samples=2)

    def adapt(self, teacher: nn.Module, samples: Samples, *, batch_size: int = 64, seed: int = 0) -> Adapted:
        """A copy of the teacher with mixed statistics; the teacher itself where nothing can or shall be done.

        Facts: ``weight`` in the early layers and ``weight_late`` in the others, how much of the variety of the answers
        is ``explained`` and was by the source (``explained_source``), and those of :func:`parting`.

        Cost: one pass, two for each candidate but 0, and two for the late layers: 11 in all.
        """
        return self.mixed(teacher, samples, batch_size)[0]

    def mixed(self, teacher: nn.Module, samples: Samples, batch_size: int) -> tuple[Adapted, Tensor | None]:
        """What :meth:`adapt` gives, and the (rows, values) answers of the teacher; None where it was not asked."""
        if reason := _reason_not_to(teacher, samples):
            return Adapted(teacher, reason), None
        trials = _Trials(clone(teacher), samples.first(self.max_samples), batch_size, self.depth)
        chosen, source = self._chosen(trials), trials.source
        told = parting(source.answers.outputs, chosen.answers.outputs, trials.task)
        facts = {
            "weight": chosen.early,
            "weight_late": chosen.late,
            "explained": chosen.answers.explained(),
            "explained_source": source.answers.explained(),
        } | told.facts
        note = f"{trials.described(chosen)}{told.note}"
        if chosen is source:
            return Adapted(teacher, note, facts), source.answers.outputs
        load_statistics(trials.model, chosen.statistics)
        return Adapted(trials.model, note, facts), source.answers.outputs

    def _chosen(self, trials: "_Trials") -> _Candidate:
        """The candidate that explains most, if that is clearly more than the source does, or the source."""
        if len(set(self.weights)) == 1:
            return trials.candidate(self.weights[0], self.weights[0])
        weights = sorted(weight for weight in self.weights if weight > 0)
        tried = list(track((trials.candidate(weight, 0.0) for weight in weights), "adapt", len(weights)))
        options = [max(tried, key=lambda candidate: candidate.answers.explained())]
        if trials.late:
            share, early = options[0].early, options[0].answers
            deep = trials.candidate(share, share, reference=early.outputs)
            if deep.answers.explained() > early.explained():
                options.insert(0, deep)
        # By the gentlest of moves: it hardly changes the answers of a model that is sound on these data.
        plain = tried[0].answers.parted_beyond_doubt(trials.source.answers, self.certainty)
        for option in options:
            gain, error = option.answers.gain(trials.source.answers)
            if gain > self.certainty * (-error if plain else error):
                return option
        return trials.source


class _Trials:
    """Tries statistics on a copy of the teacher.

    Args:
        model: changed in place.
        samples: from which statistics are taken and to which is answered.
        batch_size: samples per forward pass.
        depth: share of the layers that are early.
    """

    def __init__(self, model: nn.Module, samples: Samples, batch_size: int, depth: float) -> None:
        self.model, self.samples, self.batch_size, self.task = model, samples, batch_size, task_of(model)
        outputs, order = predictions_and_order(model, samples, batch_size)
        self.step = max(1, -(-len(outputs) // MOST_ROWS))
        outputs = outputs[:: self.step].clone()
        n_early = max(1, round(depth * len(order)))
        self.early, self.late = order[:n_early], order[n_early:]
        self.source = _Candidate(0.0, 0.0, statistics_of(model), Answers(self.task, outputs, outputs))

    def candidate(self, early: float, late: float, reference: Tensor | None = None) -> _Candidate:
        """The model under mixed statistics; ``reference`` gives the answers whose variety counts, if not its own."""
        load_statistics(self.model, self.source.statistics)
        shares = dict.fromkeys(self.early, early) | dict.fromkeys(self.late, late)
        mix_statistics(self.model, self.samples, self.batch_size, shares)
        outputs = predictions_of(self.model, self.samples, self.batch_size)[:: self.step].clone()
        answers = Answers(self.task, outputs, outputs if reference is None else reference)
        return _Candidate(early, late, statistics_of(self.model), answers)

    def described(self, chosen: _Candidate) -> str:
        """What was done, in words."""
        n = len(self.samples)
        if chosen is self.source:
            return f"normalisation statistics kept: those of {n} samples would not make the answers clearly better"
        if chosen.early == chosen.late or not self.late:
            return f"normalisation statistics mixed, {chosen.early:.0%} from {n} samples"
        depth = f"the first {len(self.early)} of {len(self.early) + len(self.late)} layers"
        return f"normalisation statistics mixed, {chosen.early:.0%} from {n} samples in {depth}, none behind"


def _reason_not_to(teacher: nn.Module, samples: Samples) -> str:
    """Why nothing can be done; "" where something can."""
    if not layers_with_statistics(teacher):
        return "nothing to do: the model has no batch statistics"
    if reason := task_of(teacher).reason_not_to_adapt:
        return f"nothing done: {reason}"
    return "nothing done: statistics need at least two samples" if len(samples) < 2 else ""
