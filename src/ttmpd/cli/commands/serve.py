"""A running service with HTTP in front."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any

import typer

from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._reporting import reporting, show_machine
from ttmpd.errors import MissingPackageError


def command(
    model: option.Model,
    speedup: option.Speedup = None,
    latency: option.Latency = None,
    samples: Annotated[int, typer.Option("--samples", min=8, help="Samples to collect before compressing.")] = 512,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the newest student's artifact.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    max_mb: Annotated[float, typer.Option("--max-mb", min=0.01, help="Largest body of a request, MiB.")] = 16.0,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Most samples of a request.")] = 64,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the background process.")] = 1,
    worker: Annotated[str, typer.Option("--worker", help="Where to compress: process or thread.")] = "process",
    batch_size: option.BatchSize = 64,
    steps: option.Steps = None,
    seed: option.Seed = 0,
    device: option.Device = "auto",
    source: option.Source = None,
    weights: option.Weights = None,
    no_pretrained: option.Pretrained = False,
    verbose: option.Verbose = False,
) -> None:
    """Answer over HTTP at once; collect samples, compress beside it, swap, and begin anew when the data move."""
    if (speedup is None) == (latency is None):
        raise typer.BadParameter("give exactly one of --speedup and --latency")
    with reporting(verbose):
        from ttmpd.distill.one_time import OneTime
        from ttmpd.latency.device import choose_device
        from ttmpd.serving.service import OnlineService

        try:
            from ttmpd.serving.server import default_limits, serve
        except ImportError as error:
            step = 'pip install "ttmpd[serve]"'
            raise MissingPackageError(f"the packages of a server must be installed, but {error}; {step}") from error

        opened = option.open_chosen(model, source, weights, no_pretrained)
        opened.module.to(choose_device(device))
        given: dict[str, Any] = {} if steps is None else {"distill": OneTime(steps=steps, seconds=0.0)}
        target: dict[str, Any] = {"speedup": speedup} if latency is None else {"latency": latency}
        given |= target | {"worker": worker, "threads": threads, "batch_size": batch_size, "seed": seed}
        show_machine(device)
        with OnlineService(opened, samples=samples, output=output, **given) as service:
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
