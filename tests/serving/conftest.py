"""Fixtures that the tests of serving share."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server_requests import LIMITS, NAMES, PIXELS, begin
from service_stage import Stage, made
from ttmpd.models.opened import OpenedModel
from ttmpd.serving import acceptance
from ttmpd.serving.server import create_app
from ttmpd.serving.service import OnlineService
from ttmpd.testing.tiny_models import TinyNet, tiny_model


@pytest.fixture
def net() -> TinyNet:
    return tiny_model()


@pytest.fixture
def service(net: TinyNet) -> Iterator[OnlineService]:
    opened = OpenedModel(net, "", False, PIXELS, NAMES)
    with OnlineService(opened, speedup=1.5, num_samples=16, worker=begin, poll_seconds=math.inf) as service:
        yield service


@pytest.fixture
def client(service: OnlineService) -> Iterator[TestClient]:
    with TestClient(create_app(service, LIMITS)) as client:
        yield client


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("made") / "artifact")


@pytest.fixture
def model() -> TinyNet:
    return tiny_model(n_blocks=4)


@pytest.fixture
def stage(artifact: Path, model: TinyNet) -> Iterator[Stage]:
    stage = Stage(artifact, model)
    yield stage
    stage.service.close()


@pytest.fixture
def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_speedup", lambda *_: 2.0)
