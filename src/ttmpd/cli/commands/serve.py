"""``ttmpd serve``: a running service with HTTP in front."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting, show_machine
from ttmpd.errors import InvalidValueError, MissingPackageError
from ttmpd.pipeline import defaults

PLACE = 80
EXAMPLES = (
    "ttmpd serve --model timm:resnet50 --speedup 2 --output fast/",
    'curl --data-binary @photo.jpg -H "content-type: image/jpeg" localhost:8000/predict',
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens, and how large a request may be."""

    host: Annotated[
        str, option.option("--host", "Address to listen on; there is no password.", option.SERVER, metavar="ADDRESS")
    ] = "127.0.0.1"
    port: Annotated[
        int, option.option("--port", "Port to listen on.", option.SERVER, min=1, max=65535, metavar="N")
    ] = 8000
    max_mb: Annotated[
        float, option.option("--max-mb", "Largest request, in MiB.", option.SERVER, min=0.01, metavar="MIB")
    ] = 16.0
    max_batch: Annotated[
        int, option.option("--max-batch", "Most samples in a request.", option.SERVER, min=1, metavar="N")
    ] = 64


NumSamples = Annotated[
    int, option.option("--num-samples", "Samples to collect before compressing.", option.DATA, min=8, metavar="N")
]
Threads = Annotated[
    int, option.option("--threads", "Threads of the process that compresses.", option.RUN, min=1, metavar="N")
]
Worker = Annotated[
    str, option.option("--worker", "Compress in a process of its own or in a thread.", option.RUN,
                       metavar="process|thread")
]  # fmt: skip


@option.with_options
def command(
    model: option.Model,
    target: option.Target,
    address: Address,
    run: option.Run,
    num_samples: NumSamples = defaults.SERVE_NUM_SAMPLES,
    batch_size: option.BatchSize = defaults.BATCH_SIZE,
    steps: option.Steps = None,
    threads: Threads = 1,
    worker: Worker = "process",
    output: option.OutputIfWanted = None,
) -> None:
    """Serve a model over HTTP, compress it on the samples that come in, and again when these change."""
    asked = target.settings()
    with reporting(run.verbose):
        from ttmpd.distill.one_time import OneTime
        from ttmpd.latency.device import choose_device
        from ttmpd.serving.service import OnlineService

        default_limits, serve = _server()
        _check_free(address.host, address.port)
        opened = model.open()
        opened.module.to(choose_device(run.device))
        settings: dict[str, Any] = {} if steps is None else {"distill": OneTime(steps=steps, seconds=0.0)}
        settings |= asked | {"batch_size": batch_size, "seed": run.seed, "worker": worker, "threads": threads}
        show_machine(run.device)
        with OnlineService(opened, num_samples=num_samples, output=output, **settings) as service:
            _greet(address.host, address.port)
            limits = default_limits(address.max_mb, address.max_batch)
            serve(service, host=address.host, port=address.port, limits=limits)


def _server() -> tuple[Any, Any]:
    """``default_limits`` and ``serve`` of the server, whose packages are an extra."""
    try:
        from ttmpd.serving.server import default_limits, serve
    except ImportError as error:
        step = 'pip install "ttmpd[serve]"'
        raise MissingPackageError(f"the packages of a server must be installed, but {error}; {step}") from error
    return default_limits, serve


def _check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before a model is opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error)
        raise InvalidValueError(
            f"the address of a server must be free, but {host} port {port} cannot be used ({reason}); choose another "
            "--port or --host"
        ) from error


def _greet(host: str, port: int) -> None:
    place = f"[{host}]" if ":" in host else host
    typer.echo(f"Serving on http://{place}:{port}: POST /predict, GET /state /report /health /metrics; Ctrl-C ends it")
    if not _is_local(host):
        typer.echo(f"Anyone who can reach {host} can send samples, and the model adapts to them.", err=True)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
