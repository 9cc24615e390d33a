"""Load artifacts: a readable plan and safetensors, replayed on the stock model; nothing is unpickled.

A folder is an artifact when it holds ``plan.json``, which is written last. Loading runs no code that the folder names:
only models of timm, torchvision, Hugging Face and this package are rebuilt from their id; any other model is passed in.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ttmpd.artifact import format_1
from ttmpd.artifact.run_report import Kind
from ttmpd.artifact.write import FORMAT, PLAN, UNFINISHED, WEIGHTS, sha256
from ttmpd.data.preprocessing import Preparation, preparation_from
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import CheckpointError, TTMPDError, UnknownMethodError
from ttmpd.method import loaded_class
from ttmpd.models.admission import admitted
from ttmpd.models.config import preprocessing_of
from ttmpd.models.open import is_rebuildable, open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import carry_task, mask_padding
from ttmpd.records import UNCHANGED, Folded, Lossless, Removal
from ttmpd.surgery.cut import check_units, replay
from ttmpd.surgery.exits.model import restore_exits
from ttmpd.surgery.exits.spec import Exits
from ttmpd.tasks.base import Task

Source = nn.Module | str | Path | OpenedModel


_KEYS = {
    "format", "ttmpd", "model", "preprocessing", "class_names", "input_shape", "plan", "methods", "settings",
    "sample_ids", "weights", "early_exit", "lossless", "kind", "task", "runtime", "machine", "folded",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Artifact:
    """What ``plan.json`` says, checked.

    Args:
        folder: where it lies.
        model_id: id of the stock model; "" for a module that was passed in.
        model_class: class name of the stock model.
        removals: in the order in which they were made.
        preprocessing: of the model, when known.
        class_names: when known.
        input_shape: shape of one input, when known.
        sample_ids: content hashes of the samples that were used.
        batch_size: on which latency was measured.
        sha256: of the weights.
        exits: where they stand, and their threshold; None for a model without exits.
        lossless: what else was done to the model.
        kind: which command made it.
        folded: what became of its replacements; None in format 1, which does not say.
        task: what the model predicts; None where the artifact does not say.
    """

    folder: Path
    model_id: str
    model_class: str
    removals: tuple[Removal, ...]
    preprocessing: Preparation | None
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    sample_ids: tuple[str, ...]
    batch_size: int
    sha256: str
    exits: tuple[Exits, float] | None = None
    lossless: Lossless = UNCHANGED
    kind: Kind = "compressed"
    folded: Folded | None = None
    task: Task | None = None

    @property
    def rebuildable(self) -> bool:
        """Whether the stock model comes from its id; decided here, not by what the file claims."""
        return is_rebuildable(self.model_id)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compressed model of an artifact: an ordinary module in eval mode.

    Args:
        folder: what ``compress`` wrote.
        model: the original network, when it came from your own code; it is not changed.

    Raises:
        CheckpointError: the folder is broken, foreign, newer, or belongs to another model; the message says which.

    Example:
        >>> import torch
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> net = load("fast/", model=tiny_model())
        >>> net(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 4])
    """
    artifact = read_artifact(folder)
    return _restored(artifact, stock_model(artifact) if model is None else admitted(model))[0]


def open_artifact(folder: str | Path, source: str | None = None) -> OpenedModel:
    """The compressed model with its preprocessing and class names.

    Args:
        folder: what ``compress`` wrote.
        source: id of the original model, needed when it came from your own code.

    Raises:
        CheckpointError: as :func:`load`.
    """
    artifact = read_artifact(folder)
    module, folded = _restored(artifact, stock_model(artifact, source))
    return OpenedModel(
        module,
        artifact.model_id,
        artifact.rebuildable,
        artifact.preprocessing or preprocessing_of(module),
        artifact.class_names,
        artifact.removals,
        artifact.sample_ids,
        artifact.lossless,
        folded,
    )


def is_artifact(place: str | Path | nn.Module) -> bool:
    """Whether a place is a folder, and so can only be meant as an artifact."""
    return not isinstance(place, nn.Module) and Path(place).expanduser().is_dir()


