"""Mixed precision: computation in bf16 where autocast finds it safe, weights and optimiser in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsa_export.model.checkpoint import INDEXER


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context that computes in `dtype`; nothing changes for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def exact(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same numbers in `dtype`; None if it does not hold them all."""
    rounded = values.to(dtype)
    return rounded if torch.equal(rounded.to(values.dtype), values) else None


@torch.no_grad()
def hold_matrices(model: Any, dtype: torch.dtype, *, rounded: bool = False) -> None:
    """Keeps the matrices of the layers, but for the indexers', in `dtype`, in which autocast multiplies them anyway.

    rounded: also those that lose something by it, which must not be saved then.
    """
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear) and INDEXER not in f".{name}.":
            for parameter in module.parameters():
                held = parameter.to(dtype) if rounded else exact(parameter, dtype)
                if held is not None:
                    parameter.data = held


def is_fast_in_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 at a multiple of its speed in fp32: GPUs since Ampere, CPUs with
    AVX512-BF16 or AMX (on others it is emulated, and slower)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # The oldest torch that the project takes cannot tell.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
