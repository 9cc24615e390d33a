"""``evaluate`` and ``bench``: how good and how fast a compressed model is; compression itself never comes here."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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
from ttmpd.models.tokens import next_token_targets
from ttmpd.progress import tell
from ttmpd.quality.calibration import N_BINS, calibration_sums, expected_calibration_error
from ttmpd.quality.proportion import Proportion, proportion
from ttmpd.tasks.base import Task
from ttmpd.tasks.classification import Classification
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
    right: int = 0
    confidence: float = 0.0
    sure: bool = True
    loss: float = 0.0
    bins: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3, N_BINS, dtype=torch.float64))

    def add(self, outputs: Tensor, labels: Tensor | None, task: Task) -> None:
        confidence = task.confidence(outputs.double())
        self.n, self.sure = self.n + len(outputs), confidence is not None
        self.confidence += 0.0 if confidence is None else float(confidence.sum())
        if labels is None:
            return
        logits = task.split(outputs)[0]
        sure, answers = logits.double().softmax(-1).max(-1)
        right = (answers == labels).double()
        self.right += int(right.sum())
        self.loss += float(cross_entropy(logits.double(), labels, reduction="sum"))
        self.bins += calibration_sums(sure, right)

    def quality(self, labelled: bool) -> Quality:
        confidence = self.confidence / self.n if self.sure else None
        if not labelled:
            return Quality(confidence)
        return Quality(
            confidence, proportion(self.right, self.n), expected_calibration_error(self.bins), self.loss / self.n
        )


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
        task: what the models predict; None detects it.

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
    where = choose_device(device)
    opened = _alike([open_any(place, source) for place in (model, against) if place is not None])
    nets = [clone(one.module).to(where).eval() for one in opened]
    reads = _task(opened, labels)
    known = None if labels is None else _labels(labels, samples, _class_names(opened[0].module))
    used = frozenset(name for one in opened for name in one.used_ids)
    sums = [_Sums() for _ in opened]
    alike, n_left_out, n_skipped, tasks = 0.0, 0, 0, list[Task]()
    notes: Counter[str] = Counter()
    for chunk in _chunks(samples, opened, chunk=max(batch_size, 512 if reads == "sequence" else 0)):
        n_skipped += len(chunk[0].skipped)
        notes.update(dict(chunk[0].notes))
        kept = [i for i, name in enumerate(chunk[0].ids) if name not in used]
        n_left_out += len(chunk[0]) - len(kept)
        if not kept:
            continue
        parts = [part.subset(kept) for part in chunk]
        if not sums[0].n:
            tasks = [_assigned(net, part, one, task, where) for net, part, one in zip(nets, parts, opened, strict=True)]
            _check_labels(tasks, labels)
        answers = [_answers(net, part, batch_size) for net, part in zip(nets, parts, strict=True)]
        right = None if known is None else _checked(known.of(parts[0]), answers, known.source)
        if reads == "next":
            answers, right = _next_tokens(nets[0], parts[0], answers)
        for one, logits in zip(sums, answers, strict=True):
            one.add(logits, right, tasks[0])
        alike += float(tasks[0].alike(answers[0], answers[-1]).sum())
        tell("evaluate", sums[0].n, 0)
    n = sums[0].n
    tell("evaluate", n, n)
    if not n:
        raise SamplesError(
            f"evaluate must have samples that compression has not seen, but all {n_left_out} were used; give other data"
        )
    quality = [one.quality(known is not None or reads == "next") for one in sums]
    other, same = (None, None) if len(quality) == 1 else (quality[1], proportion(round(alike), n))
    return Evaluation(
        n, n_left_out, n_skipped, quality[0], other, same, tuple(notes.items()), tasks[0].each, tasks[0].name
    )


def _assigned(
    net: nn.Module, samples: Samples, opened: OpenedModel, task: Task | str | None, where: torch.device
) -> Task:
    chosen = cast(Task, method_of("task", task)) if isinstance(task, str) else task
    return assign_task(net, samples.first(2).trimmed(slice(None), where), chosen, opened.preprocessing)


def _next_tokens(net: nn.Module, samples: Samples, answers: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The predictions for tokens that another one follows, and those tokens."""
    following = next_token_targets(net, samples.inputs)
    return [logits[following >= 0] for logits in answers], following[following >= 0]