def read_artifact(folder: str | Path) -> Artifact:
    """What the folder's ``plan.json`` says.

    Raises:
        CheckpointError: it is missing, broken, foreign or newer.
    """
    folder = Path(folder).expanduser()
    data = _read_plan(folder)
    _check_format(folder, data)
    try:
        data = format_1.upgraded(data) if data["format"] == 1 else data
        weights = data["weights"]
        if weights["file"] != WEIGHTS:
            raise CheckpointError(f"weights of {str(folder)!r} must lie in {WEIGHTS}, but got {weights['file']!r}")
        preprocessing = data["preprocessing"]
        return Artifact(
            folder,
            str(data["model"]["id"]),
            str(data["model"]["class"]),
            tuple(_removal(row) for row in data["plan"]["removals"]),
            preparation_from(preprocessing) if preprocessing else None,
            tuple(map(str, data["class_names"])),
            tuple(map(int, data["input_shape"] or ())),
            tuple(map(str, data["sample_ids"])),
            int(data["settings"].get("batch_size", 64)),
            str(weights["sha256"]),
            _exits(data.get("early_exit")),
            Lossless.from_dict(data.get("lossless", {})),
            _kind(data),
            _folded(data),
            _task(data.get("task")),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, TTMPDError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{PLAN} of {str(folder)!r} must say what was done, but is broken: {cause}; copy or make it again"
        ) from error


def _read_plan(folder: Path) -> Any:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"an artifact must be a folder, but {str(folder)!r} {found}; check the path")
    if not (folder / PLAN).is_file():
        if (folder / ".work").is_dir() or (folder / UNFINISHED).exists():
            raise CheckpointError(
                f"an artifact must hold {PLAN}, but the run that was to write {str(folder)!r} was interrupted; "
                "go on with the same command and --resume"
            )
        raise CheckpointError(
            f"an artifact must hold {PLAN}, but {str(folder)!r} does not: it was not written by ttmpd"
            + (f"; to open a Hugging Face model write hf:{folder}" if (folder / "config.json").is_file() else "")
        )
    try:
        return json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{PLAN} of {str(folder)!r} must be whole JSON, but is cut off or broken ({error}); copy or make it again"
        ) from error


def _check_format(folder: Path, data: Any) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"{PLAN} of {str(folder)!r} must state its format, but does not: ttmpd did not write it")
    if found > FORMAT:
        raise CheckpointError(
            f"the format of {str(folder)!r} must be at most {FORMAT}, but is {found}: it was written by a newer ttmpd "
            f"({data.get('ttmpd', 'unknown')}); pip install --upgrade ttmpd"
        )
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise CheckpointError(f"{PLAN} of {str(folder)!r} must hold known keys only, but has {', '.join(unknown)}")


def _removal(row: Mapping[str, Any]) -> Removal:
    _check_kind(row.get("kind"))
    return Removal.from_dict(row)


def _check_kind(kind: Any) -> None:
    """Refuse a kind of unit that is not there; what only the file names is never imported."""
    try:
        loaded_class("units", str(kind))
    except UnknownMethodError as error:
        raise CheckpointError(f"the kind of a removal must be one of this installation, but: {error}") from error


def _kind(data: Mapping[str, Any]) -> Kind:
    """Which command made the artifact."""
    if data["kind"] not in get_args(Kind):
        raise CheckpointError(f"kind must be one of {', '.join(get_args(Kind))}, but got {data['kind']!r}")
    return cast(Kind, data["kind"])


def _folded(data: Mapping[str, Any]) -> Folded | None:
    if data["format"] == 1:
        return None
    return Folded(*(tuple(map(str, data["folded"][name])) for name in ("replacements", "biases")))


def _task(data: Any) -> Task | None:
    """What the model predicts; what only the file names is never imported."""
    if data is None:
        return None
    settings = {key: value for key, value in data.items() if key not in ("name", "same")}
    return cast(Task, loaded_class("tasks", str(data["name"]))().with_settings(**settings))


def _exits(data: Any) -> tuple[Exits, float] | None:
    return None if data is None else (Exits.from_dict(data), float(data["threshold"]))


