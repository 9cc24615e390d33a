"""Text as token ids: the tokenizer of a model, padding, and the mask that makes a model look past the padding.

A batch of text is one tensor of ids, padded on the right. A model that wants a mask beside it gets it from a hook: it
stays the module that its library made, and the rest of this package hands on one tensor, as for images. The hook also
says of which tokens the answers count where a model answers each by itself.
"""

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttmpd.errors import InvalidValueError, MissingPackageError, ModelError

MAX_LENGTH = 128
"""Tokens of a sample that are read, unless the user or the model says otherwise: attention grows with its square."""
SHORTEST = 4
"""Tokens that a sample must be allowed to have: two of them may only mark its ends."""
_UNLIMITED = 10**6  # tokenizers state absurd lengths where there is no limit
VALUES = 1 << 20
"""Values that the answers for one sample may have: of models that answer each token by one of a large vocabulary, only
so many tokens count, evenly spread over the sample."""

Task = Literal["sequence", "token", "next"]
TASKS: tuple[Task, ...] = ("sequence", "token", "next")
"""What a model answers: a class for the text, a class for each token, or what each token is followed by."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How a model wants its text: which tokenizer, how many tokens, what fills up the rest.

    Args:
        tokenizer: id or directory of the Hugging Face tokenizer; "" for a model without one, which takes token ids.
        padding: token id that stands behind the end of a sample.
        max_length: tokens of a sample that are read; what comes after is cut off.
        limit: the most tokens that the model can read.
        task: what the model answers, one of ``TASKS``.
    """

    tokenizer: str
    padding: int
    max_length: int = MAX_LENGTH
    limit: int = _UNLIMITED
    task: Task = "sequence"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InvalidValueError(f"task must be one of {', '.join(TASKS)}, but got {self.task!r}")
        if self.padding < 0:
            raise InvalidValueError(f"padding must be a token id, 0 or more, but got {self.padding!r}")
        if not SHORTEST <= self.max_length <= self.limit:
            raise InvalidValueError(
                f"max_length must be a number of tokens from {SHORTEST} to {self.limit}, which is what the model can "
                f"read, but got {self.max_length!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` turns back into an equal record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Tokenization":
        """The record that plain data describe; other keys are ignored.

        Raises:
            InvalidValueError: ``tokenizer`` or ``padding`` is missing, or a value breaks its rule.
        """
        try:
            numbers = {key: int(data[key]) for key in ("max_length", "limit") if data.get(key) is not None}
            return cls(str(data["tokenizer"]), int(data["padding"]), **numbers, task=data.get("task", "sequence"))
        except (KeyError, TypeError) as error:
            raise InvalidValueError(
                f"the preprocessing of text must hold a tokenizer and the id of its padding, but got {dict(data)!r}"
            ) from error

    def encode(self, texts: Sequence[str]) -> list[tuple[Tensor, bool]]:
        """(token ids, whether the end was cut off) of each text; no padding.

        Raises:
            ModelError: the tokenizer cannot be loaded.
            MissingPackageError: transformers is not installed.
        """
        if not texts:
            return []
        if not self.tokenizer:
            raise ModelError(
                "a model must have a tokenizer to read text, but came without one; put its tokenizer.json beside its "
                "config.json, or give token ids"
            )
        tokenizer = load_tokenizer(self.tokenizer)
        found = tokenizer(list(texts), truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        full = [i for i, ids in enumerate(found) if len(ids) >= self.max_length]
        whole = tokenizer([texts[i] for i in full], verbose=False)["input_ids"] if full else []
        cut = {i for i, ids in zip(full, whole, strict=True) if len(ids) > self.max_length}
        return [(torch.tensor(ids, dtype=torch.int64), i in cut) for i, ids in enumerate(found)]

    def text_of(self, ids: Tensor) -> str:
        """What the model reads of a sample, as text again; markers and padding are left out."""
        if not self.tokenizer:
            return " ".join(str(token) for token in ids[ids != self.padding].tolist())
        return str(load_tokenizer(self.tokenizer).decode(ids[ids != self.padding].tolist(), skip_special_tokens=True))


def is_tokens(how: object) -> bool:
    """Whether a model that wants its inputs like this answers each token of a text."""
    return isinstance(how, Tokenization) and how.task != "sequence"


@functools.lru_cache(maxsize=4)
def load_tokenizer(place: str) -> Any:
    """The Hugging Face tokenizer with this id or in this directory; no remote code is run.

    Raises:
        ModelError: there is none, or it cannot be read.
        MissingPackageError: transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError(
            f'transformers must be installed to read text, but {error}; pip install "ttmpd[text]"'
        ) from error
    folder = Path(place).expanduser()
    source, local = (str(folder), True) if folder.is_dir() else (place, False)
    try:
        found = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # each library below has errors of its own
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"{place} must hold a tokenizer, but it cannot be loaded ({type(error).__name__}: {why}); put the "
            "tokenizer.json of the model beside its config.json"
        ) from error
    if set(found.get_vocab().values()) <= set(found.all_special_ids):  # made up, where the directory holds none
        raise ModelError(f"{place} must hold a tokenizer, but it knows no words; put tokenizer.json beside config.json")
    return found


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """While active, transformers shows no progress of its own unless somebody watches a terminal."""
    from transformers.utils import logging

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def has_tokenizer(place: str) -> bool:
    """Whether a directory holds anything of a tokenizer; of what is no directory it is assumed."""
    folder = Path(place).expanduser()
    names = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens", "tekken")
    return not folder.is_dir() or any(path.name.startswith(names) for path in folder.iterdir())


def make_ready(config: Any, place: str) -> None:
    """Settle in a model's config what batches of text need, before the model is built. In place.

    Where it names no padding, the tokenizer's is taken, else the end of a text: classifiers made of decoders read their
    answer off the last token that is no padding. Caches for generation are switched off: they grow with every call.

    Raises:
        ModelError: neither says what may stand behind a text; or the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(place) if has_tokenizer(place) else None
    known = [getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None)]
    known += [getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)]
    n_tokens = getattr(config, "vocab_size", _UNLIMITED)
    padding = next((value for value in known if isinstance(value, int) and 0 <= value < n_tokens), None)
    if padding is None:
        raise ModelError(
            f"the tokenizer of {place} must have a token for padding or for the end of a text, but has neither; set "
            "pad_token in its tokenizer_config.json"
        )
    config.pad_token_id = padding


