"""The base of every method: a frozen set of hyper-parameters, found by its file name."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Self, dataclass_transform

from ttmpd.errors import InvalidValueError, UnknownMethodError, cause

VERBS = ("select", "adapt", "units", "score", "plan", "distill", "early_exit", "runtimes", "tasks")
_FOLDERS = {"units": "surgery.units"}
"""Verbs whose folder is not the room of their name."""
_SETTINGS = {verb: verb for verb in VERBS if verb != "units"} | {"runtime": "runtimes", "task": "tasks"}
"""Setting -> the verb whose methods it takes."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Method:
    """A frozen value with one verb; annotated fields are its hyper-parameters and every field has a default.

    A file ``ttmpd/<verb>/<name>.py`` holds one concrete method. Nothing is registered: adding the file adds the method.
    A method in your own code is named by its place, ``package.module:Class``, wherever a name is taken.
    """

    source: ClassVar[str] = ""
    """Paper and equation, and what differs here."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the method needs beyond forward passes: "gradients", "training", "labels"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True, eq=True)(cls)

    @property
    def name(self) -> str:
        """The name of the file that holds the method; ``package.module:Class`` for one in your own code."""
        cls = type(self)
        package, _, name = cls.__module__.rpartition(".")
        return name if package.partition(".")[0] == "ttmpd" else f"{cls.__module__}:{cls.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`from_dict` turns back into an equal method."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields}

    def with_settings(self, **settings: Any) -> Self:
        """A copy of the method with some hyper-parameters changed.

        Raises:
            InvalidValueError: a name is not a hyper-parameter of this method, or a value has the wrong type.
        """
        current = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        for key, value in settings.items():
            if key not in current:
                raise InvalidValueError(
                    f"a setting of {self.name} must be one of {', '.join(sorted(current)) or 'none'}, but got {key!r}"
                )
            settings[key] = _coerced(f"{self.name}.{key}", value, current[key])
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


def verb_of(method: type[Method]) -> str | None:
    """The verb whose base a method's class is derived from; None for a class that is no method of any verb."""
    bases = {f"ttmpd.{_FOLDERS.get(verb, verb)}.base": verb for verb in VERBS}
    return next((bases[cls.__module__] for cls in method.__mro__ if cls.__module__ in bases), None)


