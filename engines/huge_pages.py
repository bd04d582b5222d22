"""Pages of 2 MiB for what ONNX Runtime keeps in memory.

A decoding step reads all weights once. ONNX Runtime holds them, repacked, in memory from malloc, in pages of 4 KiB: so
many that the processor looks up each anew, and engines loaded first into a process, whose pages lie more scattered,
were up to 8 % slower than those loaded last. In huge pages all are 8 to 18 % faster, and alike. NumPy asks for huge
pages itself, so that caches have them already.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUGE_PAGE = 2**21
MADV_COLLAPSE = 25  # Linux 6.1 and later, whatever /sys/kernel/mm/transparent_hugepage/enabled says
SWITCH = "DSA_HUGE_PAGES"
MAPS = Path("/proc/self/maps")


@contextmanager
def huge_pages() -> Iterator[None]:
    """Moves memory that this process gains inside the block to huge pages when it ends, as far as Linux can.

    That copies it once, 0.2 to 0.4 GB a second on a virtual machine. Elsewhere, and with DSA_HUGE_PAGES=0 in the
    environment, nothing happens.
    """
    if os.environ.get(SWITCH) == "0":
        yield
        return
    before = _blocks()
    yield
    gained = _blocks() - before
    if not gained:
        return
    libc = ctypes.CDLL(None)
    for block in gained:
        # Fails for blocks that hold nothing, and where memory is short or scattered: they stay as they are.
        libc.madvise(ctypes.c_void_p(block * HUGE_PAGE), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE)


def _blocks() -> set[int]:
    """Numbers of the aligned blocks of 2 MiB that lie in writable memory of this process alone."""
    if not MAPS.is_file():  # only Linux has it
        return set()
    blocks: set[int] = set()
    for line in MAPS.read_text().splitlines():
        addresses, permissions, *_, inode = line.split()[:5]
        if permissions == "rw-p" and inode == "0":
            start, stop = (int(address, 16) for address in addresses.split("-"))
            blocks.update(range(-(-start // HUGE_PAGE), stop // HUGE_PAGE))
    return blocks
