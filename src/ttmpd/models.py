"""Open a model by id, with its own preprocessing; nothing is unpickled and no remote code is run."""

import contextlib
import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError, MissingPackageError, ModelError, TTMPDError, UnsupportedError
from ttmpd.factory import call_factory, cause, is_factory
from ttmpd.modules import clone
from ttmpd.preprocessing import IMAGE_MODES, Preparation, Preprocessing, preprocessing_of
from ttmpd.records import UNCHANGED, Lossless, Removal
from ttmpd.text import Task, Tokenization, make_ready, mask_of, mask_padding, tokenization_of, without_bars

FORMS = (
    "timm:NAME, torchvision:NAME, hf:ORG/NAME, hf:/local/directory, path/to/file.py:factory or package.module:factory"
)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A model, where it came from, and how it wants its inputs.

    Args:
        module: the model; in eval mode, except that a module that was passed in is as it was. One that takes text looks
            past the padding by itself when it is called with token ids alone.
        id: the id as it was given; "" for a module that was passed in.
        rebuildable: whether the id is enough to build it again without running foreign code.
        preprocessing: its own preprocessing, of images or text, when it says so.
        class_names: name of each class, when known.
        removed: what is gone already, when it was opened from an artifact; ``id`` then names the stock model.
        used_ids: content hashes of the unlabelled samples that made it what it is.
        lossless: what else was done to it, when it was opened from an artifact.
    """

    module: nn.Module
    id: str
    rebuildable: bool
    preprocessing: Preparation | None = None
    class_names: tuple[str, ...] = ()
    removed: tuple[Removal, ...] = ()
    used_ids: tuple[str, ...] = ()
    lossless: Lossless = UNCHANGED

    def reading(self, max_length: int | None) -> "OpenedModel":
        """The same model, of whose samples so many tokens are read; its module says so, too. None changes nothing.

        Raises:
            InvalidValueError: it takes no text, or cannot read so many.
        """
        if max_length is None:
            return self
        if not isinstance(self.preprocessing, Tokenization):
            raise InvalidValueError(f"max_length must be left out for a model that takes no text, but got {max_length}")
        wanted = replace(self.preprocessing, max_length=max_length)
        self.module.pretrained_cfg = wanted.to_dict()  # type: ignore[assignment]
        return replace(self, preprocessing=wanted)


def open_model(model: str | nn.Module, *, weights: Path | None = None, pretrained: bool = True) -> OpenedModel:
    """The model that an id names, on the CPU, with its preprocessing.

    Args:
        model: ``timm:NAME``, ``torchvision:NAME``, ``hf:ORG/NAME``, ``hf:/directory``, ``path/to/file.py:factory``,
            ``package.module:factory``, or a module, which is used as it is (a copy of one that takes text).
        weights: a safetensors file to load instead of the published weights.
        pretrained: load the published weights; a factory decides this for itself.

    Raises:
        InvalidValueError: the id has none of these forms, or ``weights`` is no safetensors file.
        MissingPackageError: the package that knows the id is not installed.
        ModelError: the model cannot be built, downloaded, or does not fit ``weights``.
        UnsupportedError: it is no classifier of images or text, and no decoder of text.
    """
    if weights is not None:
        _check_weights(Path(weights))
    if isinstance(model, nn.Module):
        opened = _given(model)
    else:
        scheme, _, name = model.partition(":")
        builder = _BUILDERS.get(scheme)
        own = pretrained and weights is None
        opened = builder(name, own) if builder is not None and name else _from_factory(model)
        opened.module.eval()
    if weights is not None:
        _load_weights(opened.module, Path(weights))
    return opened


def _given(module: nn.Module, model_id: str = "") -> OpenedModel:
    """A module of the user's own code; it is left as it is, so one that takes text gets its mask on a copy."""
    found = preprocessing_of(module)
    if isinstance(found, Tokenization) and mask_of(module) is None:
        module = mask_padding(clone(module), found)
    return OpenedModel(module, model_id, is_rebuildable(model_id), found)


def is_rebuildable(model_id: str) -> bool:
    """Whether the id alone is enough to build the model again, without running code that it names."""
    scheme, _, name = model_id.partition(":")
    return (scheme in _BUILDERS and bool(name)) or model_id == "ttmpd.demo:demo_model"


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f'{package} must be installed to open this model, but {cause(error)}; pip install "ttmpd[{extra}]"'
        ) from error


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
            f"{model} must be possible to build, but got {cause(error)}; {step if pretrained else local}"
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
    with _building(model_id, pretrained), without_bars():
        config = hf.AutoConfig.from_pretrained(source, **options)
        task = _task_of(hf, config, model_id)
        auto = getattr(hf, f"AutoModelFor{_HEADS[task][0]}") if task else hf.AutoModelForImageClassification
        if task:
            make_ready(config, name)
        if pretrained:
            module, found = auto.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True, **options
            )
            _refuse_keys(model_id, sorted(found["missing_keys"]), [])  # a random head would be distilled in silence
        else:
            module = auto.from_config(config, trust_remote_code=False)
    names = tuple(str(label) for _, label in sorted((config.id2label or {}).items()))
    if task:
        tokenization = tokenization_of(module, name, task)
        module.pretrained_cfg = tokenization.to_dict()  # the student, a plain module, says how it wants its text
        names = () if task == "next" else names  # its classes are the tokens
        return OpenedModel(mask_padding(module.float(), tokenization), model_id, True, tokenization, names)
    preprocessing = _hf_preprocessing(hf, source, int(getattr(config, "num_channels", 3)), options)
    return OpenedModel(module.float(), model_id, True, preprocessing, names)


_HEADS: dict[Task, tuple[str, str]] = {
    "token": ("TokenClassification", "TOKEN_CLASSIFICATION"),
    "next": ("CausalLM", "CAUSAL_LM"),
    "sequence": ("SequenceClassification", "SEQUENCE_CLASSIFICATION"),
}
"""Task -> the ends of the names that transformers has for its models and for their table."""


def _task_of(hf: Any, config: Any, model_id: str) -> Task | None:
    """What a text model was trained to answer, by the class that its config names; None for a model of images."""
    if type(config) in hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return None
    tables = {task: getattr(hf, f"MODEL_FOR_{end}_MAPPING") for task, (_, end) in _HEADS.items()}
    for task, table in tables.items():
        if type(config) in table and table[type(config)].__name__ in (config.architectures or ()):
            return task
    if type(config) in tables["sequence"]:
        return "sequence"
    raise UnsupportedError(
        f"the model must be a classifier of images or text, or a decoder, but {model_id} is a {type(config).__name__}"
    )


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
    image = Image.new(IMAGE_MODES[channels], (64, 64), (value,) * channels if channels > 1 else value)
    answer: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return answer.float()


_BUILDERS: dict[str, Callable[[str, bool], OpenedModel]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": _from_hf,
}


def _from_factory(model_id: str) -> OpenedModel:
    if not is_factory(model_id):
        raise InvalidValueError(f"a model id must be one of {FORMS}, but got {model_id!r}{_hint(model_id)}")
    return _given(call_factory(model_id), model_id)


def _hint(name: str) -> str:
    """A suggestion for a bare name; timm is asked only when it is installed."""
    if importlib.util.find_spec("timm") is not None and ":" not in name and _require("timm", "timm").is_model(name):
        return f"; did you mean timm:{name}?"
    return "; put one of these prefixes before the name"


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
        raise ModelError(f"{path.name} must be a readable safetensors file, but got {cause(error)}") from error
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
