"""The memory of this process."""

from __future__ import annotations

from pathlib import Path


class PeakMemory:
    """Resident memory that this process gained at most since it was created, in MiB.

    None where that cannot be known: not on Linux, or after a reset() that the system does not allow.
    """

    STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        self.before = self._kib("VmRSS")

    def reset(self) -> None:
        """Forgets the highest mark so far."""
        if self.STATUS.is_file():
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # a read-only /proc, as in some containers
                self.before = None

    def mib(self) -> float | None:
        peak = self._kib("VmHWM")
        if peak is None or self.before is None:
            return None
        return max(0.0, peak - self.before) / 1024  # a process that gave memory back before a reset() gained nothing

    def _kib(self, field: str) -> float | None:
        if not self.STATUS.is_file():
            return None
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith(field))
        return float(line.split()[1])
