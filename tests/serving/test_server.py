"""Requests in every form, their limits, and what the server tells; the service is real, its worker is not."""

import io
import json
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from ttmpd.cli import app as cli
from ttmpd.data.preprocessing import Preprocessing
from ttmpd.errors import InvalidValueError
from ttmpd.models.opened import OpenedModel
from ttmpd.serving.metrics import Metrics
from ttmpd.serving.requests import Limits, from_npy
from ttmpd.serving.server import create_app
from ttmpd.serving.service import OnlineService
from ttmpd.serving.worker import JobInputs, Outcome, Progress
from ttmpd.testing.tiny_models import TinyNet, tiny_model

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


def image(size: tuple[int, int] = (8, 8), kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def headed(header: str, values: bytes) -> bytes:
    """A .npy file with any header."""
    line = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + values


def post(client: TestClient, body: bytes, kind: str, query: str = "") -> Any:
    return client.post(f"/predict{query}", content=body, headers={"content-type": kind})


def problem(response: Any, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "next"}
    assert body["error"] and body["next"]
    for word in words:
        assert word in body["error"], body


# ------------------------------------------------------------------------------------------------------------- predict


def test_json_inputs_are_answered_with_scores_top_and_names(client, net):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    answer = client.post("/predict?top=2", json={"inputs": x.tolist()}).json()
    assert answer["answered_by"] == "source"
    logits = net(x).detach()
    for row, found in zip(logits, answer["answers"], strict=True):
        assert torch.allclose(torch.tensor(found["scores"]), row, atol=1e-5)
        assert found["class"] == int(row.argmax())
        assert found["name"] == NAMES[int(row.argmax())]
        assert len(found["top"]) == 2
        assert found["probability"] == pytest.approx(float(row.softmax(-1).max()), abs=1e-5)


def test_one_sample_needs_no_batch_axis_and_scores_can_be_left_out(client):
    answer = client.post("/predict?scores=false&top=9", json={"inputs": torch.zeros(3, 8, 8).tolist()}).json()
    assert len(answer["answers"]) == 1
    assert "scores" not in answer["answers"][0]
    assert len(answer["answers"][0]["top"]) == 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_goes_through_the_models_own_preprocessing(client, net, kind):
    body = image((20, 12), kind)
    answer = post(client, body, f"image/{kind.lower()}").json()
    with Image.open(io.BytesIO(body)) as opened:
        pixels = PIXELS.pixels(opened)
    expected = net((pixels[None].float() / 255 - 0.5) / 0.25).detach()[0]
    assert torch.allclose(torch.tensor(answer["answers"][0]["scores"]), expected, atol=1e-5)


def test_several_images_come_as_a_form(client):
    files = [("file", (f"../../{n}.png", image(seed=n), "image/png")) for n in range(3)]
    answer = client.post("/predict", files=files).json()
    assert len(answer["answers"]) == 3
    alone = post(client, image(seed=1), "image/png").json()
    assert answer["answers"][1]["scores"] == pytest.approx(alone["answers"][0]["scores"], abs=1e-5)


def test_arrays_are_pixels_or_values(client, net):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    by_pixels = post(client, npy(pixels), "application/x-npy").json()
    values = (pixels.transpose(0, 3, 1, 2).astype(np.float64) / 255 - 0.5) / 0.25
    by_values = post(client, npy(np.asfortranarray(values)), "application/octet-stream").json()
    for one, other in zip(by_pixels["answers"], by_values["answers"], strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_what_is_answered_is_collected(client, service):
    client.post("/predict", json={"inputs": torch.zeros(3, 3, 8, 8).tolist()})
    assert client.get("/state").json()["n_collected"] == 3
    assert service.state()["n_seen"] == 3


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


def test_what_the_model_says_about_its_inputs_is_handed_on(net):
    opened = OpenedModel(net, "", False)
    with (
        OnlineService(opened, speedup=1.5, worker=begin, poll_seconds=math.inf) as service,
        TestClient(create_app(service)) as client,
    ):
        problem(
            client.post("/predict", json={"inputs": [[1.0, 2.0]]}), 422, "the model must be able to take the inputs"
        )
        problem(post(client, image(), "image/png"), 422, "must say how it wants them")


def test_an_unexpected_error_tells_nothing_of_the_inside(service, monkeypatch):
    monkeypatch.setattr(service, "answer", lambda _: {}["secret"])
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        response = client.post("/predict", json={"inputs": torch.zeros(3, 8, 8).tolist()})
        assert 'ttmpd_responses_total{status="500"} 1.0' in client.get("/metrics").text
    problem(response, 500, "the server failed")
    assert "secret" not in response.text


def test_arrays_for_a_model_without_preprocessing_have_limits_too():
    with pytest.raises(InvalidValueError, match="1 to 2 samples"):
        from_npy(npy(np.zeros((3, 4), np.float32)), None, Limits(max_batch=2))


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_opens_the_model_and_serves_it(monkeypatch):
    seen: dict[str, Any] = {}

    def serve(service: OnlineService, **given: Any) -> None:
        seen.update(given, by=service.answer(torch.zeros(1, 1, 8, 8)).by, state=service.state(), service=service)

    monkeypatch.setattr("ttmpd.serving.server.serve", serve)
    arguments = (
        "serve",
        "--model",
        "ttmpd.demo:demo_model",
        "--speedup",
        "1.5",
        "--num-samples",
        "20",
        "--device",
        "cpu",
    )
    found = CliRunner().invoke(cli.app, [*arguments, "--port", "8123", "--max-mb", "2", "--max-batch", "3"])
    assert found.exit_code == 0, found.output
    assert "http://127.0.0.1:8123" in found.output
    assert (seen["host"], seen["port"], seen["by"]) == ("127.0.0.1", 8123, "source")
    assert (seen["limits"].max_bytes, seen["limits"].max_batch) == (2 << 20, 3)
    assert (seen["state"]["n_wanted"], seen["service"].state()["phase"]) == (20, "closed")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "exactly one of --speedup and --latency"),
        (("--speedup", "2", "--latency", "0.5x"), 2, "exactly one of"),
        (("--speedup", "0.5"), 1, "speedup must be greater than 1"),
        (("--speedup", "2", "--worker", "fiber"), 1, "worker must be process or thread"),
    ],
)
def test_the_command_explains_wrong_values(arguments, code, message):
    found = CliRunner().invoke(cli.app, ["serve", "--model", "ttmpd.demo:demo_model", *arguments])
    assert found.exit_code == code
    assert message in " ".join((found.stdout + found.stderr).replace("│", " ").split())


