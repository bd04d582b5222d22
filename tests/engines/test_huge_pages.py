"""Memory gained inside huge_pages() is moved to huge pages, and stays as it is everywhere else."""

import mmap
import platform
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import huge_pages, ort, ort_cuda
from engines.artifacts import open_engine
from engines.huge_pages import HUGE_PAGE

SMAPS = Path("/proc/self/smaps")
LINUX = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) if SMAPS.is_file() else (0, 0)
SIZE = 8 * HUGE_PAGE


def in_huge_pages(array: np.ndarray) -> int:
    """Bytes of the mappings that the array touches which lie in huge pages."""
    first, last = array.ctypes.data, array.ctypes.data + array.nbytes - 1
    total, counts = 0, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(bound, 16) for bound in bounds.groups())
            counts = start <= last and first < stop
        elif counts and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


def small_pages() -> np.ndarray:
    """An array in memory of its own that asked for no huge pages, as malloc gives it to ONNX Runtime."""
    return np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@pytest.mark.skipif(
    LINUX < (6, 1) or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="Linux moves memory to huge pages from 6.1 on, where it has them",
)
def test_memory_of_the_block_is_moved_and_keeps_its_values():
    with huge_pages.huge_pages():
        array = small_pages()
        array[:] = 7
        before = in_huge_pages(array)
    assert in_huge_pages(array) >= before + SIZE // 2
    assert (array == 7).all()


@pytest.mark.skipif(not SMAPS.is_file(), reason="Linux tells what lies in huge pages, others do not")
def test_memory_from_before_is_left_alone():
    array = small_pages()
    array[:] = 7
    before = in_huge_pages(array)
    with huge_pages.huge_pages():
        pass
    assert in_huge_pages(array) == before


def test_a_process_that_held_nothing_before(monkeypatch):
    array = small_pages()
    array[:] = 7
    block = -(-array.ctypes.data // HUGE_PAGE)
    blocks = iter([set(), {block, block + 1}])
    monkeypatch.setattr(huge_pages, "_blocks", lambda: next(blocks))
    with huge_pages.huge_pages():
        pass
    assert (array == 7).all()


def test_other_systems_run_without(monkeypatch):
    monkeypatch.setattr(huge_pages, "MAPS", Path("/nowhere"))
    with huge_pages.huge_pages():
        array = small_pages()
    assert not array.any()


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(huge_pages.SWITCH, "0")
    monkeypatch.setattr(huge_pages, "_blocks", lambda: pytest.fail("looked for memory to move"))
    with huge_pages.huge_pages():
        pass


def test_engines_on_cpus_load_into_them(engines: Path, monkeypatch):
    order = []

    @contextmanager
    def watched():
        order.append("begin")
        yield
        order.append("end")

    load = ort.load
    monkeypatch.setattr(ort, "huge_pages", watched)
    for module in (ort, ort_cuda):
        monkeypatch.setattr(module, "load", lambda *args, **kwargs: order.append("load") or load(*args, **kwargs))
    ort.OrtRunner(open_engine(engines / "ort" / "dense"), threads=1)
    assert order == ["begin", "load", "end"]
    order.clear()
    monkeypatch.setattr(ort_cuda.OrtCudaRunner, "device", torch.device("cpu"))
    monkeypatch.setattr(ort_cuda.OrtCudaRunner, "providers", ("CPUExecutionProvider",))
    ort_cuda.OrtCudaRunner(open_engine(engines / "ort" / "dense"))
    assert order == ["load"]


def test_errors_pass_through():
    with pytest.raises(ValueError, match="as it was"), huge_pages.huge_pages():
        raise ValueError("as it was")
