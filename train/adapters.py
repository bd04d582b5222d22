"""LoRA: the base learns through small adapters, which are merged into its matrices at the end."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from dsa_export.cli import positive
from dsa_export.model import DSAForCausalLM, load_model
from train.precision import load_frozen
from train.trainer import Stage

ADAPTER = ".lora_"
"""Part of the name of every adapter parameter."""

TARGETS = r".*\.(self_attn|mlp)\.(?!kv_b_)\w+_proj(_with_mqa)?"
"""Every matrix of the base's layers that is multiplied as a whole: latent attention takes kv_b_proj apart. Those of
an indexer or of NSA's branches, a level deeper, train fully."""


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora-rank",
        type=positive,
        metavar="R",
        help="train the base through LoRA adapters of this rank, merged at the end: much less memory; wants a higher "
        "--lr, such as 1e-4 [all its parameters]",
    )


def load_base(name: str, rank: int | None, dtype: torch.dtype, **options: Any) -> DSAForCausalLM:
    """load_model() for a stage that computes in `dtype`; the base rests if it gets adapters (of this rank)."""
    return load_model(name, **options) if rank is None else load_frozen(name, dtype, **options)


def through_adapters(stage: Stage, rank: int) -> Stage:
    """The same stage with adapters on the model's matrices; `stage.groups` must choose the parameters named ADAPTER."""
    return replace(stage, prepare=partial(add_adapters, rank=rank), finish=merge_adapters)


def add_adapters(model: nn.Module, rank: int) -> None:
    """Puts an adapter beside every matrix of the base's layers; at first it adds nothing. alpha = 2 rank."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            parameter.data = parameter.data.float()  # they came in the type of their matrix, which may be held in bf16


def merge_adapters(model: nn.Module) -> None:
    """Adds the adapters into their matrices and removes them: the model's parameters have their old names again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.get_base_layer().float()  # what was held in bf16 would lose what it has learned
            module.merge()
            model.set_submodule(name, module.get_base_layer())
