"""The base of every method: a frozen set of hyper-parameters, found by its file name."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar, Self, dataclass_transform

from ttmpd.errors import InvalidValueError, UnknownMethodError

VERBS = ("select", "adapt", "units", "score", "plan", "distill", "early_exit")
_FOLDERS = {"units": "surgery.units"}
"""Verbs whose folder is not the room of their name."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Method:
    """A frozen value with one verb; annotated fields are its hyper-parameters and every field has a default.

    A file ``ttmpd/<verb>/<name>.py`` holds one concrete method. Nothing is registered: adding the file adds the method.
    """

    source: ClassVar[str] = ""
    """Paper and equation, and what differs here."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the method asks for beyond forward passes: "gradients", "training", "labels"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True, eq=True)(cls)

    @property
    def name(self) -> str:
        """The name of the file that holds the method."""
        return type(self).__module__.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`from_dict` turns back into an equal method."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields}

    def with_settings(self, **settings: Any) -> Self:
        """The same method with some hyper-parameters changed.

        Raises:
            InvalidValueError: a name is not a hyper-parameter of this method, or a value has the wrong type.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for key, value in settings.items():
            if key not in known:
                raise InvalidValueError(
                    f"a setting of {self.name} must be one of {sorted(known) or 'none'}, but got {key!r}"
                )
            settings[key] = _coerced(f"{self.name}.{key}", value, known[key])
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]


def _coerced(name: str, value: Any, default: Any) -> Any:
    """``value`` as the type of ``default``; text is parsed, since the command line gives text."""
    if isinstance(default, bool):
        if str(value).lower() in ("true", "1", "yes", "on"):
            return True
        if str(value).lower() in ("false", "0", "no", "off"):
            return False
        raise InvalidValueError(f"{name} must be true or false, but got {value!r}")
    try:
        if isinstance(default, tuple) and not isinstance(value, tuple):
            parts = value.split(",") if isinstance(value, str) else list(value)
            return tuple(type(default[0])(part) for part in parts) if default else tuple(parts)
        if isinstance(default, int | float | str):
            return type(default)(value)
    except (TypeError, ValueError):
        raise InvalidValueError(f"{name} must be a {type(default).__name__}, but got {value!r}") from None
    return value


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise :class:`InvalidValueError` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise InvalidValueError(f"{name} must be from {low:g} to {high:g}, but got {value!r}")


def check_fields(owner: object, **limits: float | tuple[float, float]) -> None:
    """:func:`check_range` of some fields of ``owner``: the least that each may be, or the least and the most."""
    prefix = f"{owner.name}." if isinstance(owner, Method) else ""
    for name, limit in limits.items():
        low, high = limit if isinstance(limit, tuple) else (limit, float("inf"))
        check_range(prefix + name, getattr(owner, name), low, high)


def names(verb: str) -> tuple[str, ...]:
    """The names of all methods of a verb, from the files of its folder; ``base`` and ``_name`` hold what they share."""
    package = importlib.import_module(f"ttmpd.{_FOLDERS.get(verb, verb)}")
    return tuple(
        sorted(
            m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base" and not m.name.startswith("_")
        )
    )


def method_class(verb: str, name: str) -> type[Method]:
    """The method class in the file ``ttmpd/<verb>/<name>.py``.

    Raises:
        UnknownMethodError: there is no such file.
    """
    known = names(verb)
    if name not in known:
        raise UnknownMethodError(f"{verb} must be one of {', '.join(known)}, but got {name!r}", known)
    module = importlib.import_module(f"ttmpd.{_FOLDERS.get(verb, verb)}.{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UnknownMethodError(f"ttmpd/{verb}/{name}.py must hold one method, but holds {len(found)}", known)
    return found[0]


def named(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, with the method in place of its name: ``adapt="tent"`` is ``adapt=Tent()``.

    Raises:
        UnknownMethodError: no file bears a name.
    """
    verbs = set(VERBS) - {"units"}
    return {
        key: method_class(key, value)() if key in verbs and isinstance(value, str) else value
        for key, value in given.items()
    }


def from_dict(verb: str, data: dict[str, Any]) -> Method:
    """The method that :meth:`Method.to_dict` described.

    Raises:
        UnknownMethodError: no file bears the name.
        InvalidValueError: a setting is unknown or has the wrong type.
    """
    settings = dict(data)
    return method_class(verb, settings.pop("name"))().with_settings(**settings)


def listing() -> list[dict[str, str]]:
    """Every method of every verb, from the files: verb, name, what, needs, source."""
    rows = []
    for verb in VERBS:
        for name in names(verb):
            found = method_class(verb, name)
            what = (inspect.getdoc(found) or "").partition("\n")[0]
            rows.append(
                {"verb": verb, "name": name, "what": what, "needs": ", ".join(found.needs), "source": found.source}
            )
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """The listing as a page of the docs."""
    lines = ["# Methods", "", "Made by `ttmpd methods --markdown > docs/methods.md`; one file per method.", ""]
    lines += ["| verb | name | what | needs | source |", "|---|---|---|---|---|"]
    lines += [f"| `{r['verb']}` | `{r['name']}` | {r['what']} | {r['needs'] or '–'} | {r['source']} |" for r in rows]
    return "\n".join(lines) + "\n"
