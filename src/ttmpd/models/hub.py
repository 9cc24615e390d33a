"""How each library builds its models, without remote code."""

import contextlib
import difflib
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ttmpd.data.preprocessing import IMAGE_MODES, Preprocessing
from ttmpd.data.tokenization import Task, hide_progress_bars
from ttmpd.errors import InvalidValueError, MissingPackageError, ModelError, TTMPDError, UnsupportedError, cause
from ttmpd.models.config import set_padding, tokenization_of
from ttmpd.models.opened import OpenedModel
from ttmpd.models.tokens import mask_padding


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f'{package} must be installed to open this model, but {cause(error)}; pip install "ttmpd[{extra}]"'
        ) from error


@contextlib.contextmanager
def _building(model: str, pretrained: bool) -> Iterator[None]:
    """Turn what goes wrong while a library builds a model into one error."""
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


_SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_switching = threading.RLock()


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Refuse downloads that hold more than tensors, where a library has no argument for that: torchvision.

    torch's switch is of the whole process, so only one thread at a time builds under it. timm passes ``weights_only``
    itself, and from Hugging Face only safetensors are taken.
    """
    with _switching:
        before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = "1"
        try:
            yield
        finally:
            os.environ.pop(_SWITCH)
            if before is not None:
                os.environ[_SWITCH] = before


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


def _refuse(model_id: str, rule: str, names: list[str], name: str) -> None:
    close = difflib.get_close_matches(name, names, 3)
    step = f"did you mean {', '.join(close)}?" if close else "look at its list of models"
    raise InvalidValueError(f"{model_id.partition(':')[0]}:NAME must {rule}, but got {model_id!r}; {step}")


def _from_torchvision(name: str, pretrained: bool) -> OpenedModel:
    models = _require("torchvision.models", "timm")
    model_id = f"torchvision:{name}"
    if name not in models.list_models():
        _refuse(model_id, "name a model of torchvision", models.list_models(), name)
    published: Any = getattr(models.get_model_weights(name), "DEFAULT", None)
    transforms = published.transforms() if published else None
    is_dense = type(transforms).__name__ == "SemanticSegmentation"
    if transforms is not None and not is_dense and type(transforms).__name__ != "ImageClassification":
        raise UnsupportedError(
            f"the model must classify images or their pixels, but {model_id} is for another task; pass one that does, "
            "or a module of your own"
        )
    options = _dense_options(models.get_model_builder(name), pretrained) if is_dense else {}
    with _building(model_id, pretrained), _tensors_only():
        module: nn.Module = models.get_model(name, weights=published if pretrained else None, **options)
    if transforms is None:
        return OpenedModel(module, model_id, True)
    resized = transforms.resize_size[0]
    size = resized if is_dense else transforms.crop_size[0]  # a batch needs pictures of one size: the middle is cut out
    preprocessing = Preprocessing(
        (len(transforms.mean), size, size),
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.value,
        size / resized,
    )
    return OpenedModel(module, model_id, True, preprocessing, tuple(published.meta.get("categories", ())))


def _dense_options(builder: Callable[..., nn.Module], pretrained: bool) -> dict[str, Any]:
    """With the auxiliary head of the published weights in any case, and nothing downloaded for random ones."""
    auxiliary = {"aux_loss": True} if "aux_loss" in inspect.signature(builder).parameters else {}
    return auxiliary if pretrained else auxiliary | {"weights_backbone": None}


def _from_hf(name: str, pretrained: bool) -> OpenedModel:
    hf = _require("transformers", "text")
    model_id, local = f"hf:{name}", name.startswith((".", "/", "~")) or Path(name).is_dir()
    source = str(Path(name).expanduser()) if local else name
    if local and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{model_id} must be a directory with a config.json, but got none; check the path")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    with _building(model_id, pretrained), hide_progress_bars():
        config = hf.AutoConfig.from_pretrained(source, **options)
        task = _task_of(hf, config, model_id)
        auto = getattr(hf, f"AutoModelFor{_HEADS[task][0]}") if task else hf.AutoModelForImageClassification
        if task:
            set_padding(config, name)
        if pretrained:
            module, info = auto.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True, **options
            )
            _refuse_keys(model_id, sorted(info["missing_keys"]), [])  # a random head would be distilled in silence
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
    mean = [-low * scale for low, scale in zip(black.mean((1, 2)).tolist(), std, strict=True)]
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


def _refuse_keys(source: str, missing: list[str], extra: list[str]) -> None:
    if missing or extra:
        problems = [
            f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for word, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise ModelError(
            f"{source} must hold the weights of this model, but has {' and '.join(problems)} keys; check the model's id"
        )
