"""What the benchmarks share: where data lie, finished rows on disk, the table, the machine's name."""

import csv
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttmpd.latency.device import machine
from ttmpd.latency.memory import keep_freed_memory
from ttmpd.storage import replacing

keep_freed_memory()  # as the commands do

ROOT = Path(__file__).resolve().parent
DATA = Path(os.environ.get("TTMPD_DATA", ROOT.parent.parent / "shared" / "data"))
RESULTS = ROOT / "results"
CACHE = Path(os.environ.get("TTMPD_CACHE", ROOT / ".cache"))


def require_data(*names: str) -> None:
    """Leave with the next step when the data are not there."""
    missing = [name for name in names if not (DATA / name).exists()]
    if missing:
        sys.exit(f"TTMPD_DATA must point to a folder with {', '.join(missing)}, but got {DATA}")


def cifar(name: str = "cifar10_jpeg") -> tuple[np.ndarray, np.ndarray]:
    """(pixels, labels) of a CIFAR-10 test set."""
    with np.load(DATA / name / "test.npz") as file:
        return file["x"], file["y"]


def commit_of(checkout: Path) -> str:
    """The commit that is checked out, short."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stamp() -> dict[str, Any]:
    """Machine, threads and date, to stand beside a row."""
    here = machine("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"threads": here.threads, "torch": here.torch, "freed_memory": here.freed_memory}
    return versions | {"machine": here.device, "date": datetime.date.today().isoformat()}


def cached(key: str, compute: Callable[[], Any], *, stamped: bool = False) -> Any:
    """A finished row from disk, or a new one: long runs resume.

    ``stamped``: a row, or each of several, keeps the stamp of when it was computed, not of when the table was written.
    """
    path = CACHE / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    data = compute()
    if stamped:
        data = [row | stamp() for row in data] if isinstance(data, list) else data | stamp()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(data))
    return data


def earlier(name: str) -> list[dict[str, Any]]:
    """The rows of the table that is there; everything in them is text."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_earlier(name: str, rows: Sequence[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """The rows, and those of the table that is there which differ from all of them in what ``by`` names.

    What another machine measured stays, with its stamp, until it is measured again.
    """
    here = {tuple(str(row[key]) for key in by) for row in rows}
    return [*rows, *(row for row in earlier(name) if tuple(row[key] for key in by) not in here)]


def write_csv(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the rows, each with its stamp."""
    RESULTS.mkdir(exist_ok=True)
    own = stamp()
    path = RESULTS / name
    columns = list(dict.fromkeys(key for row in rows for key in [*row, *own]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(own | row for row in rows)
    return path
