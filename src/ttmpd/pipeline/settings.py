"""What defines a run: the target and everything else that a user may choose."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ttmpd.adapt.base import Adapter
from ttmpd.adapt.norm import Norm
from ttmpd.distill.base import Distiller
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import InvalidValueError
from ttmpd.method import check_fields, method_class, named, names
from ttmpd.pipeline import defaults
from ttmpd.plan.base import Planner
from ttmpd.plan.knapsack import Knapsack
from ttmpd.records import ACTIONS, Action
from ttmpd.runtimes.base import Runtime
from ttmpd.runtimes.eager import Eager
from ttmpd.score.base import Scorer
from ttmpd.score.ttmpd import TTMPD
from ttmpd.select.base import Selector
from ttmpd.select.random import Random
from ttmpd.surgery.find import default_kinds, kind_of, scope_of
from ttmpd.tasks.base import Task


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is asked for: a speedup, a share of the original latency, milliseconds per batch, or a share of the MACs.

    Example:
        >>> Target.parse("0.5x").budget_ms(30.0), Target.parse("12ms").budget_ms(30.0)
        (15.0, 12.0)
    """

    speedup: float | None = None
    ms: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.speedup, self.ms, self.macs)) != 1:
            raise InvalidValueError(
                "give exactly one target: a speedup, a latency, or a share of the MACs where a model is compressed"
            )
        for name, value in (("speedup", self.speedup), ("latency", self.ms), ("macs", self.macs)):
            if value is not None and not isinstance(value, int | float):
                raise InvalidValueError(f"{name} must be a number, but got {value!r}")
        if self.macs is not None and not 0 < self.macs < 1:
            raise InvalidValueError(f"a share of the MACs must lie between 0 and 1, but got {self.macs!r}")
        if self.speedup is not None and not (math.isfinite(self.speedup) and self.speedup > 1):
            raise InvalidValueError(f"speedup must be greater than 1, but got {self.speedup!r}")
        if self.ms is not None and not (math.isfinite(self.ms) and self.ms > 0):
            raise InvalidValueError(f"latency must be greater than 0 ms, but got {self.ms!r}")

    @classmethod
    def of(
        cls, speedup: float | None = None, latency: str | float | None = None, macs: str | float | None = None
    ) -> "Target":
        """The one target that was given.

        Raises:
            InvalidValueError: none was, or several, or it is out of range.
        """
        if sum(value is not None for value in (speedup, latency, macs)) != 1:
            raise InvalidValueError(
                "give exactly one target: a speedup, a latency, or a share of the MACs where a model is compressed"
            )
        if latency is not None:
            return cls.parse(latency)
        return cls(speedup=speedup) if macs is None else cls(macs=_share(macs))

    @classmethod
    def parse(cls, text: str | float) -> "Target":
        """From ``"12ms"``, ``"0.5x"`` (a share of the original latency) or a number of milliseconds."""
        value, scale = str(text).strip().lower(), "ms"
        for suffix in ("ms", "x"):
            if value.endswith(suffix):
                value, scale = value.removesuffix(suffix).strip(), suffix
                break
        try:
            number = float(value)
        except ValueError:
            raise InvalidValueError(f'latency must be like "12ms" or "0.5x", but got {text!r}') from None
        if scale == "x" and not 0 < number < 1:
            raise InvalidValueError(f"a share of the latency must lie between 0x and 1x, but got {text!r}")
        return cls(speedup=1 / number) if scale == "x" else cls(ms=number)

    def budget_ms(self, original_ms: float) -> float:
        """The latency to reach, in milliseconds; 0 where operations are counted instead."""
        return original_ms / self.speedup if self.speedup is not None else float(self.ms or 0.0)

    def __str__(self) -> str:
        if self.macs is not None:
            return f"{self.macs:.4g} of the MACs"
        return f"speedup {self.speedup:.4g}" if self.speedup is not None else f"latency {self.ms:.4g} ms"


def _share(text: str | float) -> float:
    """0.7 from "0.7x", "0.7" or 0.7."""
    try:
        return float(str(text).strip().lower().removesuffix("x"))
    except ValueError:
        raise InvalidValueError(f'macs must be like "0.7x", but got {text!r}') from None


DEFAULT_UNITS = default_kinds()
"""What is looked for where nothing else is asked for: names of files in ``ttmpd/surgery/units``."""


def check_kinds(units: Sequence[str]) -> None:
    """Raise :class:`InvalidValueError` unless the units are one or more of those there are, or of a user's own."""
    kinds = names("units")
    if not units or not {name for name in units if ":" not in name} <= set(kinds):
        raise InvalidValueError(f"units must be some of {', '.join(kinds)}, but got {units!r}")
    for name in units:
        method_class("units", name)


def judged_kinds(units: Sequence[str], score: Scorer) -> list[str]:
    """Names of those kinds of units that a scorer judges."""
    return [name for name in units if scope_of(kind_of(name)) in score.scopes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that defines a run beside the model, the samples and the target."""

    select: Selector = Random()
    adapt: Adapter = Norm()
    score: Scorer = TTMPD()
    plan: Planner = Knapsack()
    distill: Distiller = OneTime()
    runtime: Runtime = Eager()
    """Runs the whole models whose latency is measured."""
    task: Task | None = None
    """What the model predicts; None detects it from the model, see :mod:`ttmpd.tasks.base`."""
    units: tuple[str, ...] = DEFAULT_UNITS
    """What may be removed: names of files in ``ttmpd/surgery/units``; of them, what the scorer can judge."""
    actions: tuple[Action, ...] = ACTIONS
    lossless: bool = True
    """Take first what makes the model faster and leaves its answers as they are: see :mod:`ttmpd.surgery.lossless`."""
    num_samples: int = defaults.NUM_SAMPLES
    pool: int = defaults.POOL
    """How many samples are looked at to choose ``num_samples``; a random choice looks at none."""
    holdout: float = defaults.HOLDOUT
    batch_size: int = defaults.BATCH_SIZE
    device: str = defaults.DEVICE
    seed: int = defaults.SEED
    amp: str = defaults.AMP
    time_budget: float = math.inf

    def __post_init__(self) -> None:
        check_fields(self, num_samples=1, pool=1, holdout=(0.0, 0.9), batch_size=1, time_budget=0.0)
        if not self.actions or not set(self.actions) <= set(ACTIONS):
            raise InvalidValueError(f"actions must be some of {', '.join(ACTIONS)}, but got {self.actions!r}")
        check_kinds(self.units)
        if not judged_kinds(self.units, self.score):
            raise InvalidValueError(
                f"score {self.score.name} must know one of the units, but judges {' and '.join(self.score.scopes)} "
                f"units and got {self.units!r}; choose another scorer or other units"
            )
        if self.amp not in ("auto", "on", "off"):
            raise InvalidValueError(f"amp must be auto, on or off, but got {self.amp!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: methods under their verbs."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            plain[item.name] = value.to_dict() if hasattr(value, "to_dict") else value
        plain["actions"] = list(self.actions)
        plain["units"] = list(self.units)
        plain["time_budget"] = self.time_budget if math.isfinite(self.time_budget) else None
        return plain


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """Settings from keyword arguments, with a clear error for unknown ones; methods, and one kind of unit, by name."""
    fields = {item.name for item in dataclasses.fields(Settings)}
    for name in arguments:
        if name not in fields:
            raise InvalidValueError(f"a setting must be one of {', '.join(sorted(fields))}, but got {name!r}")
    values = named(arguments)
    if isinstance(values.get("units"), str):
        values["units"] = (values["units"],)
    return Settings(**values)
