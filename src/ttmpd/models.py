"""Open a model by id, with its own preprocessing; nothing is unpickled and no remote code is run."""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError, MissingPackageError, ModelError, TTMPDError, UnsupportedError

FORMS = (
    "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/local/directory, path/to/file.py:factory or package.module:factory"
)
INTERPOLATIONS = {mode.name.lower(): mode for mode in Image.Resampling}
CROP_MODES = ("center", "squash")
_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a model wants its images: resize, crop, normalize. The names are timm's.

    Args:
        input_size: (channels, height, width) of what the model is given.
        mean: per-channel mean of pixels scaled to 0..1.
        std: per-channel divisor.
        interpolation: one of ``INTERPOLATIONS``.
        crop_pct: share of the resized image that is kept; the image is resized to ``size / crop_pct``, then cropped.
        crop_mode: "center" resizes the short side and keeps the proportions, "squash" resizes each side on its own.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        sizes = self.input_size
        if len(sizes) != 3 or any(size != int(size) or size < 1 for size in sizes):
            raise InvalidValueError(f"input_size must be three positive integers (C, H, W), but got {sizes!r}")
        for name, values, low in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            if len(values) != sizes[0] or not all(math.isfinite(value) and value > low for value in values):
                rule = f"hold {sizes[0]} finite values" + (" above 0" if name == "std" else "")
                raise InvalidValueError(f"{name} must {rule}, one per channel, but got {values!r}")
        if not 0 < self.crop_pct <= 1:
            raise InvalidValueError(f"crop_pct must lie above 0 and not above 1, but got {self.crop_pct!r}")
        for name, value, known in (
            ("interpolation", self.interpolation, tuple(INTERPOLATIONS)),
            ("crop_mode", self.crop_mode, CROP_MODES),
        ):
            if value not in known:
                raise InvalidValueError(f"{name} must be one of {', '.join(known)}, but got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data with timm's keys, that :meth:`from_dict` turns back into an equal record."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """The record that a dict with timm's keys describes; other keys are ignored.

        Raises:
            InvalidValueError: ``input_size``, ``mean`` or ``std`` is missing, or a value breaks its rule.
        """
        missing = [key for key in ("input_size", "mean", "std") if data.get(key) is None]
        if missing:
            raise InvalidValueError(f"preprocessing must hold input_size, mean and std, but got no {missing[0]}")
        try:
            channels, height, width = (int(size) for size in data["input_size"])
            values = {key: tuple(float(value) for value in data[key]) for key in ("mean", "std")}
            crop_pct = float(data.get("crop_pct") or 1.0)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"preprocessing must hold numbers under timm's keys, but got {dict(data)!r}"
            ) from error
        interpolation = str(data.get("interpolation") or "bilinear")
        return cls(
            (channels, height, width),
            values["mean"],
            values["std"],
            "bilinear" if interpolation == "random" else interpolation,
            crop_pct,
            str(data.get("crop_mode") or "center"),
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """The image as the model's input before normalization, (C, H, W) uint8.

        An image that already has the model's size is only converted; any other is resized, then cropped in the center.

        Raises:
            UnsupportedError: the model takes a number of channels that images do not have.
            ValueError: the image holds values that do not fit 8 or 16 bits.
        """
        channels, height, width = self.input_size
        if channels not in _IMAGE_MODES:
            raise UnsupportedError(
                f"a model that is given images must take 1, 3 or 4 channels, but takes {channels}; pass floating arrays"
            )
        image = _to_mode(image, _IMAGE_MODES[channels])
        if image.size != (width, height):
            image = image.resize(self._resized(image.size), INTERPOLATIONS[self.interpolation])
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        array = np.array(image, dtype=np.uint8).reshape(height, width, channels)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before the crop; rounds down as timm does, but 224 / (224 / 232) is 232."""
        goal = [math.floor(side / self.crop_pct + 1e-6) for side in (self.input_size[2], self.input_size[1])]
        if self.crop_mode == "squash":
            return goal[0], goal[1]
        if goal[0] * size[1] >= goal[1] * size[0]:  # the width is the tighter side
            return goal[0], max(goal[1], goal[0] * size[1] // size[0])
        return max(goal[0], goal[1] * size[0] // size[1]), goal[1]


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("holds values outside 0..65535")
        image = Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("holds floating values, whose range is unknown")
    elif image.mode == "P":
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A model, where it came from, and how it wants its inputs.

    Args:
        module: the model; in eval mode, except that a module that was passed in is as it was.
        id: the id as it was given; "" for a module that was passed in.
        rebuildable: whether the id is enough to build it again without running foreign code.
        preprocessing: its own preprocessing, when it says so.
        class_names: name of each class, when known.
    """

    module: nn.Module
    id: str
    rebuildable: bool
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()


def open_model(model: str | nn.Module, *, weights: Path | None = None, pretrained: bool = True) -> OpenedModel:
    """The model that an id names, on the CPU, with its preprocessing.

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME``, ``hf:/directory``, ``path/to/file.py:factory``,
            ``package.module:factory``, or a module, which is used as it is.
        weights: a safetensors file to load instead of the published weights.
        pretrained: load the published weights; a factory decides this for itself.

    Raises:
        InvalidValueError: the id has none of these forms, or ``weights`` is no safetensors file.
        MissingPackageError: the package that knows the id is not installed.
        ModelError: the model cannot be built, downloaded, or does not fit ``weights``.
        UnsupportedError: it is not an image classifier.
    """
    if weights is not None:
        _check_weights(Path(weights))
    if isinstance(model, nn.Module):
        opened = OpenedModel(model, "", False, preprocessing_of(model))
    else:
        scheme, _, name = model.partition(":")
        builder = _BUILDERS.get(scheme)
        own = pretrained and weights is None
        opened = builder(name, own) if builder is not None and name else _from_factory(model)
        opened.module.eval()
    if weights is not None:
        _load_weights(opened.module, Path(weights))
    return opened


def preprocessing_of(module: nn.Module) -> Preprocessing | None:
    """The preprocessing in the module's ``pretrained_cfg`` or ``default_cfg`` (a dict with timm's keys), else None.

    Raises:
        InvalidValueError: the dict is there, but breaks a rule.
    """
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, name, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            return Preprocessing.from_dict(config)
    return None


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f'{package} must be installed to open this model, but {_cause(error)}; pip install "ttmpd[{extra}]"'
        ) from error


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _building(model: str, pretrained: bool) -> Iterator[None]:
    """Turn what goes wrong while a library builds a model into one error; downloads may hold nothing but tensors."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    except TTMPDError:
        raise
    except Exception as error:
        step = "pass --no-pretrained for random weights, or --weights FILE.safetensors, if there is no network"
        local = "check the name and its package"
        if model.startswith("hf:"):  # even the layout of the model comes from there
            local = "check the files of the directory; without a network, pass a downloaded one as hf:/path/to/it"
            step = f"{step}; or pass a downloaded directory as hf:/path/to/it"
        raise ModelError(
            f"{model} must be possible to build, but got {_cause(error)}; {step if pretrained else local}"
        ) from error
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _from_timm(name: str, pretrained: bool) -> OpenedModel:
    timm = _require("timm", "timm")
    model_id = f"timm:{name}"
    if not timm.is_model(name):
        _refuse(model_id, "name a model of timm", timm.list_models(), name.partition(".")[0])
    with _building(model_id, pretrained):
        module: nn.Module = timm.create_model(name, pretrained=pretrained)
        config = timm.data.resolve_model_data_config(module)
    labels = getattr(module, "pretrained_cfg", {}).get("label_names") or ()
    return OpenedModel(module, model_id, True, Preprocessing.from_dict(config), tuple(labels))


def _refuse(model_id: str, rule: str, known: list[str], name: str) -> None:
    close = difflib.get_close_matches(name, known, 3)
    step = f"did you mean {', '.join(close)}?" if close else "look at its list of models"
    raise InvalidValueError(f"{model_id.partition(':')[0]}:NAME must {rule}, but got {model_id!r}; {step}")


def _from_torchvision(name: str, pretrained: bool) -> OpenedModel:
    models = _require("torchvision.models", "timm")
    model_id = f"torchvision:{name}"
    if name not in models.list_models():
        _refuse(model_id, "name a model of torchvision", models.list_models(), name)
    published: Any = getattr(models.get_model_weights(name), "DEFAULT", None)
    transforms = published.transforms() if published else None
    if transforms is not None and type(transforms).__name__ != "ImageClassification":
        raise UnsupportedError(f"the model must be an image classifier, but {model_id} is for another task")
    with _building(model_id, pretrained):
        module: nn.Module = models.get_model(name, weights=published if pretrained else None)
    if transforms is None:
        return OpenedModel(module, model_id, True)
    size = transforms.crop_size[0]
    preprocessing = Preprocessing(
        (len(transforms.mean), size, size),
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.value,
        size / transforms.resize_size[0],
    )
    return OpenedModel(module, model_id, True, preprocessing, tuple(published.meta.get("categories", ())))


def _from_hf(name: str, pretrained: bool) -> OpenedModel:
    hf = _require("transformers", "text")
    model_id, local = f"hf:{name}", name.startswith((".", "/", "~")) or Path(name).is_dir()
    source = str(Path(name).expanduser()) if local else name
    if local and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{model_id} must be a directory with a config.json, but got none; check the path")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    with _building(model_id, pretrained):
        config = hf.AutoConfig.from_pretrained(source, **options)
        if type(config) not in hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise UnsupportedError(
                f"the model must be an image classifier, but {model_id} is a {type(config).__name__}; "
                "text models are not supported yet"
            )
        auto = hf.AutoModelForImageClassification
        if pretrained:
            module, found = auto.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True, **options
            )
            _refuse_keys(model_id, sorted(found["missing_keys"]), [])  # a random head would be distilled in silence
        else:
            module = auto.from_config(config, trust_remote_code=False)
    names = tuple(str(label) for _, label in sorted((config.id2label or {}).items()))
    preprocessing = _hf_preprocessing(hf, source, int(getattr(config, "num_channels", 3)), options)
    return OpenedModel(module.float(), model_id, True, preprocessing, names)


def _hf_preprocessing(hf: Any, source: str, channels: int, options: dict[str, Any]) -> Preprocessing | None:
    """What the image processor does, or None when there is none or it cannot be said in timm's words.

    Size, mean and std are measured on a black and a white image, since processors differ in how they combine settings.
    """
    try:
        processor = hf.AutoImageProcessor.from_pretrained(source, **options)
        black, white = (_hf_constant(processor, channels, value) for value in (0, 255))
    except Exception:
        return None
    settings = processor.to_dict()
    if black.shape != white.shape or not (settings.get("do_resize") or settings.get("do_center_crop")):
        return None
    std = [1 / (high - low) for low, high in zip(black.mean((1, 2)).tolist(), white.mean((1, 2)).tolist(), strict=True)]
    mean = [-low * one for low, one in zip(black.mean((1, 2)).tolist(), std, strict=True)]
    size, height = settings.get("size") or {}, black.shape[1]
    crop_pct = settings.get("crop_pct") if "shortest_edge" in size and height < 384 else None
    if settings.get("do_center_crop"):
        crop_pct = height / (size.get("shortest_edge") or size.get("height") or height)
    squash = "height" in size or (settings.get("crop_pct") is not None and height >= 384)
    resample = settings.get("resample")
    return Preprocessing(
        (channels, height, black.shape[2]),
        tuple(round(value, 6) for value in mean),
        tuple(round(value, 6) for value in std),
        Image.Resampling(2 if resample is None else int(resample)).name.lower(),
        min(1.0, crop_pct or 1.0),
        "squash" if squash and settings.get("do_resize") else "center",
    )


def _hf_constant(processor: Any, channels: int, value: int) -> Tensor:
    """The processor's answer to a constant image, (C, H, W)."""
    image = Image.new(_IMAGE_MODES[channels], (64, 64), (value,) * channels if channels > 1 else value)
    answer: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return answer.float()


