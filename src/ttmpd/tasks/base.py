"""The contract of a task: what a model predicts, and what "as good as the teacher" means for it."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.method import Method, method_class, names
from ttmpd.tasks._measures import class_record, entropy, mutual_information, plain_numbers, soft_label_loss
from ttmpd.tasks._outputs import NAMED_OUTPUTS as NAMED_OUTPUTS
from ttmpd.tasks._outputs import all_rows as all_rows
from ttmpd.tasks._outputs import as_rows as as_rows
from ttmpd.tasks._outputs import default_parts, next_step
from ttmpd.tasks._outputs import named_values as named_values
from ttmpd.tasks._outputs import predicted_tensors as predicted_tensors


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
    class_labels: ClassVar[bool] = False
    """True where the label of a sample is one class index."""
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

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of predictions against true labels, for training on them.

        Args:
            outputs: (rows, values) of a model.
            labels: one per row, as :meth:`metrics` takes them.

        Raises:
            UnsupportedError: the task has no labels that a model could be trained on.
        """
        raise UnsupportedError(f"a model must have labels to be trained on them, but the task {self.name} has none")

    def check_labels(self, labels: Tensor, n_samples: int) -> None:
        """Refuse labels on which a model of this task cannot be trained.

        Args:
            labels: one row per sample.
            n_samples: number of samples that they are of.

        Raises:
            UnsupportedError: the task has no such labels.
            InvalidValueError: they have another shape, or values that cannot be.
        """
        raise UnsupportedError(
            f"a model must have labels to be trained on them, but the task {self.name} has none; compress a larger one "
            "with ttmpd.compress, which needs no labels"
        )

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """(rows,) 1 where a prediction equals its label, else 0; None where predictions are only near or far."""
        return None

    def targets(self, inputs: Tensor) -> Tensor | None:
        """(rows,) labels that the inputs themselves hold, -1 where there is none; None for a task without such."""
        return None

    def signals(self, outputs: Tensor) -> dict[str, Tensor]:
        """Numbers per row, by name, whose distributions move when the data do: (rows,) each."""
        return {"size": torch.linalg.vector_norm(outputs.float(), dim=-1)}

    def records(
        self, raw: Any, inputs: Tensor, *, class_names: Sequence[str] = (), top: int = 5, scores: bool = True
    ) -> list[dict[str, Any]]:
        """The predictions for each sample as plain data, for JSON; values that are not finite become None.

        Args:
            raw: a model's output.
            inputs: (B, ...) the batch that it is for.
            class_names: name of each class, when known.
            top: number of likeliest classes that are listed.
            scores: whether all scores are listed, too.
        """
        outputs = self.outputs(raw, inputs).detach().float().cpu()
        samples = torch.split(outputs, self.row_counts(inputs).tolist())
        return [self.record(rows, class_names=class_names, top=top, scores=scores) for rows in samples]

    def record(self, rows: Tensor, *, class_names: Sequence[str], top: int, scores: bool) -> dict[str, Any]:
        """The predictions for one sample, (rows, values), as plain data; arguments as :meth:`records`."""
        return {"values": plain_numbers(rows[0])}

    def first_part(self, outputs: Tensor) -> tuple[Self, Tensor]:
        """The task of the first part alone, and its columns: what labels are of."""
        return self.with_settings(parts=self.parts[:1], widths=self.widths[:1]), self.split(outputs)[0]

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


def check_one_class(task: Task, user: str, step: str) -> None:
    """Refuse a task other than one row of class scores per sample.

    Args:
        task: of the model.
        user: what needs the class scores, for the message.
        step: what to do instead.

    Raises:
        UnsupportedError: it is another one.
    """
    if not task.class_labels or len(task.widths) > 1:
        parts = " of several parts" if len(task.widths) > 1 else ""
        raise UnsupportedError(
            f"{user} must have one row of class scores per sample, but the task is {task.name}{parts}; {step}"
        )


class OneOf(Task):
    """One of several classes for each row: what all tasks of classes share."""

    same: ClassVar[str] = "the same class"

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """The soft-label loss, summed over the parts."""
        pairs = zip(self.split(student), self.split(teacher), strict=True)
        return torch.stack([soft_label_loss(logits, goal, temperature) for logits, goal in pairs]).sum()

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
        return torch.stack([logits.argmax(-1) == goal.argmax(-1) for logits, goal in pairs]).all(0).float()

    def confidence(self, outputs: Tensor) -> Tensor | None:
        """The probability of the likeliest class; of several parts the least."""
        return torch.stack([part.softmax(-1).amax(-1) for part in self.split(outputs)]).amin(0)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy and mean cross entropy; ``labels`` is (rows,) classes of the first part."""
        first = self.split(outputs)[0]
        accuracy = float(self.right(outputs, labels).mean())
        return {"accuracy": accuracy, "cross_entropy": float(nn.functional.cross_entropy(first.double(), labels))}

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """1 where the likeliest class of the first part is the label."""
        return (self.split(outputs)[0].argmax(-1) == labels).double()

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the first part."""
        return nn.functional.cross_entropy(self.split(outputs)[0], labels)

    def signals(self, outputs: Tensor) -> dict[str, Tensor]:
        """Entropy, and the log sum exp of the scores, which tells their level."""
        return {"entropy": self.uncertainty(outputs), "log sum exp": outputs.float().logsumexp(-1)}

    def record(self, rows: Tensor, *, class_names: Sequence[str], top: int, scores: bool) -> dict[str, Any]:
        """The likeliest class with its probability, and the next ones; of several parts each; of tokens the classes."""
        parts = self.split(rows)
        if self.each != "sample":
            return {"classes": parts[0].argmax(-1).tolist()}
        records = [class_record(part[0], class_names if n == 0 else (), top, scores) for n, part in enumerate(parts)]
        return records[0] if len(records) == 1 else {"parts": dict(zip(self.parts, records, strict=True))}

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
        f"{', '.join(map(str, shapes))}; {next_step(shapes[0])}"
    )
