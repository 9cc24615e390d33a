"""Read ``report.json`` back into the record that was written."""

import json
from pathlib import Path
from typing import Any

from ttmpd.artifact.format_1_report import upgraded_report
from ttmpd.artifact.plain import from_plain
from ttmpd.artifact.report import REPORT
from ttmpd.artifact.run_report import FORMAT, RunReport
from ttmpd.errors import CheckpointError, InvalidValueError


def read_report(place: str | Path) -> RunReport:
    """What a run measured, from the ``report.json`` of its artifact.

    Reports of format 1 are read, too; what they do not say stays open.

    Args:
        place: the file, or the folder of the artifact.

    Raises:
        CheckpointError: the file is missing, broken, foreign or newer; the message says which, and what to do.

    Example:
        >>> import tempfile, torch, ttmpd
        >>> from ttmpd.testing.tiny_models import tiny_model
        >>> folder = tempfile.mkdtemp()
        >>> result = ttmpd.adapt_to(tiny_model(), torch.rand(40, 3, 8, 8), batch_size=8, output=folder)
        >>> report = read_report(folder)
        >>> report.kind, report.samples.n_fit
        ('adapted', 34)
    """
    path = Path(place).expanduser()
    path = path / REPORT if path.is_dir() else path
    data = _read_json(path)
    number = data.get("format") if isinstance(data, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise CheckpointError(f"{str(path)!r} must state its format, but does not: it is no report of ttmpd")
    if number > FORMAT:
        raise CheckpointError(
            f"the format of {str(path)!r} must be at most {FORMAT}, but is {number}: it was written by a newer ttmpd "
            f"({data.get('version', 'unknown')}); pip install --upgrade ttmpd"
        )
    try:
        data = upgraded_report(data) if number == 1 else data
        return from_plain(RunReport, {key: value for key, value in data.items() if key != "format"})
    except (InvalidValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{str(path)!r} must hold what a run measured, but is broken: {cause}; copy it again from the run"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"a report must be a file that ttmpd wrote, but {str(path)!r} does not exist; check the path"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} must be whole JSON, but is cut off or broken ({error}); copy it again from the run"
        ) from error
