"""Requests in every form, their limits, and what the server tells; the service is real, its worker is not."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from server_requests import NAMES, PIXELS, begin, image, npy, post, problem
from ttmpd.cli import app as cli
from ttmpd.errors import InvalidValueError
from ttmpd.models.opened import OpenedModel
from ttmpd.serving.metrics import Metrics
from ttmpd.serving.requests import Limits, from_npy
from ttmpd.serving.server import create_app
from ttmpd.serving.service import OnlineService

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


def test_what_the_model_cannot_take_is_refused_by_its_shape(net):
    opened = OpenedModel(net, "", False)
    with (
        OnlineService(opened, speedup=1.5, worker=begin, poll_seconds=math.inf) as service,
        TestClient(create_app(service)) as client,
    ):
        problem(client.post("/predict", json={"inputs": [[1.0, 2.0]]}), 422, "cannot take values of the shape 2")
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
    text = metrics.text()
    assert 'le="0.001"} 2.0' in text
    assert 'le="0.005"} 3.0' in text
    assert 'le="+Inf"} 4.0' in text


def test_shutting_down_closes_the_service(service):
    with TestClient(create_app(service)):
        assert service.state()["phase"] == "collecting"
    assert service.state()["phase"] == "closed"


def test_the_state_is_strict_json(client):
    json.loads(client.get("/state").text, parse_constant=lambda name: pytest.fail(name))
