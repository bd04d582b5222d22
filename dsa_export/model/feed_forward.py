"""The feed-forward slot: a variant is a class with (config), check() and forward(hidden [B, S, E]) → [B, S, E]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from dsa_export.config import DSAConfig


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): Qwen2's SwiGLU."""

    def __init__(self, config: DSAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        """Raises ValueError, naming the option, for a configuration that the variant cannot take."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


VARIANTS: dict[str, type[GatedMLP]] = {"gated": GatedMLP}
