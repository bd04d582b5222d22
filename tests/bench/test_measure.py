"""What is measured beside the time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import measure


@pytest.mark.skipif(not list(measure.TASKS.glob("*/schedstat")), reason="needs Linux's schedstat")
def test_a_program_on_the_same_processor_is_noticed() -> None:
    """Three of them: so much is left of a processor's time even if the system is late to move one of us."""
    allowed = os.sched_getaffinity(0)
    processor = {min(allowed)}
    spin = f"import os; os.sched_setaffinity(0, {processor})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(3)]
    try:
        os.sched_setaffinity(0, processor)
        time.sleep(0.5)  # they are running by then
        with measure.contention() as contention:
            end = time.perf_counter() + 1
            while time.perf_counter() < end:
                pass
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.wait()
    assert contention.share is not None and 0.4 < contention.share < 1


def test_where_the_system_does_not_tell_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TASKS", tmp_path / "none")
    with measure.contention() as contention:
        pass
    assert contention.share is None
