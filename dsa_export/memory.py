"""The memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class PeakMemory:
    """Memory that this process gained at most since it was created, in MiB: resident, or what torch took on a GPU.

    None where that cannot be known: not on Linux, or after a reset() that the system does not allow.
    """

    STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        self.before = self._kib("VmRSS")
        gpu = _gpu()
        self.before_on_gpu = gpu.memory_allocated() if gpu else 0

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
            return max(0.0, gpu.max_memory_allocated() - self.before_on_gpu) / 2**20
        peak = self._kib("VmHWM")
        if peak is None or self.before is None:
            return None
        return max(0.0, peak - self.before) / 1024  # a process that gave memory back before a reset() gained nothing

    def _kib(self, field: str) -> float | None:
        if not self.STATUS.is_file():
            return None
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith(field))
        return float(line.split()[1])


def _gpu() -> Any:
    """torch.cuda once this process computes on a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
