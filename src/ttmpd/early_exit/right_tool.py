"""The Right Tool for the Job: linear exits behind some blocks, each with a temperature, one threshold for all."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ttmpd.data.samples import Samples
from ttmpd.data.views import fixed_view
from ttmpd.early_exit._heads import Features, TrainedHead, exit_targets, train_heads
from ttmpd.early_exit.base import EarlyExit, Equipped
from ttmpd.errors import InvalidValueError
from ttmpd.method import check_fields, check_range
from ttmpd.models.modules import clone
from ttmpd.models.run import evaluating, predict
from ttmpd.progress import track
from ttmpd.quality.calibration import calibration_error, fit_temperature
from ttmpd.surgery.exits.model import EarlyExitModel, ExitHead
from ttmpd.surgery.exits.places import ExitLocation, exits_at, find_places, proven, spread
from ttmpd.surgery.exits.spec import NEVER


class RightTool(EarlyExit):
    """Linear classifiers behind blocks of the frozen model learn its own predictions; each gets its own temperature.

    Example:
        >>> from ttmpd.testing.tiny_models import tiny_model, tiny_samples
        >>> equipped = RightTool(views=1).equip(tiny_model(), tiny_samples(40))
        >>> [place.path for place in equipped.model.spec.exits]
        ['blocks.0', 'blocks.1']
    """

    source: ClassVar[str] = (
        "Schwartz et al., ACL 2020 (arXiv 2004.07453); the model stays frozen and is learned from without labels, all "
        "tokens are read (there: the first one through a shared layer), images by quarters; the last block is read "
        "alone unless `mix`, whose weights the released code does not train; temperatures by a 1-D convex solve, on "
        "answers out of fold"
    )
    needs: ClassVar[tuple[str, ...]] = ("training",)
    n_exits: int = 5
    """Number of exits, evenly over the depth; fewer where there are fewer blocks."""
    at: tuple[int, ...] = ()
    """Numbers of the blocks that carry an exit, counted from 1; empty for `n_exits` of them."""
    mix: bool = False
    """Read a learned mix (of unit length) of all equally wide blocks up to the exit, instead of the last one.

    All these blocks have to be read then; on a frozen model the last one holds most of that information.
    """
    calibrate: bool = True
    """Give each exit a temperature; without it confidences of different exits cannot be compared."""
    views: int = 4
    """Fixed views of each image that heads learn from, crops and shifts; samples that are no images have one."""
    smallest_crop: float = 0.25
    """The smallest share of the area that a crop keeps."""
    decays: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)
    """Weight decays of the heads to choose from, for standardised features."""
    steps: int = 60
    """Steps of L-BFGS for one fit."""
    label_weight: float = 0.5
    """Weight of the labels, where there are some, in what the heads learn; the rest are the model's own predictions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", _numbers(self.at))
        check_fields(self, n_exits=1, views=1, smallest_crop=(0.01, 1.0), steps=1, label_weight=(0.0, 1.0))
        for decay in self.decays:
            check_range("right_tool.decays", decay, 0.0)
        if not self.decays:
            raise InvalidValueError("right_tool.decays must hold a weight decay, but is empty")

    def equip(
        self, model: nn.Module, samples: Samples, *, labels: Tensor | None = None, batch_size: int = 64, seed: int = 0
    ) -> Equipped:
        """A copy of the model with trained and calibrated exits; see :class:`EarlyExit`.

        Cost: a pass of the model per view, then convex fits on what was read.
        """
        device = next(model.parameters()).device
        first_samples = samples.trimmed(slice(0, 5), device)
        places, fixed = find_places(model, first_samples)
        with evaluating(model):
            n_classes = predict(model, first_samples).shape[-1]
        if labels is not None:
            _check_labels(labels, len(samples), n_classes)
        spec = exits_at(places, self._chosen(places), n_classes, mix=self.mix, fixed=fixed, padding=samples.padding)
        equipped = EarlyExitModel(clone(model).eval(), proven(clone(model), spec, first_samples), NEVER).requires_grad_(
            False
        )
        features = self._read(equipped, samples, batch_size, seed)
        logits = features.logits[0]
        classes = logits.argmax(-1) if labels is None else labels.to(logits.device)
        targets = exit_targets(features.logits, None if labels is None else classes, self.label_weight)
        heads = train_heads(features, targets, self.decays, self.steps, seed)
        temperatures = [self._temperature(head, classes) for head in heads]
        for head, trained, temperature in zip(equipped.heads, heads, temperatures, strict=True):
            assert isinstance(head, ExitHead)
            _put(head, trained, temperature)
        answers = torch.stack([head.out_of_fold / t for head, t in zip(heads, temperatures, strict=True)])
        facts = tuple(
            {
                "block": number + 1,
                "decay": head.decay,
                "temperature": temperature,
                "calibration_error_before": calibration_error(head.out_of_fold, classes),
                "calibration_error": calibration_error(head.out_of_fold / temperature, classes),
                "agreement": float((head.out_of_fold.argmax(-1) == logits.argmax(-1)).float().mean()),
            }
            for number, head, temperature in zip(self._chosen(places), heads, temperatures, strict=True)
        )
        return Equipped(equipped, answers, logits, classes, facts, _note(equipped, len(places), labels is not None))

    def _chosen(self, places: tuple[ExitLocation, ...]) -> tuple[int, ...]:
        if not self.at:
            return spread(len(places), self.n_exits)
        if max(self.at) > len(places):
            raise InvalidValueError(
                f"right_tool.at must hold numbers of blocks from 1 to {len(places)}, but got {self.at}"
            )
        return tuple(number - 1 for number in sorted(set(self.at)))

    def _temperature(self, head: TrainedHead, classes: Tensor) -> float:
        return fit_temperature(head.out_of_fold, classes) if self.calibrate and len(classes) > 1 else 1.0

    def _read(self, model: EarlyExitModel, samples: Samples, batch_size: int, seed: int) -> Features:
        """The features that every exit reads, and the model's own logits, of every view of the samples."""
        n_views = self.views if samples.inputs.dim() == 4 else 1
        device = next(model.parameters()).device
        starts = range(0, len(samples), batch_size)
        read: list[list[list[Tensor]]] = [[[] for _ in model.heads] for _ in range(n_views)]
        logits: list[list[Tensor]] = [[] for _ in range(n_views)]
        passes = [(view, start) for view in range(n_views) for start in starts]
        with evaluating(model):
            for view, start in track(passes, "read", len(passes)):
                index = torch.arange(start, min(start + batch_size, len(samples)))
                batch = samples.trimmed(index, device)
                shown = fixed_view(batch, index, view, seed, len(samples), self.smallest_crop)
                exit_features, answers = model.features(shown)
                logits[view].append(answers.float())
                for columns, value in zip(read[view], exit_features, strict=True):
                    columns.append(value)
        exits = tuple(
            torch.stack([torch.cat(read[view][number]) for view in range(n_views)])
            for number in range(len(model.heads))
        )
        return Features(exits, torch.stack([torch.cat(view_logits) for view_logits in logits]))


