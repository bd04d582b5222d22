"""LoRA for the joint stage: the base learns through small adapters, which are merged into its matrices at the end."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

ADAPTER = ".lora_"
"""Part of the name of every adapter parameter."""

TARGETS = r".*\.(self_attn|mlp)\.(?!kv_b_)\w+_proj(_with_mqa)?"
"""Every matrix of the base's layers that is multiplied as a whole: latent attention takes kv_b_proj apart. The
indexer's, a level deeper, train fully."""


def add_adapters(model: nn.Module, rank: int) -> None:
    """Puts an adapter beside every matrix of the base's layers; at first it adds nothing. alpha = 2 rank."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)


def merge_adapters(model: nn.Module) -> None:
    """Adds the adapters into their matrices and removes them: the model's parameters have their old names again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
