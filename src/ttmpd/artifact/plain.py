"""Records as plain data and back: what JSON files hold, checked against the types of the fields."""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

from ttmpd.errors import InvalidValueError

Plain = Union[None, bool, int, float, str, Sequence["Plain"], Mapping[str, "Plain"]]  # noqa: UP007 (recursive)
"""What JSON can hold."""

_T = TypeVar("_T")


def to_plain(value: object) -> Any:
    """The value as strict JSON allows it: records as objects, tuples as lists, NaN and infinity as null.

    Characters that are no Unicode, as file names may have, become question marks; whatever else is no plain data
    becomes text.

    Example:
        >>> to_plain({"ms": (1.5, float("nan"))})
        {'ms': [1.5, None]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_text(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real):  # NumPy's too
        return int(value) if isinstance(value, numbers.Integral) else float(value) if math.isfinite(value) else None
    return _text(value)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()


def from_plain(kind: type[_T], value: object, where: str = "") -> _T:
    """The record that :func:`to_plain` described; null in the place of a number is NaN.

    Args:
        kind: a frozen dataclass, each field of which is a number, text, another record, or a tuple or mapping of them.
        value: plain data.
        where: path of the value in the file, for messages.

    Raises:
        InvalidValueError: a key is missing or unknown, or a value has another type; the message names its path.

    Example:
        >>> from ttmpd.latency.timing import Timing
        >>> from_plain(Timing, {"median_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "n_rounds": 5}).low_ms
        1.0
    """
    return typing.cast(_T, _value(kind, value, where))


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _optional(arguments, value, where)
    if origin is typing.Literal:
        return _checked(value in arguments, f"one of {', '.join(map(str, arguments))}", value, where)
    if origin is tuple:
        return _items(arguments, value, where)
    if origin is Mapping:
        _checked(isinstance(value, dict), "an object", value, where)
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    return _scalar(kind, value, where)


def _checked(holds: bool, rule: str, value: Any, where: str) -> Any:
    if not holds:
        raise InvalidValueError(f"{where.lstrip('.') or 'it'} must be {rule}, but is {str(value)[:60]!r}")
    return value


def _optional(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """A value of ``X | None``; anything for a union of more kinds, which only plain data have."""
    others = [kind for kind in kinds if kind is not types.NoneType]
    return None if value is None else _value(others[0], value, where) if len(others) == 1 else value


def _items(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple of any length, or of one kind for each place."""
    _checked(isinstance(value, list), "a list", value, where)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    _checked(len(kinds) == len(value), f"a list of {len(kinds)}", value, where)
    return tuple(
        _value(kind, item, f"{where}[{place}]") for place, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _record(kind: Any, value: Any, where: str) -> Any:
    _checked(isinstance(value, dict), "an object", value, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    # What has a default may have come later than the file.
    missing = [name for name, field in fields.items() if name not in value and _is_required(field)]
    unknown = sorted(set(value) - set(fields))
    if missing or unknown:
        words = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise InvalidValueError(f"{where.lstrip('.') or 'it'} must have the keys of {kind.__name__}, but "
                                f"{' and '.join(words)}")  # fmt: skip
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value[name], f"{where}.{name}") for name in fields if name in value})


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        _checked(is_number, "a number", value, where)
        return math.nan if value is None else float(value)
    is_kind = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return _checked(is_kind, {int: "a whole number", str: "text", bool: "true or false"}[kind], value, where)