def test_the_command_warns_of_an_open_address(monkeypatch):
    monkeypatch.setattr("ttmpd.serving.server.serve", lambda *_, **__: None)
    arguments = ["serve", "--model", "ttmpd.demo:demo_model", "--speedup", "2", "--host", "0.0.0.0"]
    assert "Anyone who can reach 0.0.0.0" in CliRunner().invoke(cli.app, arguments).stderr


# --------------------------------------------------------------------------------------------------------------- views


def test_state_and_health(client, service):
    assert client.get("/state").json()["phase"] == "collecting"
    assert client.get("/health").json() == {"live": True, "ready": True, "phase": "collecting"}
    service.close()
    response = client.get("/health")
    assert (response.status_code, response.json()["ready"]) == (503, False)


def test_the_report_is_there_once_there_is_a_student(client, service, tmp_path, monkeypatch):
    problem(client.get("/report"), 404, "there must be a student to report on, but the service is collecting")
    (tmp_path / "report.html").write_text("<p>fast</p>")
    monkeypatch.setattr(type(service), "artifact", property(lambda _: Path(tmp_path)))
    response = client.get("/report")
    assert response.text == "<p>fast</p>"
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_metrics_count_what_was_answered_and_refused(client):
    client.post("/predict", json={"inputs": torch.zeros(3, 3, 8, 8).tolist()})
    post(client, b"", "image/png")
    post(client, b"x" * 20_001, "image/png")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    for line in (
        'ttmpd_responses_total{status="200"} 1.0',
        'ttmpd_responses_total{status="413"} 1.0',
        'ttmpd_responses_total{status="422"} 1.0',
        'ttmpd_samples_total{by="source"} 3.0',
        'ttmpd_answer_seconds_bucket{le="+Inf"} 1.0',
        "ttmpd_answer_seconds_count 1.0",
        'ttmpd_phase{phase="collecting"} 1.0',
        'ttmpd_phase{phase="serving"} 0.0',
        "ttmpd_collected_samples 3.0",
    ):
        assert line in lines, response.text
    assert all(line.startswith(("#", "ttmpd_")) for line in lines)


def test_buckets_of_the_histogram_add_up():
    metrics = Metrics()
    for seconds in (0.0005, 0.001, 0.003, 100.0):
        metrics.answered("student", 1, seconds)
    text = metrics.text({})
    assert 'le="0.001"} 2.0' in text
    assert 'le="0.005"} 3.0' in text
    assert 'le="+Inf"} 4.0' in text


def test_shutting_down_closes_the_service(service):
    with TestClient(create_app(service)):
        assert service.state()["phase"] == "collecting"
    assert service.state()["phase"] == "closed"


def test_the_state_is_strict_json(client):
    json.loads(client.get("/state").text, parse_constant=lambda name: pytest.fail(name))
