"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits before it reads.

From Hopper on; see "Programmatic Dependent Launch and Synchronization" in the CUDA C++ Programming Guide. It hides what
a launch costs, a microsecond or two of each. A kernel that fills the GPU for long must not start early: its programs
would crowd on the multiprocessors that are free already. So it is done within an operator, where it was seen to help.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(ARCH: tl.constexpr):
    """First statement of every kernel: waits for all earlier kernels.

    Every program has to wait, also one that returns at once: the next kernel waits for this one alone.
    """
    if ARCH >= 90:
        gdc_wait()


@triton.jit
def let_next_start(ARCH: tl.constexpr):
    """The next kernel starts when all programs have said this; without it, when they have ended."""
    if ARCH >= 90:
        gdc_launch_dependents()


def architecture(device: torch.device) -> int:
    """The kernels' ARCH: 90 for sm_90; 0 in the interpreter."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def launch_options(device: torch.device) -> dict[str, Any]:
    """What a launch from torch on this device takes beside the kernel's own options."""
    arch = architecture(device)
    return {"ARCH": arch, "launch_pdl": True} if arch >= 90 else {"ARCH": arch}