_BUILDERS: dict[str, Callable[[str, bool], OpenedModel]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": _from_hf,
}


def _from_factory(model_id: str) -> OpenedModel:
    place, _, factory = model_id.rpartition(":")
    is_file = place.endswith(".py")
    if not (factory.isidentifier() and (is_file or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place))):
        raise InvalidValueError(f"a model id must be one of {FORMS}, but got {model_id!r}{_hint(model_id)}")
    with _importable(Path(place).parent if is_file else None):
        holder = _import_file(Path(place)) if is_file else _import_module(place)
        made = getattr(holder, factory, None)
        if made is None:
            known = [name for name, value in vars(holder).items() if callable(value) and not name.startswith("_")]
            close = ", ".join(difflib.get_close_matches(factory, known, 3, 0.3) or known[:3])
            raise ModelError(f"{place} must hold {factory!r}, but holds no such name; it has {close or 'no functions'}")
        if not isinstance(made, nn.Module):
            try:
                made = made()
            except Exception as error:
                raise ModelError(
                    f"{model_id} must return a model when called without arguments, but raised {_cause(error)}"
                ) from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"{model_id} must return an nn.Module, but returned {type(made).__name__}")
    return OpenedModel(made, model_id, place == "ttmpd.demo", preprocessing_of(made))


