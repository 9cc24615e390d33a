"""Choose, synchronise and describe the device."""

from dataclasses import dataclass

import torch

from ttmpd.errors import InvalidValueError
from ttmpd.latency.memory import freed_memory


@dataclass(frozen=True, slots=True)
class Machine:
    """What milliseconds belong to.

    Args:
        device: its name.
        type: "cpu", "cuda" or "mps".
        threads: of PyTorch on the processor.
        torch: version.
        freed_memory: what becomes of freed memory, see :func:`ttmpd.latency.memory.freed_memory`.
    """

    device: str
    type: str
    threads: int
    torch: str
    freed_memory: str


def choose_device(device: str) -> torch.device:
    """``"auto"`` is cuda, then mps, then cpu."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InvalidValueError(f"device must be auto, cpu, cuda or mps, but got {device!r}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine(device: torch.device | str) -> Machine:
    """What milliseconds that are measured on the device now belong to."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name() if device.type == "cpu" else device.type
    return Machine(name, device.type, torch.get_num_threads(), str(torch.__version__), freed_memory())


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].partition(":")[2].strip()
    except (OSError, IndexError):
        import platform

        return platform.processor() or platform.machine()
