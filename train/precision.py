"""Mixed precision: computation in bf16 where autocast finds it safe, weights and optimiser in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes the indexer's tensors one type under autocast: what is rotated comes out in fp32, so must its weights."""
    if dtype == torch.float32:
        return
    for name, module in model.named_modules():
        if name.endswith(".indexer.weights_proj"):
            module.register_forward_hook(_to_fp32)


def _to_fp32(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()
