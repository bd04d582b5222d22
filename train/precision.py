"""Mixed precision: computation in bf16 where autocast finds it safe, weights and optimiser in fp32."""

from __future__ import annotations

import torch


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context that computes in `dtype`; nothing changes for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def is_fast_in_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 at a multiple of its speed in fp32: GPUs since Ampere, CPUs with
    AVX512-BF16 or AMX (on others it is emulated, and slower)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # The oldest torch that the project takes cannot tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
