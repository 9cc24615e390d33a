"""``evaluate`` and ``bench``: how good and how fast a compressed model is; compression itself never comes here."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ttmpd.artifact.read import Source, open_any
from ttmpd.data.labels import Labels, open_labels
from ttmpd.data.open import stream_samples
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import ModelError, SamplesError, UnsupportedError
from ttmpd.latency.device import choose_device
from ttmpd.method import check_range, method_of
from ttmpd.models.modules import clone, has_nan
from ttmpd.models.opened import OpenedModel
from ttmpd.models.run import predictions_of
from ttmpd.models.tokens import carried_task
from ttmpd.progress import tell
from ttmpd.quality.calibration import N_BINS, calibration_sums, expected_calibration_error
from ttmpd.quality.proportion import Proportion, proportion
from ttmpd.tasks.base import Task
from ttmpd.training.task import assign_task


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """How one model answers.

    Args:
        confidence: mean probability of the predicted class; None where the task knows no confidence.
        accuracy: with its interval; None without labels.
        calibration_error: expected calibration error over 15 bins; None without labels.
        loss: mean cross entropy in nats; None without labels. Its exponential is a decoder's perplexity.
    """

    confidence: float | None
    accuracy: Proportion | None = None
    calibration_error: float | None = None
    loss: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found on data that compression has not seen.

    Args:
        n_samples: answers that count: one per sample, or one per token that is answered.
        n_left_out: samples that were left out because compression used them.
        n_skipped: samples that could not be used.
        model: quality of the model.
        against: quality of the other model, if there is one.
        agreement: share of samples on which both answer alike. It is not accuracy.
        notes: (what, how many) of what was done to samples before the model saw them.
        each: what is answered, "sample", "token" or "pixel".
        task: what the models predict, which says what agreement means: the name of a file in ``ttmpd/tasks``.
    """

    n_samples: int
    n_left_out: int
    n_skipped: int
    model: Quality
    against: Quality | None = None
    agreement: Proportion | None = None
    notes: tuple[tuple[str, int], ...] = ()
    each: str = "sample"
    task: str = "classification"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(eq=False)
class _Sums:
    """Running counts of one model."""

    n: int = 0
    n_right: int = 0
    confidence: float = 0.0
    has_confidence: bool = True
    loss: float = 0.0
    bins: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3, N_BINS, dtype=torch.float64))

    def add(self, outputs: Tensor, labels: Tensor | None, task: Task) -> None:
        outputs = outputs.double()
        confidence = task.confidence(outputs)
        self.n, self.has_confidence = self.n + len(outputs), confidence is not None
        self.confidence += 0.0 if confidence is None else float(confidence.sum())
        if labels is None:
            return
        labelled, columns = task.first_part(outputs)
        right, confidence = labelled.right(columns, labels), labelled.confidence(columns)
        assert right is not None and confidence is not None  # of every task that has classes
        self.n_right += int(right.sum())
        self.loss += float(labelled.label_loss(columns, labels)) * len(labels)
        self.bins += calibration_sums(confidence, right)

    def quality(self, labelled: bool) -> Quality:
        confidence = self.confidence / self.n if self.has_confidence else None
        if not labelled:
            return Quality(confidence)
        error = expected_calibration_error(self.bins)
        return Quality(confidence, proportion(self.n_right, self.n), error, self.loss / self.n)


