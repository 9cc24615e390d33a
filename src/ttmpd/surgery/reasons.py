"""Why something that looks like a unit cannot be removed."""

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why something that looks like a unit cannot be removed; the value is the sentence, behind the path."""

    NO_TENSOR = "is not a function of one tensor"
    CALLED_AGAIN = "is called more than once in one pass"
    OTHER_SHAPE = "changes the shape"
    GATE = "only scales its input"
    NO_SHORTCUT = "has no shortcut around it"
    WRITES_INPUT = "writes into its input"
    OUTPUT_WRITTEN = "its output is written into by what follows"
    NEEDED = "the model does not run without it"
    DEPENDENT = "what it computes depends on all of its members"
    FUSED_HEADS = "computes with all heads at once"
    HIDDEN_LAYERS = "computes with the weights of its layers without calling them"
    MIXED_SAMPLES = "samples must come first in its output"
    FEEDS_NOTHING = "feeds nothing that the model predicts"
    FEEDS_UNPREDICTED = "feeds only outputs that the task does not predict"
    OVERLAPS = "shares layers with another unit, and neither holds all of the other"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reason, and what in particular was met."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value
