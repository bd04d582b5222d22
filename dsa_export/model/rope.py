"""Rotary tables, computed from positions inside the call: no table bounds the context."""

from __future__ import annotations

import copy
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Types whose frequencies do not depend on the length of the text at hand."""


def check_rope(parameters: dict[str, Any]) -> None:
    """Raises ValueError for RoPE parameters that the table cannot follow, naming the option."""
    rope_type = parameters["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise ValueError(f"rope_type {rope_type!r} is not supported (supported: {', '.join(STATIC_ROPE_TYPES)})")
    for name, value in parameters.items():
        if name != "rope_type" and not isinstance(value, (int, float, NoneType)):
            raise ValueError(f"rope_parameters: {name}={value!r} is not a number")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported, only 1.0")


class RotaryTable(nn.Module):
    """cos and sin [B, S, dim/2] for positions [B, S], with the model's own RoPE type (YaRN included)."""

    def __init__(self, config: PreTrainedConfig, dim: int):
        super().__init__()
        self.dim = dim
        self.config = config
        frequencies, self.attention_scaling = self._frequencies()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def _frequencies(self) -> tuple[Tensor, float]:
        rope = self.config.rope_parameters
        if rope["rope_type"] == "default":
            return 1.0 / (rope["rope_theta"] ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)), 1.0
        config = copy.copy(self.config)
        config.head_dim = self.dim
        # Some of these functions start on the default device, which is meta inside from_pretrained.
        with torch.device("cpu"):
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))

    def reset(self) -> None:
        """Fills the (non-persistent) frequencies: from_pretrained builds modules on the meta device."""
        self.inv_freq = self._frequencies()[0].to(self.inv_freq.device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions.unsqueeze(-1).float() * self.inv_freq
        return (angles.cos() * self.attention_scaling).to(dtype), (angles.sin() * self.attention_scaling).to(dtype)
