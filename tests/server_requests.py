"""A worker that never ends, and requests to a server with their problem reports."""

import io
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from ttmpd.data.preprocessing import Preprocessing
from ttmpd.serving.requests import Limits
from ttmpd.serving.worker import JobInputs, Outcome, Progress

PIXELS = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
NAMES = ("ant", "bee", 'say "cat"', "dog")
LIMITS = Limits(max_bytes=20_000, max_batch=4, max_pixels=10_000, running=2, waiting=0)


class IdleWorker:
    kind = "process"

    def progress(self) -> Progress:
        return Progress()

    def outcome(self) -> Outcome | None:
        return None

    def stop(self) -> None:
        pass


def begin(_work: JobInputs, _kind: str) -> IdleWorker:
    return IdleWorker()


def image(size: tuple[int, int] = (8, 8), kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def post(client: TestClient, body: bytes, kind: str, query: str = "") -> Any:
    return client.post(f"/predict{query}", content=body, headers={"content-type": kind})


def problem(response: Any, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "next"}
    assert body["error"] and body["next"]
    for word in words:
        assert word in body["error"], body
