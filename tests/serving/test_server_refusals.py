"""Requests that are too large, broken or of another form are refused, and nothing brings the server down."""

import io
import json
import math
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from server_requests import image, npy, post, problem
from ttmpd.errors import InvalidValueError
from ttmpd.serving.requests import Limits
from ttmpd.serving.server import create_app


def headed(header: str, values: bytes) -> bytes:
    """A .npy file with any header."""
    line = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + values


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_body_that_says_it_is_too_large_is_not_read(client):
    problem(post(client, b"x" * 20_001, "image/png"), 413, "at most 20000 bytes")


def test_a_body_that_grows_too_large_is_cut_off(client):
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    for kind in ("image/png", "application/json", "multipart/form-data; boundary=b"):
        problem(client.post("/predict", content=chunks(), headers={"content-type": kind}), 413, "at most 20000")


def test_too_many_samples_are_refused(client):
    problem(client.post("/predict", json={"inputs": [[[[0.0]]]] * 5}), 422, "1 to 4 samples, but holds 5")
    problem(post(client, npy(np.zeros((5, 3, 8, 8), np.float16)), "application/x-npy"), 422, "1 to 4 samples")
    files = [("file", ("a.png", image(), "image/png"))] * 5
    problem(client.post("/predict", files=files), 422, "at most 4 files")
    problem(client.post("/predict", files=[("x", (None, "text"))]), 422, "holds 0")


def test_an_image_of_too_many_pixels_is_not_decoded(client):
    file = io.BytesIO()
    Image.new("1", (4000, 4000)).save(file, "PNG")
    problem(post(client, file.getvalue(), "image/png"), 422, "at most 10000 pixels", "4000x4000")


def test_an_array_that_claims_more_than_it_holds_is_not_allocated(client):
    body = npy(np.zeros((1, 3, 8, 8), np.float32)).replace(b"(1, 3, 8, 8)", b"(9999999999,)")
    problem(post(client, body, "application/x-npy"), 422, "must hold")


def test_pickled_arrays_are_refused(client):
    body = io.BytesIO()
    np.save(body, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    problem(post(client, body.getvalue(), "application/x-npy"), 422, "must hold uint8 pixels or floating values")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"inputs": 3}',
        b'{"inputs": "photos/"}',
        b'{"inputs": []}',
        b'{"inputs": [[]]}',
        b'{"inputs": [[1, 2], [3]]}',
        b'{"inputs": [[NaN, 1]]}',
        b'{"inputs": [[1e999, 1]]}',
        b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"inputs": [[[[1]]]]}',
        b"\xff\xfe",
        b'{"inputs": [[' + b"9" * 5000 + b"]]}",
    ],
)
def test_broken_json_is_explained(client, body):
    problem(post(client, body, "application/json"), 422)


@pytest.mark.parametrize("body", [b"", b"GIF89a", image()[:60], b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_broken_images_are_explained(client, body):
    problem(post(client, body, "image/png"), 422, "an image must be")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        npy(np.zeros(3)),
        npy(np.float32(1.0)),
        npy(np.zeros((1, 3, 8, 8), np.longdouble)),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 192", b""),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -192), }", bytes(4 * 2 * 192)),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 192), }", bytes(4 * 192)),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 70 + "), }", bytes(4)),
        headed("{[]: 1}", b""),
        headed("-" * 9000 + "1", b""),
    ],
)
def test_broken_arrays_are_explained(client, body):
    problem(post(client, body, "application/x-npy"), 422)


def test_arrays_of_other_sizes_and_values_are_refused(client):
    problem(post(client, npy(np.zeros((1, 3, 9, 9), np.float32)), "application/x-npy"), 422, "must have the shape")
    problem(post(client, npy(np.full((1, 3, 8, 8), np.inf)), "application/x-npy"), 422, "holds NaN or infinite")
    problem(post(client, npy(np.zeros((1, 3, 8, 8), np.int64)), "application/x-npy"), 422, "but holds int64")


def test_other_types_paths_and_queries_are_refused(client):
    problem(post(client, b"/etc/passwd", "text/plain"), 415, "the content type must be one of")
    problem(client.post("/predict"), 415)
    problem(client.post("/predict?top=0", json={"inputs": [[1.0]]}), 422, "top")
    problem(client.get("/nothing"), 404)
    problem(client.get("/predict"), 405)


