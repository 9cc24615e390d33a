import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from ttmpd.artifact.plain import Plain, from_plain, to_plain
from ttmpd.errors import InvalidValueError


@dataclass(frozen=True)
class Inner:
    n: int
    ratio: float | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    values: tuple[float, ...]
    pair: tuple[str, int]
    inner: Inner | None
    inners: Mapping[str, Inner]
    settings: Mapping[str, Plain]
    flag: bool = False


FULL = Outer("x", "a", (1.0, 2.0), ("y", 3), Inner(1), {"z": Inner(2, 0.5)}, {"free": [1, {"a": None}]}, True)


def test_a_record_comes_back() -> None:
    assert from_plain(Outer, to_plain(FULL)) == FULL


def test_numbers_that_are_not_finite_are_null_and_come_back_as_nan() -> None:
    plain = to_plain(Outer("x", "a", (math.inf, math.nan), ("y", 3), None, {}, {}))
    assert plain["values"] == [None, None]
    assert all(map(math.isnan, from_plain(Outer, plain).values))


def test_what_numpy_counts_is_a_number() -> None:
    assert to_plain((np.int64(3), np.float32(0.5))) == [3, 0.5]
    assert to_plain({"half\udcff": object}) == {"half?": str(object)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name must be text, but is '3'"),
        ({"kind": "c"}, "kind must be one of a, b"),
        ({"values": 1.0}, "values must be a list"),
        ({"values": ["1"]}, r"values\[0\] must be a number"),
        ({"pair": ["y"]}, "pair must be a list of 2"),
        ({"inner": {"n": 1.5, "ratio": None}}, r"inner\.n must be a whole number"),
        ({"inner": {"n": True, "ratio": None}}, r"inner\.n must be a whole number"),
        ({"inner": {"ratio": 1.0}}, "inner must have the keys of Inner, but lacks n"),
        ({"inners": {"z": {"n": 1, "ratio": None, "more": 1}}}, r"inners\.z must have .* has unknown more"),
        ({"inners": []}, "inners must be an object"),
        ({"flag": 1}, "flag must be true or false"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        from_plain(Outer, to_plain(FULL) | change)
