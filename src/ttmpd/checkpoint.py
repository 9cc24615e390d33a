"""Save and load artifacts: a readable plan and safetensors, replayed on the stock model; nothing is unpickled.

A folder is an artifact when it holds ``plan.json``, which is written last. Loading runs no code that the folder names:
only models of timm, torchvision, Hugging Face and this package are rebuilt from their id; any other model is passed in.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ttmpd.early_exit._model import exits_data, put_again
from ttmpd.early_exit._spec import Exits
from ttmpd.errors import CheckpointError, InvalidValueError, TTMPDError
from ttmpd.method import names
from ttmpd.models import OpenedModel, is_rebuildable, open_model
from ttmpd.preprocessing import Preparation, preparation_from, preprocessing_of
from ttmpd.records import ACTIONS, Form, Plan, Removal, Unit
from ttmpd.repair import replay
from ttmpd.stages import disk_guarded, write_json
from ttmpd.surgery import check_units
from ttmpd.text import Tokenization, mask_padding

FORMAT = 1
PLAN, WEIGHTS = "plan.json", "model.safetensors"
STOCK = "transformers"
"""Folder with the same student as its own library writes models, where that can say what is left of it."""
_FILES = (WEIGHTS, "report.json", "report.html", "README.md")
UNFINISHED = ".unfinished"
_KEYS = {
    "format", "ttmpd", "model", "preprocessing", "class_names", "input_shape", "plan", "methods", "settings",
    "sample_ids", "weights", "early_exit",
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------------- saving


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A model that was made faster, adapted or given exits, with its proof.

    Args:
        model: a plain ``nn.Module`` in eval mode, on the CPU; with exits an :class:`ttmpd.EarlyExitModel`, whose
            ``threshold`` may be changed at any time.
        plan: what was removed, and the milliseconds.
        facts: everything that was measured, as plain data: the report draws it.
        sample_ids: content hashes of the unlabelled samples that were used.
        opened: where the model came from.
        met: whether what was measured meets the target; True where none was set.
    """

    model: nn.Module
    plan: Plan
    facts: dict[str, Any]
    sample_ids: tuple[str, ...]
    opened: OpenedModel
    met: bool = True

    def save(self, folder: str | Path) -> Path:
        """Write the artifact: plan.json, model.safetensors, README.md, report.html, report.json.

        Args:
            folder: made if missing; an artifact that is there is replaced.

        Returns:
            The folder: :func:`ttmpd.load` reads it.

        Raises:
            TTMPDError: there is no room or no permission to write.
        """
        return _write(Path(folder), self)

    save_pretrained = save


def _write(folder: Path, result: Result) -> Path:
    """Write the artifact, each file whole or not at all."""
    from ttmpd.report import write_report

    check_output(folder)
    with disk_guarded(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        try:
            # Tied tensors are written once each: loading copies them into one place again.
            state = {key: value.detach().cpu().contiguous().clone() for key, value in result.model.state_dict().items()}
            save_file(state, unfinished / WEIGHTS)
            stock = _stock(result, unfinished / STOCK)
            write_report({**result.facts, "stock": stock}, unfinished)
            data = _described(result) | exits_data(result.model)
            data["weights"] = {"file": WEIGHTS, "sha256": _sha256(unfinished / WEIGHTS)}
            write_json(unfinished / PLAN, data)
            shutil.copymode(unfinished / PLAN, unfinished / WEIGHTS)  # safetensors makes it private
            (folder / UNFINISHED).touch()  # from here to the last rename the folder is no artifact
            (folder / PLAN).unlink(missing_ok=True)
            _discard(folder / STOCK)  # of another student
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == PLAN):
                _discard(folder / path.name)
                path.replace(folder / path.name)
            (folder / UNFINISHED).unlink()
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _discard(path: Path) -> None:
    """Remove a folder of an artifact that is written anew; a file is replaced in one step."""
    if path.is_dir():
        shutil.rmtree(path)


def _stock(result: Result, folder: Path) -> str:
    """Write the student as its own library does; the name of its class, "" where that cannot say what is left."""
    from ttmpd.stock import save_stock, stock_model

    opened, shape = result.opened, result.facts.get("samples", {}).get("input_shape") or ()
    fresh = stock_model(result.model, (*opened.removed, *result.plan.removals), opened.preprocessing, shape)
    if fresh is None:
        return ""
    save_stock(fresh, opened.preprocessing, folder)
    return type(fresh).__name__


