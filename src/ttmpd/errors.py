"""The error tree of ``ttmpd``: *thing* must *rule*, but got *value*; then the next step.

TTMPDError
├── InvalidValueError (ValueError)      a value breaks a stated rule
├── UnsupportedError                    this method cannot treat this model or unit
├── BudgetUnreachableError              no plan meets the budget; ``.best_ms`` is the fastest that is reachable
├── UnknownMethodError (LookupError)    no such file; ``.choices`` lists those that exist
├── MissingPackageError (ImportError)   an optional package is absent; names the extra
├── SamplesError                        nothing usable at that place; what was skipped and why
├── ModelError                          the model cannot be opened, run, or answers with NaN
└── CheckpointError                     file broken, other format, or other model
"""

from collections.abc import Sequence


class TTMPDError(Exception):
    """Root of all errors that ``ttmpd`` raises on purpose."""


class InvalidValueError(TTMPDError, ValueError):
    """A value breaks a stated rule."""


class UnsupportedError(TTMPDError):
    """A method cannot treat this model or this unit."""


class BudgetUnreachableError(TTMPDError):
    """No plan meets the budget.

    Args:
        message: the rule, the value and the next step.
        best_ms: the lowest predicted latency that any plan reaches, in milliseconds.
    """

    def __init__(self, message: str, best_ms: float) -> None:
        super().__init__(message)
        self.best_ms = best_ms


class UnknownMethodError(TTMPDError, LookupError):
    """A method was asked for by a name that no file bears.

    Args:
        message: the name and the verb.
        choices: the names that exist.
    """

    def __init__(self, message: str, choices: Sequence[str]) -> None:
        super().__init__(message)
        self.choices = tuple(choices)


class MissingPackageError(TTMPDError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class SamplesError(TTMPDError):
    """No usable samples at the given place; the message lists what was skipped and why.

    Args:
        message: the rule, the value and the next step.
        skipped: (name, reason) of what could not be used.
    """

    def __init__(self, message: str, skipped: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.skipped = tuple(skipped)


class ModelError(TTMPDError):
    """A model cannot be opened, cannot be run on the samples, or answers with values that are not finite."""


class CheckpointError(TTMPDError):
    """An artifact is broken, has another format, or belongs to another model."""


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def cause(error: BaseException) -> str:
    """The error's type and first line, for messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
