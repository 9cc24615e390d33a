"""``ttmpd inspect``: what can be removed from a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape

from ttmpd.artifact import format
from ttmpd.cli import show as display
from ttmpd.cli.commands import _options as option
from ttmpd.cli.commands._parsing import parts_of
from ttmpd.cli.commands._reporting import reporting, write_result
from ttmpd.pipeline import defaults

if TYPE_CHECKING:
    from ttmpd.latency.table import UnitLatency
    from ttmpd.latency.timing import Timing
    from ttmpd.pipeline.inspect import Inspection

PLACE = 10
EXAMPLES = (
    "ttmpd inspect --model timm:resnet50",
    "ttmpd inspect --model net.py:factory --no-time --units block,channel",
)

Timed = Annotated[bool, option.flag("--time/--no-time", "Measure milliseconds on this device.", option.RUN)]


@option.with_options
def command(
    model: option.Model,
    data: option.DataOrRandom = None,
    units: option.Units = None,
    batch_size: option.BatchSize = defaults.BATCH_SIZE,
    timed: Timed = True,
    json_file: option.Json = None,
    device: option.Device = defaults.DEVICE,
    verbose: option.Verbose = False,
) -> None:
    """List what can be removed from a model, what cannot, and why; nothing is changed."""
    with reporting(verbose):
        from ttmpd.pipeline.inspect import inspect

        opened = model.open()
        chosen: dict[str, Any] = {} if units is None else {"units": parts_of(units)}
        result = inspect(opened, data, batch_size=batch_size, device=device, timed=timed, **chosen)
        _show(result)
        write_result(json_file, result.to_dict())


def _show(found: "Inspection") -> None:
    """The units, and what cannot be removed."""
    console, timed = display.out(), found.whole is not None
    console.print(escape(display.machine_line(found.machine)))
    whole = f", {display.spread(found.whole)} per batch of {found.batch_size}" if found.whole else ""
    size = f"{format.count(found.parameters)} parameters, {format.count(found.macs)} MACs"
    console.print(f"{escape(found.model)}: {size} for an input of {found.input_shape}{whole}")
    if found.units:
        extra = ("ms", "of ms", "linear ms") if timed else ()
        numbers = ("parameters", "MACs", "of MACs", *extra)
        table = display.new_table("unit", "class", "shape", *numbers, right=numbers)
        latencies = {latency.unit: latency for latency in found.timings}
        for unit in found.units:
            shape = "x".join(map(str, unit.shape))
            share = format.percent(unit.macs / max(1, found.macs))
            times = _times(latencies[unit.id], found.whole) if found.whole else ()
            sizes = (format.count(unit.n_params), format.count(unit.macs), share)
            table.add_row(escape(unit.id), escape(unit.module), shape, *sizes, *times)
        console.print(table)
        console.print(f"{len(found.units)} removable units hold {format.percent(found.removable_share)} of the MACs.")
    else:
        console.print("Nothing is removable: no block answers with the shape of its input and can be skipped.")
    if found.refused:
        table = display.new_table("cannot be removed", "why")
        for path, reason in _grouped(found.refused):
            table.add_row(escape(path), escape(reason))
        console.print(table)


def _times(latency: "UnitLatency", whole: "Timing") -> tuple[str, str, str]:
    """Milliseconds of a unit, their share of the whole model's, and those of its linear replacement."""
    linear = latency.replacements.get("linear")
    share = format.percent(latency.ms / whole.median_ms)
    return format.milliseconds(latency.ms), share, "" if linear is None else format.milliseconds(linear)


def _grouped(refused: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One line for all siblings that are refused for the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in refused:
        groups.setdefault((path.rpartition(".")[0], reason), []).append(path)
    return [
        (f"{paths[0]} and {len(paths) - 1} beside it" if len(paths) > 1 else paths[0], reason)
        for (_, reason), paths in groups.items()
    ]
