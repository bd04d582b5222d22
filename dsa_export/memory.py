"""Memory: what this process took, and what a new one can have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def available_memory() -> int:
    """Bytes that a new process can have."""
    import psutil  # PeakMemory also serves where it is not installed

    return psutil.virtual_memory().available


class PeakMemory:
    """Memory that this process gained at most since it was created, in MiB: resident, or what torch took on a GPU.

    outside_torch: a GPU is used by something that torch does not see. Then it is what is taken of the whole GPU now,
    which no reset() lowers; others must leave that GPU alone.
    None where that cannot be known: not on Linux, or after a reset() that the system does not allow.
    """

    STATUS = Path("/proc/self/status")

    def __init__(self, outside_torch: bool = False) -> None:
        self.before = self._kib("VmRSS")
        self.outside_torch = outside_torch
        gpu = _gpu(start=outside_torch)
        self.before_on_gpu = self._on_gpu(gpu) if gpu else 0

    def reset(self) -> None:
        """Forgets the highest mark so far."""
        if gpu := _gpu():
            gpu.reset_peak_memory_stats()
        if self.STATUS.is_file():
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # a read-only /proc, as in some containers
                self.before = None

    def mib(self) -> float | None:
        if gpu := _gpu():
            taken = self._on_gpu(gpu) if self.outside_torch else gpu.max_memory_allocated()
            return max(0.0, taken - self.before_on_gpu) / 2**20
        peak = self._kib("VmHWM")
        if peak is None or self.before is None:
            return None
        return max(0.0, peak - self.before) / 1024  # a process that gave memory back before a reset() gained nothing

    def _on_gpu(self, gpu: Any) -> int:
        if not self.outside_torch:
            return int(gpu.memory_allocated())
        free, total = gpu.mem_get_info()
        return int(total - free)

    def _kib(self, field: str) -> float | None:
        if not self.STATUS.is_file():
            return None
        line = next((line for line in self.STATUS.read_text().splitlines() if line.startswith(field)), None)
        return float(line.split()[1]) if line else None


def _gpu(start: bool = False) -> Any:
    """torch.cuda once this process computes on a GPU, else None. start: it will, and may begin now."""
    if start:
        importlib.import_module("torch.cuda").init()
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
