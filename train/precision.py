"""Mixed precision: computation in bf16 where autocast finds it safe, weights that learn and optimiser in fp32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsa_export.model import DSAForCausalLM, load_model
from dsa_export.model.checkpoint import is_added


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context that computes in `dtype`; nothing changes for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def exact(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same numbers in `dtype`; None if it does not hold them all."""
    rounded = values.to(dtype)
    return rounded if torch.equal(rounded.to(values.dtype), values) else None


def load_frozen(name: str, dtype: torch.dtype, *, rounded: bool = False, **options: Any) -> DSAForCausalLM:
    """load_model() for weights that do not learn: what the layers multiply in `dtype` is held in it.

    rounded: see hold_matrices().
    """
    model = load_model(name, kept=partial(matrices, dtype=dtype), **options)
    hold_matrices(model, dtype, rounded=rounded)
    return model


def matrices(model: DSAForCausalLM, dtype: torch.dtype) -> list[str]:
    """Parameters that the layers multiply in `dtype` under its autocast(), but for what its attention adds to dense
    attention, which learns; none for fp32."""
    if dtype == torch.float32:
        return []
    names = [
        f"{name}.{parameter}"
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, nn.Linear)
        for parameter, _ in module.named_parameters()
    ]
    return [name for name in names if not is_added(name, model.config.attention)]


@torch.no_grad()
def hold_matrices(model: DSAForCausalLM, dtype: torch.dtype, *, rounded: bool = False) -> None:
    """Keeps matrices() in `dtype`, in which autocast multiplies them anyway.

    rounded: also those that lose something by it, which must not be saved then.
    """
    for name in matrices(model, dtype):
        parameter = model.get_parameter(name)
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