def _hint(name: str) -> str:
    """A suggestion for a bare name; timm is asked only when it is installed."""
    if importlib.util.find_spec("timm") is not None and ":" not in name and _require("timm", "timm").is_model(name):
        return f"; did you mean timm:{name}?"
    return "; put one of these prefixes before the name"


@contextlib.contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Let a file import what lies beside it, as Python does for a script."""
    added = [] if folder is None else [str(folder.expanduser().resolve())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(path)


def _import_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ModelError(f"a factory's file must exist, but got {str(path)!r}; check the path")
    name = f"ttmpd_file_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"a factory's file must be importable, but got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelError(f"{path.name} must be importable, but raised {_cause(error)}; run it on its own") from error
    return module


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(
            f"{name} must be importable, but raised {_cause(error)}; install it, set PYTHONPATH, or name its file.py"
        ) from error


def _check_weights(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise InvalidValueError(
            f"weights must be a .safetensors file, but got {path.name!r}; pickled files can run code when opened: "
            "convert it with safetensors.torch.save_file"
        )
    if not path.is_file():
        raise InvalidValueError(f"weights must be an existing file, but got {str(path)!r}; check the path")


def _load_weights(module: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:
        raise ModelError(f"{path.name} must be a readable safetensors file, but got {_cause(error)}") from error
    own = module.state_dict()
    present = {own[key].data_ptr() for key in state if key in own}  # tied tensors are stored once
    missing = [key for key, value in own.items() if key not in state and value.data_ptr() not in present]
    extra = [
        f"{key} {tuple(state[key].shape)}" for key in state if key not in own or own[key].shape != state[key].shape
    ]
    _refuse_keys(path.name, [key for key in missing if not key.endswith(".num_batches_tracked")], extra)
    module.load_state_dict(state, strict=False)


def _refuse_keys(source: str, missing: list[str], extra: list[str]) -> None:
    if missing or extra:
        found = [
            f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for word, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise ModelError(
            f"{source} must hold the weights of this model, but has {' and '.join(found)} keys; check the model's id"
        )
