"""Save and load artifacts (being written)."""
from pathlib import Path
from typing import Any
def save_artifact(folder: Path, **kw: Any) -> Path:
    return folder