def evaluate(
    model: Source,
    samples: Any,
    labels: str | Path | Sequence[int] | None = None,
    *,
    against: Source | None = None,
    source: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    task: Task | str | None = None,
) -> Evaluation:
    """How good a model is on data; samples that compression used are left out.

    A decoder needs no labels: what it should have answered is the next token.

    Args:
        model: a module, an id or an artifact folder.
        samples: what :func:`ttmpd.compress` takes; never all in memory.
        labels: a .npz with ``y``, a .csv with the columns ``file`` and ``label``, a .tsv, .csv or .jsonl with a column
            ``label`` and a row for each text, the folder of the samples if it has a sub-folder for each class, or one
            class index per sample; None evaluates without accuracy.
        against: another model on the same samples, usually the original.
        source: id of the original model, for artifacts of a model from your own code.
        batch_size: samples per forward pass.
        device: "auto", "cpu", "cuda", "mps".
        task: what the models predict; None takes that of an artifact, else detects it.

    Raises:
        SamplesError: nothing is left to evaluate on, or a sample has no label or one that the model does not know.
        UnsupportedError: labels are given for a model that answers each token, or two models answer other tokens.

    Example:
        >>> import torch
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> found = evaluate(tiny_model(), torch.rand(20, 3, 8, 8), labels=[0, 1, 2, 3] * 5, against=tiny_model())
        >>> found.n_samples, found.agreement.share
        (20, 1.0)
    """
    check_range("batch_size", batch_size, 1)
    opened = _same_lengths([open_any(place, source) for place in (model, against) if place is not None])
    kind = _text_kind(opened, labels)
    run = _Evaluation(opened, choose_device(device), batch_size, task)
    if labels is not None:
        run.labels = _labels(labels, samples, _class_names(opened[0].module))
    for chunk in _chunks(samples, opened, chunk=max(batch_size, 512 if kind == "sequence" else 0)):
        run.add(chunk)
        tell("evaluate", run.sums[0].n, 0)
    tell("evaluate", run.sums[0].n, run.sums[0].n)
    return run.result()