def _check_labels(tasks: Sequence[Task], labels: object) -> None:
    """Both models must predict the same; class indices are labels of classes alone."""
    first, last = tasks[0], tasks[-1]
    if type(first) is not type(last) or len(first.widths) != len(last.widths):
        raise UnsupportedError(
            f"two models must predict the same to be compared, but the tasks are {first.name} and {last.name}"
        )
    if labels is not None and not isinstance(first, Classification):
        raise UnsupportedError(
            f"labels must be one class per sample, but the task is {first.name}; leave them out, and give the outputs "
            "and true values to its metrics()"
        )


def _alike(opened: list[OpenedModel]) -> list[OpenedModel]:
    """The models, all of which read as many tokens of a text as the first where they have its tokenizer."""
    first = opened[0].preprocessing

    def shared(one: OpenedModel) -> OpenedModel:
        how = one.preprocessing
        if not (isinstance(first, Tokenization) and isinstance(how, Tokenization)):
            return one
        same = dataclasses.replace(how, max_length=first.max_length) if first.max_length <= how.limit else how
        return dataclasses.replace(one, preprocessing=first) if same == first else one

    return [shared(one) for one in opened]


def _task(opened: Sequence[OpenedModel], labels: object) -> str:
    """What the models answer; those that answer each token must read the same tokens."""
    hows = [one.preprocessing for one in opened]
    tasks = [how.task if isinstance(how, Tokenization) else "sequence" for how in hows]
    if tasks[0] != "sequence" and labels is not None:
        raise UnsupportedError(
            f"labels must be one class per sample, but {type(opened[0].module).__name__} answers each token; "
            "leave them out"
        )
    if set(tasks) != {"sequence"} and any(how != hows[0] for how in hows):
        raise UnsupportedError(
            "two models that answer each token must read the same tokens, but their tokenizers or lengths differ"
        )
    return tasks[0]


def _class_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the model's classes in the order of its outputs, where its config has some of its own."""
    names = getattr(getattr(module, "config", None), "id2label", None) or {}
    named = isinstance(names, dict) and not all(str(name).startswith("LABEL_") for name in names.values())
    return tuple(str(names[index]) for index in sorted(names)) if named else ()


def _labels(labels: str | Path | Sequence[int], data: Any, class_names: Sequence[str]) -> Labels:
    if isinstance(labels, str | Path):
        return open_labels(labels, data, class_names)
    return Labels({str(i): int(value) for i, value in enumerate(labels)}, "labels")


def _checked(labels: Tensor, answers: Sequence[Tensor], source: str) -> Tensor:
    n_classes = min(logits.shape[-1] for logits in answers)
    if int(labels.max()) >= n_classes:
        raise SamplesError(
            f"{source} must hold class indices below {n_classes}, the number of the model's outputs, but holds "
            f"{int(labels.max())}; number the classes in the order of the model's outputs"
        )
    return labels


def _answers(net: nn.Module, samples: Samples, batch_size: int) -> Tensor:
    logits = predictions_of(net, samples, batch_size)
    if has_nan(logits):
        raise ModelError(f"{type(net).__name__} must predict finite values for each sample, but got NaN or infinity")
    return logits


def _chunks(data: Any, opened: Sequence[OpenedModel], chunk: int) -> Iterator[tuple[Samples, ...]]:
    """The same samples as each model wants them: read once when all want the same."""
    wants = [one.preprocessing for one in opened]
    first = next((one for one in wants if one is not None), None)
    wants = [one or first for one in wants]
    if all(one == wants[0] for one in wants):
        yield from ((samples,) * len(wants) for samples in stream_samples(data, wants[0], chunk=chunk))
        return
    for together in zip(*(stream_samples(data, one, chunk=chunk) for one in wants), strict=True):
        if len({samples.ids for samples in together}) != 1:
            raise SamplesError(
                "both models must be able to use the same samples, but one skips some that the other takes; "
                "take images out that are too small for either"
            )
        yield together