def _numbers(values: tuple[int | str, ...]) -> tuple[int, ...]:
    """Numbers of blocks as integers: the command line gives text."""
    try:
        numbers = tuple(int(value) for value in values)
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise InvalidValueError(f"right_tool.at must hold numbers of blocks, 1 or more, but got {values!r}")
    return numbers


def _check_labels(labels: Tensor, n_samples: int, n_classes: int) -> None:
    if labels.shape != (n_samples,):
        raise InvalidValueError(f"labels must be one class per sample, ({n_samples},), but got {tuple(labels.shape)}")
    if n_samples and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise InvalidValueError(
            f"labels must be class indices below {n_classes}, the number of the model's outputs, but got "
            f"{int(labels.min())} to {int(labels.max())}; number the classes in the order of the model's outputs"
        )


def _put(head: ExitHead, trained: TrainedHead, temperature: float) -> None:
    with torch.no_grad():
        head.weight.copy_(trained.weight / temperature)
        head.bias.copy_(trained.bias / temperature)
        head.temperature.fill_(temperature)


def _note(model: EarlyExitModel, n_places: int, labelled: bool) -> str:
    learned = "the model's own answers and labels" if labelled else "the model's own answers"
    along = "" if model.spec.compact else "; batches do not shrink within this model, only whole ones end early"
    return f"{len(model.heads)} exits behind {n_places} blocks learned {learned}{along}"
