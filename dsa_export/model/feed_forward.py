"""The feed-forward slot. A variant is a module class (config) with check() and

    forward(hidden [B, S, E], lengths [B]) → (output [B, S, E], {name: scalar})

The scalars are auxiliary losses of the training mode (LOSSES names them), which the model averages over the layers and
hands to the stages beside the observer's; `lengths` are the valid tokens of each row, padded on the right.

Shapes: B batch, S tokens of this call, E hidden size, N experts, K experts per token, I size of an expert.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dsa_export.config import DSAConfig

ROUTER = ".mlp.gate."
"""Part of the name of every router parameter."""


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): Qwen2's SwiGLU, of config.intermediate_size unless another size is given."""

    LOSSES: ClassVar[tuple[str, ...]] = ()
    """The scalars that a stage which trains the layer adds to its losses."""

    def __init__(self, config: DSAConfig, intermediate_size: int | None = None):
        super().__init__()
        size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        """Raises ValueError, naming the option, for a configuration that the variant cannot take."""

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)), {}


class Router(nn.Linear):
    """GLM4-MoE's router: sigmoid scores; the K best by score + correction bias; weights are the scores alone,
    normalised to the sum routed_scaling_factor. Scores and weights are fp32."""

    def __init__(self, config: DSAConfig):
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.chosen = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """hidden [B, S, E] → scores [B, S, N], weights [B, S, N] with zeros for the experts that are not chosen."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(hidden.float(), self.weight.float()).sigmoid()
        indices = torch.topk(scores + self.e_score_correction_bias.float(), self.chosen, dim=-1).indices
        kept = scores.gather(-1, indices)
        kept = kept / (kept.sum(-1, keepdim=True) + 1e-20) * self.scaling
        return scores, torch.zeros_like(scores).scatter(-1, indices, kept)


class Experts(nn.Module):
    """N gated MLPs side by side in two wide matrices; the columns of expert n are its gate, then its up projection.

    Inference, and so the exported graph, computes all experts in two products and lets the router's zeros drop those
    that were not chosen: no shape depends on the choice, N / K times the operations are done (and counted as done in
    bench/floors.py, which counts the graph's weights). Training computes the chosen experts only: at 256 hidden units
    and 4 experts of 512, two of them active, a step then takes half the time on a CPU.
    """

    def __init__(self, config: DSAConfig):
        super().__init__()
        self.count, self.size = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, self.count * 2 * self.size, bias=False)
        self.down_proj = nn.Linear(self.count * self.size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """hidden [B, S, E], the router's weights [B, S, N] → [B, S, E]."""
        if self.training:
            return self._chosen(hidden.flatten(0, 1), weights.flatten(0, 1)).view_as(hidden)
        gate, up = self.gate_up_proj(hidden).unflatten(-1, (self.count, 2, self.size)).unbind(-2)
        activated = self.act_fn(gate) * up * weights.to(hidden.dtype)[..., None]
        return self.down_proj(activated.flatten(-2))

    def _chosen(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """The same of hidden [T, E] and weights [T, N], each token in its own experts only."""
        into = self.gate_up_proj.weight.split(2 * self.size)
        out_of = self.down_proj.weight.split(self.size, dim=1)
        total = torch.zeros_like(hidden)
        for expert in range(self.count):
            rows = weights[:, expert].nonzero()[:, 0]
            gate, up = F.linear(hidden[rows], into[expert]).chunk(2, dim=-1)
            activated = self.act_fn(gate) * up * weights[rows, expert, None].to(gate.dtype)
            total = total.index_add(0, rows, F.linear(activated, out_of[expert]).to(total.dtype))
        return total


class MixtureOfExperts(nn.Module):
    """GLM4-MoE's block: routed experts, and shared ones that every token passes through.

    In training mode it reports "balance", DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, section 2.1.2) times
    router_aux_loss_coef: N / K times the share of tokens that chose an expert, times its mean normalised score, summed
    over the experts; router_aux_loss_coef itself when the experts are used alike.
    """

    LOSSES: ClassVar[tuple[str, ...]] = ("balance",)

    def __init__(self, config: DSAConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.balance = config.router_aux_loss_coef
        self.shared_experts = (
            GatedMLP(config, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        for name, least in (("num_experts", 1), ("num_experts_per_tok", 1), ("moe_intermediate_size", 1)):
            if getattr(config, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
        if config.num_experts_per_tok > config.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts = {config.num_experts}, "
                f"got {config.num_experts_per_tok}"
            )
        for name in ("n_shared_experts", "router_aux_loss_coef"):
            if getattr(config, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")
        if config.routed_scaling_factor <= 0:
            raise ValueError(f"routed_scaling_factor must be positive, got {config.routed_scaling_factor}")

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        scores, weights = self.gate(hidden)
        output = self.experts(hidden, weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)[0]
        return output, {"balance": self._imbalance(scores, weights, lengths)} if self.training else {}

    def _imbalance(self, scores: Tensor, weights: Tensor, lengths: Tensor | None) -> Tensor:
        """Scalar: the balance loss of a batch, mean over its rows; padding does not count."""
        B, S, N = scores.shape
        lengths = scores.new_full((B,), S) if lengths is None else lengths
        valid = (torch.arange(S, device=scores.device) < lengths[:, None])[..., None]
        valid = valid / lengths.clamp(min=1)[:, None, None]
        chosen = ((weights > 0) * valid).sum(1) * (N / self.gate.chosen)
        share = (scores / scores.sum(-1, keepdim=True) * valid).sum(1)
        return self.balance * (chosen * share).sum(-1).mean()


VARIANTS: dict[str, type[GatedMLP] | type[MixtureOfExperts]] = {"gated": GatedMLP, "moe": MixtureOfExperts}
