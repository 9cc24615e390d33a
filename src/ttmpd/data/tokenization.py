"""Text as token ids: the tokenizer of a model, padding, and the mask by which a model ignores the padding.

A batch of text is one tensor of ids, padded on the right. A model that wants a mask beside it gets it from a hook: it
stays the module that its library made, and the rest of this package hands on one tensor, as for images. The hook also
says of which tokens the answers count where a model answers each by itself.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ttmpd.errors import InvalidValueError, MissingPackageError, ModelError

MAX_LENGTH = 128
"""Tokens of a sample that are read, unless the user or the model says otherwise: attention grows with its square."""


SHORTEST = 4
"""Tokens that a sample must be allowed to have: two of them may only mark its ends."""


_UNLIMITED = 10**6  # tokenizers state absurd lengths where there is no limit


Task = Literal["sequence", "token", "next"]


TASKS: tuple[Task, ...] = ("sequence", "token", "next")
"""What a model predicts: a class for the text, a class for each token, or the token that follows each one."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Tokenizer, maximal length and padding of a model's text.

    Args:
        tokenizer: id or directory of the Hugging Face tokenizer; "" for a model without one, which takes token ids.
        padding: token id that fills a sample behind its end.
        max_length: tokens of a sample that are read; what comes after is cut off.
        limit: the most tokens that the model can read.
        task: what the model predicts, one of ``TASKS``.
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
        token_ids = tokenizer(list(texts), truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        full = [i for i, ids in enumerate(token_ids) if len(ids) >= self.max_length]
        whole = tokenizer([texts[i] for i in full], verbose=False)["input_ids"] if full else []
        cut = {i for i, ids in zip(full, whole, strict=True) if len(ids) > self.max_length}
        return [(torch.tensor(ids, dtype=torch.int64), i in cut) for i, ids in enumerate(token_ids)]

    def text_of(self, ids: Tensor) -> str:
        """The tokens that the model reads of a sample, as text; markers and padding are left out."""
        if not self.tokenizer:
            return " ".join(str(token) for token in ids[ids != self.padding].tolist())
        return str(load_tokenizer(self.tokenizer).decode(ids[ids != self.padding].tolist(), skip_special_tokens=True))


def predicts_per_token(preparation: object) -> bool:
    """True for the preprocessing of a model that predicts a label per token."""
    return isinstance(preparation, Tokenization) and preparation.task != "sequence"


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
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # each library below has errors of its own
        why = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(
            f"{place} must hold a tokenizer, but it cannot be loaded ({type(error).__name__}: {why}); put the "
            "tokenizer.json of the model beside its config.json"
        ) from error
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # made up, where the directory holds none
        raise ModelError(f"{place} must hold a tokenizer, but it knows no words; put tokenizer.json beside config.json")
    return tokenizer


@contextlib.contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers while the block runs, unless standard error is a terminal."""
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
    """True where a directory holds files of a tokenizer; also for an id that is no directory."""
    folder = Path(place).expanduser()
    names = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens", "tekken")
    return not folder.is_dir() or any(path.name.startswith(names) for path in folder.iterdir())


def token_mask(batch: Tensor, padding: int | None) -> Tensor | None:
    """(B, S) mask of the tokens that are no padding; None for inputs that are no text.

    Args:
        batch: (B, S) token ids.
        padding: of the samples, see :class:`ttmpd.data.samples.Samples`.

    Example:
        >>> token_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), 0).tolist()
        [[True, True, False], [True, False, False]]
    """
    return None if padding is None else batch != padding


def trim_padding(batch: Tensor, padding: int | None) -> Tensor:
    """The batch without the columns at its end that hold padding alone: as long as its longest sample.

    Example:
        >>> trim_padding(torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]), 0).tolist()
        [[5, 6], [7, 0]]
    """
    mask = token_mask(batch, padding)
    if mask is None:
        return batch
    used = mask.any(0).nonzero()
    return batch[:, : int(used[-1]) + 1] if len(used) else batch[:, :1]
