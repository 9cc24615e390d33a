"""Fixtures that the tests of artifact share."""

import shutil
from pathlib import Path

import pytest
from torch import nn

from saved_artifacts import DEMO, digits, save
from ttmpd.models.open import open_model


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An artifact of the demo's teacher, and its model."""
    return save(tmp_path_factory.mktemp("made") / "out", open_model(DEMO), digits())


@pytest.fixture
def artifact(made: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made[0], tmp_path / "artifact"))
