"""The contract of a task: what a model predicts, and what "as good as the teacher" means for it."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.method import Method, method_class, names
from ttmpd.tasks._measures import entropy, mutual_information, soft_label_loss

NAMED_OUTPUTS = ("logits", "prediction_logits", "out", "scores")
"""Names under which models give their predictions in a dict or a dataclass, the likeliest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Clues:
    """What a task may look at to tell whether a model is one of its own.

    Args:
        module: the model.
        raw: its output for ``inputs``, as it returned it.
        inputs: (B, ...) a few samples.
        text: "sequence", "token" or "next" for a model that takes text, "" for others.
        padding: the token id that stands behind a text.
    """

    module: nn.Module
    raw: Any
    inputs: Tensor
    text: str = ""
    padding: int = 0

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration, or None."""
        return getattr(self.module, "config", None)

    @property
    def problem_type(self) -> str:
        """What the configuration says of the labels; "" where it says nothing."""
        return str(getattr(self.config, "problem_type", None) or "")


class Task(Method, abc.ABC):
    """What a model predicts: how its output is read, compared, and judged.

    Every comparison is made on one matrix of (rows, values). Where a model predicts several tensors, they lie beside
    each other in it: ``parts`` names them, ``widths`` says how many columns each has.
    """

    each: ClassVar[Literal["sample", "token", "pixel"]] = "sample"
    """What a row belongs to."""
    same: ClassVar[str] = ""
    """What counts as the same prediction, in words; "" where agreement has no meaning."""
    reason_not_to_adapt: ClassVar[str] = ""
    """Why no adapter that learns from its own predictions can be used; "" where one can."""
    parts: tuple[str, ...] = ()
    """Names of the predicted tensors in the model's output (keys, or positions in a tuple); empty for the usual one."""
    widths: tuple[int, ...] = ()
    """Columns of each part; found from the model."""

    @classmethod
    @abc.abstractmethod
    def claim(cls, clues: Clues) -> tuple[Literal["config", "shape"], Self] | None:
        """The task for this model, and whether its configuration or only the shape of its output says so; or None."""

    @abc.abstractmethod
    def matrix(self, value: Tensor, inputs: Tensor) -> Tensor:
        """(rows, values) of one predicted tensor.

        Raises:
            ModelError: the tensor has a shape that this task cannot read.
        """

    @abc.abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """A scalar that is least where the student predicts what the teacher does, with no gradient there."""

    @abc.abstractmethod
    def alike(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(rows,) from 0 to 1: how far each prediction counts as the same, as ``same`` says."""

    @abc.abstractmethod
    def confidence(self, outputs: Tensor) -> Tensor | None:
        """(rows,) from 0 to 1: how sure each prediction is; None where that has no meaning."""

    @abc.abstractmethod
    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """How right predictions are, by the names of the measures, for labels of this task."""

    def outputs(self, raw: Any, inputs: Tensor) -> Tensor:
        """(rows, values) all predicted tensors of a model's output, beside each other.

        Args:
            raw: the output as the model returned it: a tensor, tuple, dict or dataclass.
            inputs: (B, ...) the batch that it is for.

        Raises:
            ModelError: the output has no such part, or it is not clear which tensor is predicted.
        """
        return torch.cat([self.matrix(value, inputs) for value in predicted_tensors(raw, self.parts)], -1)

    def resolved(self, raw: Any, inputs: Tensor) -> Self:
        """The same task with the names and widths of its parts read from a model's output."""
        parts = self.parts or default_parts(raw)
        values = predicted_tensors(raw, parts)
        widths = tuple(self.matrix(value, inputs).shape[-1] for value in values)
        return self.with_settings(parts=parts, widths=widths)

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """The columns of each part."""
        return tuple(torch.split(outputs, list(self.widths), -1)) if len(self.widths) > 1 else (outputs,)

    def predicted_tokens(self, inputs: Tensor) -> Tensor | None:
        """(B, S) the tokens whose predictions are rows; None where a row is not a token."""
        return None

    def row_counts(self, inputs: Tensor) -> Tensor:
        """(N,) rows of each sample."""
        tokens = self.predicted_tokens(inputs)
        return torch.ones(len(inputs), dtype=torch.long) if tokens is None else tokens.sum(1).cpu()

    def agreement(self, student: Tensor, teacher: Tensor) -> float:
        """The share of predictions that are the same, see ``same``; 1 where there are none."""
        return float(self.alike(student, teacher).double().mean()) if len(teacher) else 1.0

    def held_out_loss(self, student: Tensor, teacher: Tensor) -> float:
        """The loss by which training is judged on samples that it has not seen."""
        return float(self.loss(student, teacher).detach())

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """(rows,) what an adapter makes smaller: the entropy of a prediction, in nats.

        Raises:
            UnsupportedError: the task has no such measure.
        """
        raise UnsupportedError(f"{self.name} has no entropy: {self.reason_not_to_adapt}; use adapt none")

    def information(self, outputs: Tensor) -> Tensor:
        """How sure and varied predictions are: the criterion by which adaptation is chosen, higher is better.

        Raises:
            UnsupportedError: the task has no such measure.
        """
        raise UnsupportedError(f"{self.name} has no entropy: {self.reason_not_to_adapt}; use adapt none")


class OneOf(Task):
    """One of several classes for each row: what all tasks of classes share."""

    same: ClassVar[str] = "the same class"

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """The soft-label loss, summed over the parts."""
        pairs = zip(self.split(student), self.split(teacher), strict=True)
        return torch.stack([soft_label_loss(ours, theirs, temperature) for ours, theirs in pairs]).sum()

    def held_out_loss(self, student: Tensor, teacher: Tensor) -> float:
        """The loss under the one temperature of the student that suits best: what it knows, however sure it is.

        A closed-form repair draws logits together, training at a high temperature spreads them; neither makes the
        student know less. Factors from a quarter to four are tried, half an octave apart.
        """
        losses = [self.loss(student * 2 ** (power / 2), teacher) for power in range(-4, 5)]
        return float(torch.stack(losses).amin().detach())

    def alike(self, student: Tensor, teacher: Tensor) -> Tensor:
        """1 where every part has the same class."""
        pairs = zip(self.split(student), self.split(teacher), strict=True)
        return torch.stack([ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in pairs]).all(0).float()

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """The probability of the likeliest class; of several parts the least."""
        return torch.stack([part.softmax(-1).amax(-1) for part in self.split(outputs)]).amin(0)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy and mean cross entropy; ``labels`` is (rows,) classes of the first part."""
        first = self.split(outputs)[0]
        right = (first.argmax(-1) == labels).double().mean()
        return {"accuracy": float(right), "cross_entropy": float(nn.functional.cross_entropy(first.double(), labels))}

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """Entropy, summed over the parts."""
        return torch.stack([entropy(part) for part in self.split(outputs)]).sum(0)

    def information(self, outputs: Tensor) -> Tensor:
        """Mutual information, summed over the parts."""
        return torch.stack([mutual_information(part) for part in self.split(outputs)]).sum()


def detect_task(clues: Clues) -> Task:
    """The task of a model, from its configuration, else from the shape of its output.

    Raises:
        ModelError: no task knows such an output, or several do.
    """
    classes = [cast(type[Task], method_class("tasks", name)) for name in names("tasks")]
    claims = [claim for claim in (each.claim(clues) for each in classes) if claim is not None]
    for source in ("config", "shape"):
        tasks = [task for by, task in claims if by == source]
        if len(tasks) == 1:
            return tasks[0].resolved(clues.raw, clues.inputs)
        if tasks:
            raise ModelError(
                f"one task must fit {type(clues.module).__name__}, but {', '.join(t.name for t in tasks)} do; name it "
                "with task="
            )
    default_parts(clues.raw)  # says what is unclear where several tensors might be meant
    shapes = [tuple(value.shape) for value in predicted_tensors(clues.raw, ())]
    raise ModelError(
        f"{type(clues.module).__name__} must predict one row per sample, but its output has the shape "
        f"{', '.join(map(str, shapes))}; {_next_step(shapes[0])}"
    )


def _next_step(shape: Sequence[int]) -> str:
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return "wrap the model so that it answers with .flatten(1)"
    if len(shape) == 4:
        return "where it gives a class for each pixel, say task=segmentation (--task segmentation)"
    return f"name its task: one of {', '.join(names('tasks'))} (task=, or --task)"


def named_values(raw: Any) -> dict[str, Any]:
    """The entries of a tuple, dict or dataclass by name; of a tensor "" alone."""
    if isinstance(raw, Tensor):
        return {"": raw}
    if isinstance(raw, Mapping):
        return {str(key): value for key, value in raw.items()}
    if isinstance(raw, Sequence) and not isinstance(raw, str | bytes):
        return {str(number): value for number, value in enumerate(raw)}
    values = getattr(raw, "__dict__", None) or {name: getattr(raw, name) for name in getattr(raw, "__slots__", ())}
    return dict(values)


def default_parts(raw: Any) -> tuple[str, ...]:
    """Names of what is predicted where nobody says so.

    The only tensor; else the first of ``NAMED_OUTPUTS``; of a tuple all tensors, if each is (B, n), or the one that is.

    Raises:
        ModelError: several tensors are equally likely.
    """
    values = {name: value for name, value in named_values(raw).items() if isinstance(value, Tensor)}
    if not values:
        raise ModelError(f"a model must answer with a tensor, but answered with {type(raw).__name__} without one")
    if len(values) == 1:
        return tuple(values)
    usual = next((name for name in NAMED_OUTPUTS if name in values), None)
    if usual is not None:
        return (usual,)
    flat = tuple(name for name, value in values.items() if value.dim() == 2)
    if isinstance(raw, Sequence) and flat and (len(flat) == len(values) or len(flat) == 1):
        return flat
    keys = ", ".join(values)
    raise ModelError(
        f"it must be clear which tensor is predicted, but the output has {keys}; name them, as in "
        f"task=Classification(parts=({', '.join(map(repr, values))})) or --task classification:{','.join(values)}, "
        "or wrap the model so that it answers with one tensor"
    )


def predicted_tensors(raw: Any, parts: Sequence[str]) -> list[Tensor]:
    """The tensors of that name in a model's output, in this order; the usual ones where no name is given.

    Raises:
        ModelError: there is no tensor of that name.
    """
    values, tensors = named_values(raw), []
    for name in parts or default_parts(raw):
        if not isinstance(values.get(name), Tensor):
            there = ", ".join(name or "a single tensor" for name, value in values.items() if isinstance(value, Tensor))
            raise ModelError(f"a model's output must have the part {name!r}, but has {there or 'no tensor'}")
        tensors.append(values[name])
    return tensors


def all_rows(raw: Any, least: int) -> bool:
    """Whether every predicted tensor is (B, n) with at least so many columns; False where it is unclear."""
    try:
        tensors = predicted_tensors(raw, ())
    except ModelError:
        return False
    return all(value.dim() == 2 and value.shape[1] >= least for value in tensors)


def as_rows(value: Tensor, task: str) -> Tensor:
    """The tensor itself, if it is (B, n), or (B,) as one column.

    Raises:
        ModelError: it has another shape.
    """
    if value.dim() == 1:
        return value[:, None]
    if value.dim() != 2:
        raise ModelError(
            f"a model for {task} must predict one row per sample, but its output has the shape {tuple(value.shape)}; "
            f"{_next_step(value.shape)}"
        )
    return value
