"""``ttmpd serve``: a running service with HTTP in front."""

import ipaddress
from typing import Annotated, Any

import typer

from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting, show_machine
from ttmpd.errors import MissingPackageError
from ttmpd.pipeline import defaults

PLACE = 80
SERVER = "Server"
"""A section of ``--help``."""


def _option(name: str, text: str, section: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=section, **more)


NumSamples = Annotated[
    int,
    _option("--num-samples", "Samples to collect before compressing.", option.DATA, min=8, metavar="N"),
]
Host = Annotated[str, _option("--host", "Address to listen on; there is no password.", SERVER, metavar="ADDRESS")]
Port = Annotated[int, _option("--port", "Port to listen on.", SERVER, min=1, max=65535, metavar="N")]
MaxMb = Annotated[float, _option("--max-mb", "Largest body of a request, MiB.", SERVER, min=0.01, metavar="MIB")]
MaxBatch = Annotated[int, _option("--max-batch", "Most samples in a request.", SERVER, min=1, metavar="N")]
Threads = Annotated[int, _option("--threads", "Threads of the background process.", option.RUN, min=1, metavar="N")]
Worker = Annotated[str, _option("--worker", "Where to compress.", option.RUN, metavar="process|thread")]


@option.with_options
def command(
    model: option.Model,
    run: option.Run,
    speedup: option.Speedup = None,
    latency: option.Latency = None,
    num_samples: NumSamples = defaults.SERVE_NUM_SAMPLES,
    output: option.OutputIfWanted = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_mb: MaxMb = 16.0,
    max_batch: MaxBatch = 64,
    threads: Threads = 1,
    worker: Worker = "process",
    batch_size: option.BatchSize = defaults.BATCH_SIZE,
    steps: option.Steps = None,
) -> None:
    """Serve a model over HTTP, compress it on the samples that come in, and again when they change."""
    if (speedup is None) == (latency is None):
        raise typer.BadParameter("give exactly one of --speedup and --latency")
    with reporting(run.verbose):
        from ttmpd.distill.one_time import OneTime
        from ttmpd.latency.device import choose_device
        from ttmpd.serving.service import OnlineService

        try:
            from ttmpd.serving.server import default_limits, serve
        except ImportError as error:
            step = 'pip install "ttmpd[serve]"'
            raise MissingPackageError(f"the packages of a server must be installed, but {error}; {step}") from error

        opened = model.open()
        opened.module.to(choose_device(run.device))
        settings: dict[str, Any] = {} if steps is None else {"distill": OneTime(steps=steps, seconds=0.0)}
        target: dict[str, Any] = {"speedup": speedup} if latency is None else {"latency": latency}
        settings |= target | {"worker": worker, "threads": threads, "batch_size": batch_size, "seed": run.seed}
        show_machine(run.device)
        with OnlineService(opened, num_samples=num_samples, output=output, **settings) as service:
            _greet(host, port)
            serve(service, host=host, port=port, limits=default_limits(max_mb, max_batch))


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