def stock_model(artifact: Artifact, source: str | None = None) -> nn.Module:
    """The original network with random weights, or as the user's own factory makes it.

    Raises:
        CheckpointError: it came from the user's own code and no source is given, or it cannot be built any more.
    """
    if source is not None:
        return open_model(source, pretrained=False).module
    if not artifact.rebuildable:
        origin = f"your own factory {artifact.model_id!r}" if artifact.model_id else "a module that was passed in"
        raise CheckpointError(
            f"the model of {str(artifact.folder)!r} came from {origin}, which ttmpd does not run by itself; pass the "
            "original network again: ttmpd.load(dir, model=net), or --source FILE.py:factory"
        )
    try:
        with torch.random.fork_rng():
            return open_model(artifact.model_id, pretrained=False).module
    except TTMPDError as error:
        raise CheckpointError(
            f"the model of {str(artifact.folder)!r} must be possible to build from {artifact.model_id!r}, but: {error}"
        ) from error


def _restored(artifact: Artifact, stock: nn.Module) -> tuple[nn.Module, Folded]:
    """The student on a copy of ``stock``, and what became of its replacements."""
    found = type(stock).__name__
    if found != artifact.model_class:
        raise CheckpointError(
            f"the model of {str(artifact.folder)!r} must be a {artifact.model_class}, but got a {found}; pass the "
            "network that was compressed"
        )
    state = _weights(artifact)
    backbone = state if artifact.exits is None else _below(state, "backbone")
    try:
        check_units(stock, [removal.unit for removal in artifact.removals])
        folded = artifact.folded or format_1.folded_in(stock, artifact.removals, backbone)
        model = replay(stock, artifact.removals, backbone, artifact.lossless, folded)
    except (TTMPDError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights of {str(artifact.folder)!r} must fit the given {found}, but it has other layers or shapes: "
            f"{detail}; give the network that it was made from"
        ) from error
    is_text = isinstance(artifact.preprocessing, Tokenization)  # may read less than the stock model
    if artifact.preprocessing is not None and (is_text or preprocessing_of(model) is None):
        model.pretrained_cfg = artifact.preprocessing.to_dict()  # type: ignore[assignment]
    if isinstance(artifact.preprocessing, Tokenization):
        mask_padding(model, artifact.preprocessing)
    if artifact.exits is not None:
        model = _with_exits(artifact, artifact.exits, model, state)
    if artifact.task is not None:
        carry_task(model, _of_one_tensor(artifact.task) if artifact.exits is not None else artifact.task)
    return model, folded


def _of_one_tensor(task: Task) -> Task:
    """The task of a model with exits, which answers with one tensor, whatever the original answered with."""
    return task.with_settings(parts=(), widths=())


def _with_exits(
    artifact: Artifact, exits: tuple[Exits, float], model: nn.Module, state: Mapping[str, Tensor]
) -> nn.Module:
    try:
        return restore_exits(model, *exits, _below(state, "heads"))
    except (TTMPDError, RuntimeError) as error:
        raise CheckpointError(
            f"the exits of {str(artifact.folder)!r} must fit the model, but: {' '.join(str(error).split())[:300]}; "
            "copy the artifact again"
        ) from error


def _below(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one part of a model, named as the part names them."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _weights(artifact: Artifact) -> dict[str, Tensor]:
    path = artifact.folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"an artifact must hold {WEIGHTS}, but {str(artifact.folder)!r} does not; copy it again")
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{WEIGHTS} of {str(artifact.folder)!r} must be whole, but is cut off or broken ({error}); copy it again"
        ) from error
    if sha256(path) != artifact.sha256:
        raise CheckpointError(
            f"{WEIGHTS} of {str(artifact.folder)!r} must be the file that {PLAN} belongs to, but its SHA-256 differs; "
            "copy both from one run"
        )
    return state


def open_any(place: Source, source: str | None = None) -> OpenedModel:
    """A model from a module, an id or an artifact folder.

    Args:
        place: a folder is an artifact.
        source: see :func:`ttmpd.artifact.read.open_artifact`.
    """
    if isinstance(place, OpenedModel):
        return place
    if not isinstance(place, nn.Module) and is_artifact(place):
        return open_artifact(place, source)
    return open_model(str(place) if isinstance(place, Path) else place)