def tokenization_of(module: nn.Module, place: str, task: Task = "sequence") -> Tokenization:
    """How a Hugging Face model wants its text.

    Args:
        module: its config names the padding, see :func:`make_ready`.
        place: of the tokenizer.
        task: what the model answers.
    """
    config, known = getattr(module, "config", None), has_tokenizer(place)
    limits = [_UNLIMITED, getattr(config, "max_position_embeddings", None)]
    limits += [load_tokenizer(place).model_max_length] if known else []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding) and ("position_embeddings" in name or name.endswith(".wpe")):
            # RoBERTa and its like count positions from behind the padding's.
            limits.append(layer.num_embeddings - (0 if layer.padding_idx is None else layer.padding_idx + 1))
    limit, padding = min(int(value) for value in limits if value), int(getattr(config, "pad_token_id", None) or 0)
    return Tokenization(place if known else "", padding, min(limit, MAX_LENGTH), limit, task)


@dataclass(frozen=True, slots=True)
class PaddingMask:
    """A hook that adds ``attention_mask`` to a call with ids alone; a mask that the caller passes wins.

    Args:
        padding: the token id that is masked.
        n_answers: the most tokens of a sample whose answers count; 0 for a model that answers a sample once.
        caches: whether the model keeps keys and values for a next call: not in calls with ids alone, whose parts may be
            run again.
    """

    padding: int
    n_answers: int = 0
    caches: bool = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the model is called with instead; None where nothing changes."""
        names = inspect.signature(type(module).forward).parameters if len(args) > 1 else ()
        given = dict(zip(list(names)[1:], args, strict=False)) | kwargs
        ids = args[0] if args else kwargs.get("input_ids")
        if given.get("past_key_values") is not None or any(map(_is_cache, given.values())):
            return None  # a decoder that generates: the ids are the last few of a text, and masks are its own affair
        if given.get("attention_mask") is not None or not isinstance(ids, Tensor) or ids.is_floating_point():
            return None
        if "attention_mask" in given and "attention_mask" not in kwargs:
            return None  # None in its place among the arguments: there is no room for another
        kept = {"use_cache": False} if self.caches and "use_cache" not in given else {}
        return args, {**kwargs, **kept, "attention_mask": (ids != self.padding).long()}


def _is_cache(value: Any) -> bool:
    """Whether a model is handed the keys and values of earlier tokens; what the argument is called differs."""
    return hasattr(value, "get_seq_length")


def mask_padding(module: nn.Module, how: Tokenization) -> nn.Module:
    """The module, which looks past the padding by itself from now on if it takes an ``attention_mask``. In place."""
    n_outputs = getattr(getattr(module, "config", None), "num_labels" if how.task == "token" else "vocab_size", VALUES)
    n_answers = 0 if how.task == "sequence" else max(8, VALUES // int(n_outputs))
    takes = inspect.signature(type(module).forward).parameters
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, PaddingMask):
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    if "attention_mask" in takes:
        # Prepended: what else looks at the call sees the mask.
        mask = PaddingMask(how.padding, n_answers, "use_cache" in takes)
        module.register_forward_pre_hook(mask, prepend=True, with_kwargs=True)
    return module


def mask_of(module: nn.Module) -> PaddingMask | None:
    """What :func:`mask_padding` left, or None."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, PaddingMask)), None)