PARTS = (
    *(b"NaN", b"-Infinity", b"1e999", b"null", b'"../../etc/passwd"', b"[[[", b"]", b"{}"),
    *(b"\x00", b"\xff\xfe", b"9" * 400),
)
TYPES = (
    *("image/png", "image/jpeg", "application/x-npy", "application/octet-stream", "application/json", "text/plain", ""),
    *("application/json; charset=utf-16", "multipart/form-data", "multipart/form-data; boundary=x", "../../x"),
)
QUERIES = ("", "", "", "?top=2", "?top=-1", "?top=many", "?scores=false", "?scores=%00", "?path=/etc/passwd")


def form(part: bytes) -> bytes:
    head = b'content-disposition: form-data; name="file"; filename="/etc/passwd"\r\ncontent-type: image/png'
    return b"--x\r\n" + head + b"\r\n\r\n" + part + b"\r\n--x--\r\n"


def garbage(draw: random.Random) -> tuple[bytes, str]:
    """A body that was right once, and a content type that often is that of another."""
    values = np.random.default_rng(draw.randrange(99)).random((1, 3, 8, 8), np.float32)
    right = [
        (image(seed=draw.randrange(99)), "image/png"),
        (image(kind="JPEG", seed=draw.randrange(99)), "image/jpeg"),
        (npy(values), "application/x-npy"),
        (npy((255 * values.transpose(0, 2, 3, 1)).astype(np.uint8)), "application/octet-stream"),
        (json.dumps({"inputs": values.round(2).tolist()}).encode(), "application/json"),
        (form(image()), "multipart/form-data; boundary=x"),
    ]
    (body, kind), (other, _) = draw.sample(right, 2)
    kind = draw.choice(TYPES) if draw.random() < 0.25 else kind
    for _ in range(draw.randint(1, 3)):
        a, b = sorted((draw.randrange(len(body) + 1), draw.randrange(len(body) + 1)))
        flipped = bytes([draw.randrange(256)])
        body = draw.choice([
            body[:a], body[a:], body[:a] + body[b:], body[:b] + body[a:], body[:a] + flipped + body[a + 1 :],
            body[:a] + draw.choice(PARTS) + body[a:], body[:a] + other[a:], draw.randbytes(b - a), body * 60,
        ])  # fmt: skip
    return body, kind


@pytest.mark.parametrize("seed", range(8))
def test_no_garbage_brings_it_down(client, seed):
    draw, statuses = random.Random(seed), set()
    before = post(client, image(), "image/png").json()
    for _ in range(320):
        body, kind = garbage(draw)
        response = post(client, body, kind, draw.choice(QUERIES))
        statuses.add(response.status_code)
        if response.status_code == 200:  # what is left of it may be right
            assert all(math.isfinite(answer["probability"]) for answer in response.json()["answers"])
        else:
            assert response.status_code in (400, 413, 415, 422), (response.status_code, response.text, kind, body[:99])
            problem(response, response.status_code)
    assert {200, 413, 415, 422} <= statuses
    assert post(client, image(), "image/png").json() == before
    assert client.get("/health").status_code == 200


def test_a_busy_server_turns_requests_away(service, monkeypatch):
    asked, go_on, true = threading.Event(), threading.Event(), service.answer

    def answer(batch: torch.Tensor) -> Any:
        asked.set()
        go_on.wait()
        return true(batch)

    monkeypatch.setattr(service, "answer", answer)
    body, found = {"inputs": torch.zeros(3, 8, 8).tolist()}, []
    with TestClient(create_app(service, Limits(running=1, waiting=0))) as client:
        first = threading.Thread(target=lambda: found.append(client.post("/predict", json=body)), daemon=True)
        first.start()
        try:
            assert asked.wait(120)
            response = client.post("/predict", json=body)
        finally:
            go_on.set()
            first.join()
    problem(response, 503, "busy")
    assert response.headers["retry-after"] == "1"
    assert [one.status_code for one in found] == [200]


def test_limits_out_of_range_are_refused():
    with pytest.raises(InvalidValueError, match="running must be"):
        Limits(running=0)