def check_output(folder: Path) -> None:
    """Refuse to write among files that are not ours.

    Raises:
        InvalidValueError: the folder is a file, or holds files and is no artifact.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidValueError(f"output must be a folder, but {str(folder)!r} is a file; choose another")
    if folder.is_dir() and not (folder / PLAN).exists():
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if any((folder / name).exists() for name in _FILES) and not (folder / UNFINISHED).exists():
            raise InvalidValueError(
                f"output must be a new or empty folder, or an artifact, but {str(folder)!r} holds other files "
                f"({', '.join(others[:3])}) that would be overwritten; choose another"
            )


def _described(result: Result) -> dict[str, Any]:
    plan, opened, facts = result.plan, result.opened, result.facts
    numbers = {key: getattr(plan, key) for key in ("harm", "original_ms", "budget_ms", "predicted_ms")}
    removals = (*opened.removed, *plan.removals)
    return {
        "format": FORMAT,
        "ttmpd": str(facts.get("ttmpd", "unknown")),
        "model": {
            "id": opened.id,
            "rebuildable": is_rebuildable(opened.id),
            "class": type(opened.module).__name__,
        },
        "preprocessing": opened.preprocessing.to_dict() if opened.preprocessing else None,
        "class_names": list(opened.class_names),
        "input_shape": facts.get("samples", {}).get("input_shape"),
        "plan": {"removals": [_row(removal) for removal in removals]} | numbers,
        "methods": facts.get("methods", {}),
        "settings": facts.get("settings", {}),
        "sample_ids": list(dict.fromkeys((*opened.used_ids, *result.sample_ids))),
    }


def _row(removal: Removal) -> dict[str, Any]:
    return dataclasses.asdict(removal.unit) | {"action": removal.action, "kept": list(removal.kept)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- loading


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
    """
    artifact = read_artifact(folder)
    return _restored(artifact, stock_model(artifact) if model is None else model)


def open_artifact(folder: str | Path, source: str | None = None) -> OpenedModel:
    """The compressed model with its preprocessing and class names.

    Args:
        folder: what ``compress`` wrote.
        source: id of the original model, needed when it came from your own code.

    Raises:
        CheckpointError: as :func:`load`.
    """
    artifact = read_artifact(folder)
    module = _restored(artifact, stock_model(artifact, source))
    return OpenedModel(
        module,
        artifact.model_id,
        artifact.rebuildable,
        artifact.preprocessing or preprocessing_of(module),
        artifact.class_names,
        artifact.removals,
        artifact.sample_ids,
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
    fields = {field.name for field in dataclasses.fields(Unit)}
    row = {
        "members": 0,
        "feeders": [],
        "widths": [],
        "kept": [],
        **row,
    }
    if set(row) != fields | {"action", "kept"}:
        different = ", ".join(sorted(set(row) ^ (fields | {"action", "kept"})))
        raise CheckpointError(f"a removal must have the keys of a unit and an action, but differs in {different}")
    known = {"kind": names("units"), "action": ACTIONS, "form": get_args(Form),
             "layout": ("channels_first", "channels_last"), "activation": ("", "relu", "relu6")}  # fmt: skip
    for key, values in known.items():
        if row[key] not in values:
            raise CheckpointError(f"{key} of a removal must be one of {', '.join(values)}, but got {row[key]!r}")
    lists = {"shape": tuple(map(int, row["shape"])), "feeders": tuple(map(str, row["feeders"]))}
    lists |= {"widths": tuple(map(int, row["widths"]))}
    unit = Unit(**{key: row[key] for key in fields} | lists)
    if not unit.shape or math.prod(unit.shape) < 1 or not isinstance(unit.path, str):
        raise CheckpointError(f"a removal must name a path and a shape, but got {unit.path!r} and {unit.shape}")
    return Removal(unit, row["action"], tuple(map(int, row["kept"])))


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


def _restored(artifact: Artifact, stock: nn.Module) -> nn.Module:
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
        model = replay(stock, artifact.removals, backbone)
    except (TTMPDError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the weights of {str(artifact.folder)!r} must fit the given {found}, but it has other layers or shapes: "
            f"{detail}"
        ) from error
    is_text = isinstance(artifact.preprocessing, Tokenization)  # may read less than the stock model
    if artifact.preprocessing is not None and (is_text or preprocessing_of(model) is None):
        model.pretrained_cfg = artifact.preprocessing.to_dict()  # type: ignore[assignment]
    if isinstance(artifact.preprocessing, Tokenization):
        mask_padding(model, artifact.preprocessing)
    return model if artifact.exits is None else _with_exits(artifact, artifact.exits, model, state)


def _with_exits(
    artifact: Artifact, exits: tuple[Exits, float], model: nn.Module, state: Mapping[str, Tensor]
) -> nn.Module:
    try:
        return put_again(model, *exits, _below(state, "heads"))
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
    if _sha256(path) != artifact.sha256:
        raise CheckpointError(
            f"{WEIGHTS} of {str(artifact.folder)!r} must be the file that {PLAN} belongs to, but its SHA-256 differs; "
            "copy both from one run"
        )
    return state
