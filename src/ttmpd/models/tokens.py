"""Token ids in a model: padding masks, and which tokens' predictions count."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttmpd.data.tokenization import Tokenization, load_tokenizer

MAX_OUTPUT_VALUES = 1 << 20
"""Values that the predictions for one sample may have: where each token is predicted from a large vocabulary, only so
many tokens are used, evenly spaced over the sample."""


@dataclass(frozen=True, slots=True)
class PaddingMask:
    """A hook that adds ``attention_mask`` to a call with ids alone; a mask that the caller passes wins.

    Args:
        padding: the token id that is masked.
        n_answers: the most tokens of a sample whose predictions are used; 0 for one prediction per sample.
        caches: whether the model keeps keys and values for a next call: not in calls with ids alone, whose parts may be
            run again.
    """

    padding: int
    n_answers: int = 0
    caches: bool = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The arguments with a mask; None where nothing changes."""
        names = inspect.signature(type(module).forward).parameters if len(args) > 1 else ()
        arguments = dict(zip(list(names)[1:], args, strict=False)) | kwargs
        ids = args[0] if args else kwargs.get("input_ids")
        if arguments.get("past_key_values") is not None or any(map(_is_cache, arguments.values())):
            return None  # a decoder that generates: the ids are the last few of a text, and masks are its own affair
        if arguments.get("attention_mask") is not None or not isinstance(ids, Tensor) or ids.is_floating_point():
            return None
        if "attention_mask" in arguments and "attention_mask" not in kwargs:
            return None  # None in its place among the arguments: there is no room for another
        options = {"use_cache": False} if self.caches and "use_cache" not in arguments else {}
        return args, {**kwargs, **options, "attention_mask": (ids != self.padding).long()}


def _is_cache(value: Any) -> bool:
    """True for a cache of the keys and values of earlier tokens, whatever the argument is called."""
    return hasattr(value, "get_seq_length")


def mask_padding(module: nn.Module, tokenization: Tokenization) -> nn.Module:
    """The module, which from now on masks padding by itself if it takes an ``attention_mask``. In place."""
    field = "num_labels" if tokenization.task == "token" else "vocab_size"
    n_outputs = getattr(getattr(module, "config", None), field, MAX_OUTPUT_VALUES)
    n_answers = 0 if tokenization.task == "sequence" else max(8, MAX_OUTPUT_VALUES // int(n_outputs))
    takes = inspect.signature(type(module).forward).parameters
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, PaddingMask):
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    if "attention_mask" in takes:
        # Prepended: what else looks at the call sees the mask.
        mask = PaddingMask(tokenization.padding, n_answers, "use_cache" in takes)
        module.register_forward_pre_hook(mask, prepend=True, with_kwargs=True)
    return module


def mask_of(module: nn.Module) -> PaddingMask | None:
    """The hook that :func:`mask_padding` registered, or None."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, PaddingMask)), None)


def carry_task(module: nn.Module, task: object) -> None:
    """Let a module and its later copies carry what it predicts, see :func:`ttmpd.models.run.predict`. In place."""
    module.__dict__["ttmpd_task"] = task


def carried_task(module: nn.Module) -> Any:
    """The task that :func:`carry_task` left, or None."""
    return module.__dict__.get("ttmpd_task")


def predicted_token_mask(module: nn.Module, batch: Tensor) -> Tensor | None:
    """(B, S) mask of the tokens whose predictions are used; None for a model with one prediction per sample.

    Padding is never among them. Of samples with more tokens than may be used, evenly spaced ones are.

    Args:
        module: the model.
        batch: (B, S) token ids, or anything else that the module takes.
    """
    if carried_task(module) is not None:
        tokens: Tensor | None = carried_task(module).predicted_tokens(batch)
        return tokens
    mask = mask_of(module)
    if mask is None or not mask.n_answers or batch.dim() != 2 or batch.is_floating_point():
        return None
    is_token = batch != mask.padding
    return is_token & _evenly_spaced(is_token, mask.n_answers)


def _evenly_spaced(is_token: Tensor, limit: int) -> Tensor:
    """(B, S) mask of up to ``limit`` tokens of each sample, evenly spaced: Bresenham's line from (0, 0) to (n, k).

    The token of rank r is taken where ``floor(r k / n)`` steps up: k of n in all.
    """
    n, rank = is_token.sum(1, keepdim=True), is_token.cumsum(1)
    k = n.clamp(max=limit)
    n = n.clamp_min(1)
    return rank * k // n > (rank - 1) * k // n


def prediction_offsets(module: nn.Module, inputs: Tensor) -> Tensor:
    """(N + 1,) offsets of each sample's predictions when those of all samples are concatenated.

    Args:
        module: the model.
        inputs: (N, ...) all samples.

    Example:
        >>> prediction_offsets(nn.Linear(2, 2), torch.zeros(3, 2)).tolist()
        [0, 1, 2, 3]
    """
    if carried_task(module) is not None:
        ends = carried_task(module).row_counts(inputs).cumsum(0)
        return torch.cat([torch.zeros(1, dtype=torch.long), ends])
    counts = predicted_token_mask(module, inputs)
    ends = torch.arange(1, len(inputs) + 1) if counts is None else counts.sum(1).cumsum(0).cpu()
    return torch.cat([torch.zeros(1, dtype=torch.long), ends])


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
