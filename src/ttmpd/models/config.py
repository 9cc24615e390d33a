"""The preprocessing and tokenization that a model's own configuration asks for."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ttmpd.data.preprocessing import Preparation, Preprocessing
from ttmpd.data.tokenization import _UNLIMITED, MAX_LENGTH, Task, Tokenization, has_tokenizer, load_tokenizer
from ttmpd.errors import ModelError


def preprocessing_of(module: nn.Module) -> Preparation | None:
    """The preprocessing in the module's ``pretrained_cfg`` or ``default_cfg``, else None.

    A dict with timm's keys for images; for text one with ``tokenizer`` (an id, a directory, or "" where token ids are
    given), and ``padding``, ``max_length`` and ``limit`` where they are not what the module's config says.

    Raises:
        InvalidValueError: the dict is there, but breaks a rule.
    """
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, name, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            return Preprocessing.from_dict(config)
        if isinstance(config, Mapping) and "tokenizer" in config:
            defaults = {} if "padding" in config else tokenization_of(module, str(config["tokenizer"])).to_dict()
            return Tokenization.from_dict(defaults | dict(config))
    return None


def set_padding(config: Any, place: str) -> None:
    """Settle in a model's config what batches of text need, before the model is built. In place.

    Where it names no padding, the tokenizer's is taken, else the end of a text: classifiers made of decoders read their
    answer off the last token that is no padding. Caches for generation are switched off: they grow with every call.

    Raises:
        ModelError: neither says what may stand behind a text; or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(place) if has_tokenizer(place) else None
    candidates = [getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None)]
    candidates += [getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)]
    n_tokens = getattr(config, "vocab_size", _UNLIMITED)
    padding = next((value for value in candidates if isinstance(value, int) and 0 <= value < n_tokens), None)
    if padding is None:
        raise ModelError(
            f"the tokenizer of {place} must have a token for padding or for the end of a text, but has neither; set "
            "pad_token in its tokenizer_config.json"
        )
    config.pad_token_id = padding


def tokenization_of(module: nn.Module, place: str, task: Task = "sequence") -> Tokenization:
    """How a Hugging Face model wants its text.

    Args:
        module: its config names the padding, see :func:`set_padding`.
        place: of the tokenizer.
        task: what the model answers.
    """
    config, is_loadable = getattr(module, "config", None), has_tokenizer(place)
    limits = [_UNLIMITED, getattr(config, "max_position_embeddings", None)]
    limits += [load_tokenizer(place).model_max_length] if is_loadable else []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding) and ("position_embeddings" in name or name.endswith(".wpe")):
            # RoBERTa and its like count positions from behind the padding's.
            limits.append(layer.num_embeddings - (0 if layer.padding_idx is None else layer.padding_idx + 1))
    limit, padding = min(int(value) for value in limits if value), int(getattr(config, "pad_token_id", None) or 0)
    return Tokenization(place if is_loadable else "", padding, min(limit, MAX_LENGTH), limit, task)