def method_class(verb: str, name: str) -> type[Method]:
    """The method class in the file ``ttmpd/<verb>/<name>.py``, or in your own code under ``package.module:Class``.

    Args:
        verb: what the method does.
        name: of the file; or the place of a class that is imported.

    Raises:
        UnknownMethodError: there is no such file, or no method of this verb in that place.
    """
    if ":" in name:
        return _own_class(verb, name, _imported(name))
    choices = names(verb)
    if name not in choices:
        raise UnknownMethodError(
            f"{verb} must be one of {', '.join(choices)}, or package.module:Class of your own, but got {name!r}",
            choices,
        )
    module = importlib.import_module(f"ttmpd.{_FOLDERS.get(verb, verb)}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UnknownMethodError(f"ttmpd/{verb}/{name}.py must hold one method, but holds {len(classes)}", choices)
    return classes[0]


def method_of(setting: str, name: str) -> Method:
    """The method with default hyper-parameters that a setting's value names: ``method_of("runtime", "eager")``.

    Args:
        setting: a field of the settings or of a recipe that takes a method.
        name: see :func:`method_class`.

    Raises:
        UnknownMethodError: no file bears the name.
    """
    return method_class(_SETTINGS[setting], name)()


def loaded_class(verb: str, name: str) -> type[Method]:
    """The class that :func:`method_class` returns, without importing a module of the user's own.

    For names read from files: a file must not be able to run code by naming it, so the user imports the module first.

    Raises:
        UnknownMethodError: no file bears the name, or the module is not imported yet.
    """
    if ":" not in name:
        return method_class(verb, name)
    module = name.partition(":")[0]
    if module not in sys.modules:
        raise UnknownMethodError(
            f"{name!r} must be imported before a file may name it, but is not; if you trust it: import {module}",
            names(verb),
        )
    return _own_class(verb, name, sys.modules[module])


def _imported(name: str) -> ModuleType:
    place = name.partition(":")[0]
    try:
        return importlib.import_module(place)
    except Exception as error:  # whatever the user's own code raises
        raise UnknownMethodError(
            f"the module of {name!r} must be importable, but raised {cause(error)}; install it or set PYTHONPATH", ()
        ) from error


def _own_class(verb: str, name: str, module: ModuleType) -> type[Method]:
    """The concrete method class of a verb that the user's own module holds under a name."""
    value: Any = module
    for part in name.partition(":")[2].split("."):
        value = inspect.getattr_static(value, part, None)  # runs no code, as a lazy module's would
    if not (inspect.isclass(value) and issubclass(value, Method) and verb_of(value) == verb):
        problem = "no such name" if value is None else f"{value!r}"
        base = f"ttmpd.{_FOLDERS.get(verb, verb)}.base"
        raise UnknownMethodError(f"{name!r} must be a class derived from that in {base}, but is {problem}", names(verb))
    if inspect.isabstract(value):
        missing = ", ".join(
            n for n, member in inspect.getmembers(value) if getattr(member, "__isabstractmethod__", False)
        )
        raise UnknownMethodError(f"{name!r} must define {missing}, but does not", names(verb))
    return value


def named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with each name of a method replaced by the method: ``adapt="tent"`` by ``adapt=Tent()``.

    Raises:
        UnknownMethodError: no file bears a name.
    """
    return {
        key: method_of(key, value) if key in _SETTINGS and isinstance(value, str) else value
        for key, value in settings.items()
    }


def from_dict(verb: str, data: dict[str, Any]) -> Method:
    """The method that :meth:`Method.to_dict` described.

    Raises:
        UnknownMethodError: no file bears the name.
        InvalidValueError: a setting is unknown or has the wrong type.
    """
    settings = dict(data)
    return method_class(verb, settings.pop("name"))().with_settings(**settings)


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """A hyper-parameter of a method, as ``--set VERB.NAME=VALUE`` takes it.

    Args:
        name: of the field.
        type: e.g. "int" or "tuple[int, ...]".
        default: as text.
        description: its first sentence.
    """

    name: str
    type: str
    default: str
    description: str


def parameters(verb: str, name: str) -> tuple[Parameter, ...]:
    """The hyper-parameters of a method, those of its bases first.

    Raises:
        UnknownMethodError: no file bears the name.

    Example:
        >>> [parameter.name for parameter in parameters("adapt", "none")]
        []
    """
    method = method_class(verb, name)
    descriptions: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        descriptions |= _descriptions(cls) if issubclass(cls, Method) else {}
    return tuple(
        Parameter(
            item.name, inspect.formatannotation(item.type), _text_of(item.default), descriptions.get(item.name, "")
        )
        for item in dataclasses.fields(method)  # type: ignore[arg-type]
    )


def _text_of(default: object) -> str:
    """A default as ``--set`` takes it."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _descriptions(cls: type) -> dict[str, str]:
    """The first sentence of the text below each field of a class, from its source."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError):  # a class that was made in an interpreter
        return {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    sentences = {}
    for field, text in itertools.pairwise(statements):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            sentences[field.target.id] = _first_sentence(str(text.value.value))
    return sentences


def _first_sentence(text: str) -> str:
    plain = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", plain)[0]


def matching(words: Sequence[str]) -> list[dict[str, str]]:
    """The rows of :func:`listing` of a verb, of a name, or of a verb and a name; all without either.

    Raises:
        UnknownMethodError: there is none.
    """
    rows = [row for row in listing() if set(words) <= {row["verb"], row["name"]}]
    if not rows:
        choices = tuple(dict.fromkeys(row["name"] for row in listing()))
        raise UnknownMethodError(
            f"a method must be given as VERB, NAME or VERB NAME, but got {' '.join(words)!r}; `ttmpd methods` lists "
            "them all",
            choices,
        )
    return rows


def listing() -> list[dict[str, str]]:
    """Every method of every verb, from the files, as rows with the keys verb, name, what, needs and source."""
    rows = []
    for verb in VERBS:
        for name in names(verb):
            method = method_class(verb, name)
            summary = (inspect.getdoc(method) or "").partition("\n")[0]
            rows.append(
                {"verb": verb, "name": name, "what": summary, "needs": ", ".join(method.needs), "source": method.source}
            )
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """The listing and the settings of every method as a page of the docs."""
    lines = ["# Methods", "", "Made by `ttmpd methods --markdown > docs/methods.md`; one file per method.", ""]
    lines += ["| verb | name | what | needs | source |", "|---|---|---|---|---|"]
    lines += [f"| `{r['verb']}` | `{r['name']}` | {r['what']} | {r['needs'] or '–'} | {r['source']} |" for r in rows]
    lines += ["", "## Settings", "", "What `--set VERB.FIELD=VALUE` takes; `ttmpd methods NAME` lists one method's."]
    for row in rows:
        lines += _settings_table(row["verb"], row["name"])
    return "\n".join(lines) + "\n"


def _settings_table(verb: str, name: str) -> list[str]:
    lines = []
    for item in parameters(verb, name):
        cells = (f"`{item.name}`", item.type, item.default or "–", item.description)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    heading = ["", f"### `{verb}` `{name}`", "", "| field | type | default | what |", "|---|---|---|---|"]
    return heading + lines if lines else []
