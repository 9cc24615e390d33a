"""Bodies that come slowly, in part or not at all: they take no place from others, and none is answered as if whole."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2 as httpx
import numpy as np
import pytest
import uvicorn

from server_requests import PIXELS, begin, image, npy
from ttmpd.serving.requests import Limits
from ttmpd.serving.server import create_app
from ttmpd.serving.service import OnlineService
from ttmpd.testing.tiny_models import tiny_model

LIMITS = Limits(max_bytes=200_000, max_batch=4, running=2, waiting=2, body_seconds=20.0, arriving_bytes=400_000)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server in a thread of its own, as ``ttmpd serve`` runs it."""
    model = tiny_model()
    model.pretrained_cfg = PIXELS.to_dict()
    service = OnlineService(model, speedup=1.5, worker=begin, poll_seconds=float("inf"))
    server = uvicorn.Server(uvicorn.Config(create_app(service, LIMITS), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def head(length: int, kind: str = "application/x-npy") -> bytes:
    lines = ("POST /predict HTTP/1.1", "host: x", f"content-type: {kind}", f"content-length: {length}", "", "")
    return "\r\n".join(lines).encode()


def connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    return connection


def answer_to(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
        if b"\r\n\r\n" in received and received.rstrip().endswith(b"}"):
            break
    return received


def good(port: int) -> httpx.Response:
    body = npy(np.zeros((1, 3, 8, 8), np.float32))
    return httpx.post(f"http://127.0.0.1:{port}/predict", content=body, headers={"content-type": "application/x-npy"})


def status_counts(port: int) -> dict[str, float]:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("ttmpd_responses_total{")]
    return {name.split('"')[1]: float(value) for name, value in pairs}


def test_slow_bodies_take_no_place(port):
    with ExitStack() as stack:
        for _ in range(34):
            slow = stack.enter_context(connected(port))
            slow.sendall(head(1000) + b"x" * 10)
        assert [good(port).status_code for _ in range(20)] == [200] * 20


def test_the_oldest_body_gives_way_where_there_is_no_room(port):
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(port)) for _ in range(3)]
        for connection in slow:
            connection.sendall(head(199_000) + b"x" * 150_000)
            time.sleep(0.2)
        assert good(port).status_code == 200
        assert b" 503 " in answer_to(slow[0]).splitlines()[0]


def test_a_client_that_goes_away_is_no_failure(port):
    for ending in (socket.SHUT_WR, socket.SHUT_RDWR):
        with connected(port) as connection:
            connection.sendall(head(1000) + b"x" * 10)
            connection.shutdown(ending)
    time.sleep(0.3)
    assert good(port).status_code == 200
    assert "500" not in status_counts(port)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_gets_its_answer(port, chunked):
    body = b"x" * 600_000
    content = iter([body[:300_000], body[300_000:]]) if chunked else body
    response = httpx.post(f"http://127.0.0.1:{port}/predict", content=content, headers={"content-type": "image/png"})
    assert response.status_code == 413
    assert "at most 200000 bytes" in response.json()["error"]


def test_no_cut_of_a_form_is_answered(port):
    files = [("file", (f"{i}.png", image(seed=i), "image/png")) for i in range(3)]
    request = httpx.Request("POST", f"http://127.0.0.1:{port}/predict", files=files)
    body, kind = request.read(), request.headers["content-type"]
    with httpx.Client() as client:
        cuts = sorted({*range(0, len(body) - 2, 7), *range(len(body) - 80, len(body) - 2)})
        for cut in cuts:  # the last two bytes are the end of a line, which says nothing
            response = client.post(request.url, content=body[:cut], headers={"content-type": kind})
            assert response.status_code == 400, (cut, response.text)
        assert len(client.post(request.url, content=body, headers={"content-type": kind}).json()["answers"]) == 3


def test_pixels_of_a_request_are_counted_together():
    from ttmpd.errors import InvalidValueError
    from ttmpd.serving.requests import from_images

    limits = Limits(max_pixels=150)
    assert from_images([image(), image()], PIXELS, limits).shape[0] == 2
    with pytest.raises(InvalidValueError, match="at most 150 pixels together, but have 192"):
        from_images([image()] * 3, PIXELS, limits)