class _Evaluation:
    """An evaluation under way: one model or two, their tasks once there are samples, and what was counted."""

    def __init__(
        self, opened: Sequence[OpenedModel], device: torch.device, batch_size: int, task: Task | str | None
    ) -> None:
        self.opened, self.device, self.batch_size = opened, device, batch_size
        self.models = [clone(each.module).to(device).eval() for each in opened]
        self.task = cast(Task, method_of("task", task)) if isinstance(task, str) else task
        self.used_ids = frozenset(name for each in opened for name in each.used_ids)
        self.labels: Labels | None = None
        self.tasks: list[Task] = []
        self.sums = [_Sums() for _ in opened]
        self.alike, self.n_left_out, self.n_skipped = 0.0, 0, 0
        self.notes: Counter[str] = Counter()
        self.has_targets = False

    def add(self, chunk: Sequence[Samples]) -> None:
        """Count the samples of a chunk, as each model wants them, that compression has not used."""
        self.n_skipped += len(chunk[0].skipped)
        self.notes.update(dict(chunk[0].notes))
        unused = [position for position, name in enumerate(chunk[0].ids) if name not in self.used_ids]
        self.n_left_out += len(chunk[0]) - len(unused)
        if not unused:
            return
        parts = [samples.subset(unused) for samples in chunk]
        if not self.tasks:
            self._assign(parts)
        outputs = [self._predictions(model, part) for model, part in zip(self.models, parts, strict=True)]
        outputs, truth = self._labelled(parts[0], outputs)
        for sums, rows in zip(self.sums, outputs, strict=True):
            sums.add(rows, truth, self.tasks[0])
        self.alike += float(self.tasks[0].alike(outputs[0], outputs[-1]).sum())

    def _assign(self, parts: Sequence[Samples]) -> None:
        """Find what the models predict; one that does not say so is read as the one that does."""
        carried = next((task for task in map(carried_task, self.models) if task is not None), None)
        for model, part, opened in zip(self.models, parts, self.opened, strict=True):
            task = self.task or (carried if carried_task(model) is None else None)
            batch = part.first(2).trimmed(slice(None), self.device)
            self.tasks.append(assign_task(model, batch, task, opened.preprocessing))
        _check_tasks(self.tasks, self.labels)

    def _predictions(self, model: nn.Module, samples: Samples) -> Tensor:
        outputs = predictions_of(model, samples, self.batch_size)
        if has_nan(outputs):
            raise ModelError(f"{type(model).__name__} must predict finite values for each sample, but got NaN or inf")
        return outputs

    def _labelled(self, samples: Samples, outputs: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """The predictions that count, and their labels: given ones, or those that the inputs hold."""
        if self.labels is not None:
            return outputs, _checked(self.labels.of(samples), self.tasks, self.labels.source)
        targets = self.tasks[0].targets(samples.inputs)
        if targets is None:
            return outputs, None
        self.has_targets = True
        return [rows[targets >= 0] for rows in outputs], targets[targets >= 0]

    def result(self) -> Evaluation:
        """What was counted.

        Raises:
            SamplesError: nothing was.
        """
        n = self.sums[0].n
        if not n:
            raise SamplesError(
                f"evaluate must have samples that compression has not seen, but all {self.n_left_out} were used; give "
                "other data"
            )
        quality = [sums.quality(self.labels is not None or self.has_targets) for sums in self.sums]
        against, agreement = (None, None) if len(quality) == 1 else (quality[1], proportion(round(self.alike), n))
        task, notes = self.tasks[0], tuple(self.notes.items())
        return Evaluation(
            n, self.n_left_out, self.n_skipped, quality[0], against, agreement, notes, task.each, task.name
        )


def _check_tasks(tasks: Sequence[Task], labels: Labels | None) -> None:
    """Both models must predict the same; class indices are labels of classes alone."""
    first, last = tasks[0], tasks[-1]
    if type(first) is not type(last) or len(first.widths) != len(last.widths):
        raise UnsupportedError(
            f"two models must predict the same to be compared, but the tasks are {first.name} and {last.name}"
        )
    if labels is not None and not first.class_labels:
        raise UnsupportedError(
            f"labels must be one class per sample, but the task is {first.name}; leave them out, and give the outputs "
            "and true values to its metrics()"
        )


def _same_lengths(opened: list[OpenedModel]) -> list[OpenedModel]:
    """The models, all of which read as many tokens of a text as the first where they have its tokenizer."""
    first = opened[0].preprocessing

    def as_first(model: OpenedModel) -> OpenedModel:
        tokenization = model.preprocessing
        if not (isinstance(first, Tokenization) and isinstance(tokenization, Tokenization)):
            return model
        if first.max_length > tokenization.limit:
            return model
        same = dataclasses.replace(tokenization, max_length=first.max_length) == first
        return dataclasses.replace(model, preprocessing=first) if same else model

    return [as_first(model) for model in opened]


def _text_kind(opened: Sequence[OpenedModel], labels: object) -> str:
    """What a row of predictions belongs to, "sequence", "token" or "next"; "sequence" for models without text.

    Raises:
        UnsupportedError: there are labels for tokens, or two models of tokens read other ones.
    """
    preparations = [model.preprocessing for model in opened]
    kinds = [each.task if isinstance(each, Tokenization) else "sequence" for each in preparations]
    if kinds[0] != "sequence" and labels is not None:
        raise UnsupportedError(
            f"labels must be one class per sample, but {type(opened[0].module).__name__} answers each token; "
            "leave them out"
        )
    if set(kinds) != {"sequence"} and any(each != preparations[0] for each in preparations):
        raise UnsupportedError(
            "two models that answer each token must read the same tokens, but their tokenizers or lengths differ"
        )
    return kinds[0]


def _class_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the model's classes in the order of its outputs, where its config has some of its own."""
    names = getattr(getattr(module, "config", None), "id2label", None) or {}
    named = isinstance(names, dict) and not all(str(name).startswith("LABEL_") for name in names.values())
    return tuple(str(names[index]) for index in sorted(names)) if named else ()


def _labels(labels: str | Path | Sequence[int], data: Any, class_names: Sequence[str]) -> Labels:
    if isinstance(labels, str | Path):
        return open_labels(labels, data, class_names)
    return Labels({str(i): int(value) for i, value in enumerate(labels)}, "labels")


def _checked(labels: Tensor, tasks: Sequence[Task], source: str) -> Tensor:
    n_classes = min(task.widths[0] for task in tasks)
    if int(labels.max()) >= n_classes:
        raise SamplesError(
            f"{source} must hold class indices below {n_classes}, the number of the model's outputs, but holds "
            f"{int(labels.max())}; number the classes in the order of the model's outputs"
        )
    return labels


def _chunks(data: Any, opened: Sequence[OpenedModel], chunk: int) -> Iterator[tuple[Samples, ...]]:
    """The same samples as each model wants them: read once when all want the same."""
    forms = [model.preprocessing for model in opened]
    first = next((form for form in forms if form is not None), None)
    forms = [form or first for form in forms]
    if all(form == forms[0] for form in forms):
        yield from ((samples,) * len(forms) for samples in stream_samples(data, forms[0], chunk=chunk))
        return
    for together in zip(*(stream_samples(data, form, chunk=chunk) for form in forms), strict=True):
        if len({samples.ids for samples in together}) != 1:
            raise SamplesError(
                "both models must be able to use the same samples, but one skips some that the other takes; "
                "take images out that are too small for either"
            )
        yield together
