"""Checks of every method, whatever its verb."""

import copy
import json

from ttmpd.method import Method, from_dict, verb_of
from ttmpd.testing.tiny_models import require


def check_builds_bare(method: Method) -> None:
    """The class builds without arguments, and says where the method comes from."""
    require(isinstance(type(method)(), type(method)), "a method must build without arguments")
    require(bool(type(method).source), "a method must name its source")


def check_hashable(method: Method) -> None:
    """Equal methods have equal hashes."""
    require(hash(method) == hash(copy.copy(method)), "equal methods must have equal hashes")


def check_round_trip(method: Method) -> None:
    """A method comes back from its plain data, through JSON too."""
    verb = verb_of(type(method))
    require(verb is not None, "a method must be derived from the base of its verb")
    data = json.loads(json.dumps(method.to_dict(), allow_nan=False))
    rebuilt = from_dict(str(verb), data)
    require(rebuilt == method, f"a method must come back from {data!r}, but got {rebuilt!r}")


CHECKS = (
    check_builds_bare,
    check_hashable,
    check_round_trip,
)