def answered(module: nn.Module, batch: Tensor) -> Tensor | None:
    """(B, S) which tokens of a batch a model's answers count of; None for a model that answers each sample once.

    Padding is never among them. Of samples with more tokens than may count, they are evenly spread.

    Args:
        module: of which the answers are.
        batch: (B, S) token ids, or anything else that the module takes.
    """
    mask = mask_of(module)
    if mask is None or not mask.n_answers or batch.dim() != 2 or batch.is_floating_point():
        return None
    kept = batch != mask.padding
    n_kept, rank = kept.sum(1, keepdim=True), kept.cumsum(1)
    share = n_kept.clamp(max=mask.n_answers)
    n_kept = n_kept.clamp_min(1)
    return kept & (rank * share // n_kept > (rank - 1) * share // n_kept)


def answers_until(module: nn.Module, inputs: Tensor) -> Tensor:
    """(N + 1,) where the answers for each sample begin and the last one's end, when all are in one row.

    Args:
        module: of which the answers are.
        inputs: (N, ...) all samples.

    Example:
        >>> answers_until(nn.Linear(2, 2), torch.zeros(3, 2)).tolist()
        [0, 1, 2, 3]
    """
    counts = answered(module, inputs)
    ends = torch.arange(1, len(inputs) + 1) if counts is None else counts.sum(1).cumsum(0).cpu()
    return torch.cat([torch.zeros(1, dtype=torch.long), ends])


def followers(module: nn.Module, batch: Tensor) -> Tensor:
    """(M,) the token behind each one that counts, -1 behind the last of a sample: what a decoder should have answered.

    Args:
        module: of which the answers are.
        batch: (B, S) token ids.
    """
    mask, counts = mask_of(module), answered(module, batch)
    assert mask is not None
    assert counts is not None
    behind = torch.cat([batch[:, 1:], torch.full_like(batch[:, :1], mask.padding)], 1)
    return torch.where(behind == mask.padding, -1, behind)[counts]


def kept_tokens(batch: Tensor, padding: int | None) -> Tensor | None:
    """(B, S) which tokens are no padding; None for what is no text.

    Args:
        batch: (B, S) token ids.
        padding: of the samples, see :class:`ttmpd.batches.Samples`.

    Example:
        >>> kept_tokens(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0).tolist()
        [[True, True, False], [True, False, False]]
    """
    return None if padding is None else batch != padding


def trimmed(batch: Tensor, padding: int | None) -> Tensor:
    """The batch without the columns at its end that hold padding alone: as long as its longest sample.

    Example:
        >>> trimmed(torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]), 0).tolist()
        [[5, 6], [7, 0]]
    """
    kept = kept_tokens(batch, padding)
    if kept is None:
        return batch
    used = kept.any(0).nonzero()
    return batch[:, : int(used[-1]) + 1] if len(used) else batch[:, :1]


def random_ids(module: nn.Module, tokenization: Tokenization, shape: Sequence[int]) -> Tensor:
    """Ids of random tokens, none of them padding: to run and time a model that is given no text.

    Args:
        module: whose first embedding says how many tokens there are.
        tokenization: of the model.
        shape: (B, S).
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    n_tokens = layers[0].num_embeddings if layers else len(load_tokenizer(tokenization.tokenizer))
    ids = torch.randint(0, n_tokens, tuple(shape), generator=torch.Generator().manual_seed(0))
    return torch.where(ids == tokenization.padding, (ids + 1) % n_tokens, ids)
