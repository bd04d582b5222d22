"""Plain cross-entropy training of a whole model, whatever its attention: from a checkpoint, or with new weights of the
same configuration (--from-scratch). Native sparse attention learns its selection this way; for DSA, whose indexer
cross-entropy cannot reach, there are train.warmup and train.joint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config

from dsa_export.cli import UserError, run
from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM, feed_forward
from dsa_export.model.checkpoint import adapted_config, is_added
from dsa_export.model.families import dense_config
from dsa_export.selection import NSA_OPTIONS
from train import base
from train.adapters import ADAPTER, add_adapter_argument, load_base, through_adapters
from train.cross_entropy import cross_entropy_terms
from train.data import Batch, Windows
from train.options import DTYPES, SMALL_HIDDEN_SIZE, Recipe, argument_parser, resolve, start, train_from
from train.trainer import Stage
from train.validation import Sum, means

OUT = "out/finetune"
ATTENTION = ("nsa", "dense")
SMALL_NSA = {
    "nsa_block_size": 16,
    "nsa_stride": 8,
    "nsa_selection_size": 16,
    "nsa_selected_blocks": 4,
    "nsa_window": 32,
}
"""A small model's texts are short: with DSAConfig's defaults it would see everything."""

SMALL = Recipe(steps=300, batch_size=2, length=(512,), lr=1e-3, min_tokens=64)
REAL = Recipe(steps=1000, batch_size=1, length=(2048,), lr=1e-5, min_tokens=1024)


def all_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    return {"model": list(model.parameters())}


def adapters_and_added(model: Any) -> dict[str, list[nn.Parameter]]:
    """With adapters the base rests; what its attention has beyond dense attention trains fully all the same."""
    variant = model.config.attention
    return {"model": [p for name, p in model.named_parameters() if ADAPTER in name or is_added(name, variant)]}


def held_out_loss(
    model: Any, windows: Windows, *, batch_size: int = 1, compute_dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """{"loss"}: cross-entropy per label."""

    def sums(batch: Batch, labels: int) -> dict[str, Sum]:
        return {"loss": (cross_entropy_terms(model, batch)["cross_entropy"].item() * labels, labels)}

    return means(model, windows, sums, batch_size=batch_size, compute_dtype=compute_dtype)


def stage(model: DSAForCausalLM, *, batch_size: int = 1, compute_dtype: torch.dtype = torch.float32) -> Stage:
    """The stage: every parameter, cross-entropy and the losses of the model's feed-forward, AdamW."""
    return Stage(
        name="finetune",
        groups=all_parameters,
        terms=cross_entropy_terms,
        losses=("cross_entropy", *feed_forward.VARIANTS[model.config.feed_forward].LOSSES),
        evaluate=partial(held_out_loss, batch_size=batch_size, compute_dtype=compute_dtype),
    )


def new_model(config: DSAConfig, seed: int) -> DSAForCausalLM:
    """Fresh weights. Twins of one seed start from the same ones wherever they have the same parameters."""
    torch.manual_seed(seed)
    shared = DSAForCausalLM(dense_config(config))
    model = DSAForCausalLM(config)
    model.load_state_dict({**model.state_dict(), **shared.state_dict()})
    return model


def parser() -> argparse.ArgumentParser:
    model_help = f"a checkpoint, folder or hub name [{base.OUT}: a small model, trained first if missing]"
    result = argument_parser("finetune", __doc__ or "", SMALL, REAL, OUT, model_help)
    result.add_argument("--attention", choices=ATTENTION, default="nsa", help="the variant to train [nsa]")
    result.add_argument(
        "--from-scratch", action="store_true", help="new weights; --model gives configuration and tokenizer only"
    )
    add_adapter_argument(result)
    group = result.add_argument_group(
        "native sparse attention", "Of a checkpoint that has none yet; one that has it keeps its own."
    )
    for name, text in NSA_OPTIONS.items():
        text += f" [{getattr(DSAConfig(), name)}; small models: {SMALL_NSA[name]}]"
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    return result


def nsa_options(args: argparse.Namespace, config: Qwen2Config) -> dict[str, Any]:
    """What the arguments say of NSA, completed by the small model's for one that has none yet; {} for dense attention.

    Raises UserError for arguments that need another attention, or other weights.
    """
    given = {name: value for name in NSA_OPTIONS if (value := getattr(args, name)) is not None}
    if args.attention != "nsa":
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} needs --attention nsa")
        return {}
    own = getattr(config, "attention", None) == "nsa"
    changed = [name for name, value in given.items() if own and value != getattr(config, name)]
    if changed and not args.from_scratch:
        flag, trained = changed[0].replace("_", "-"), getattr(config, changed[0])
        raise UserError(f"{args.model} was trained with --{flag} {trained}: leave it out, or train --from-scratch")
    return {**(SMALL_NSA if not own and config.hidden_size <= SMALL_HIDDEN_SIZE else {}), **given}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    processes = start(args)
    config = base.config_of(args.model)
    resolve(args, SMALL, REAL, config)
    options = nsa_options(args, config)
    if args.from_scratch and args.lora_rank is not None:
        raise UserError("--lora-rank trains beside a checkpoint's weights: not with --from-scratch")
    vars(args).update(options)
    adapted = adapted_config(config, args.attention, **options)
    name = args.model or base.ensure()

    def prepare() -> tuple[Any, Stage]:
        if args.from_scratch:
            model = new_model(adapted, args.seed)
        else:
            model = load_base(name, args.lora_rank, DTYPES[args.dtype], attention=args.attention, **options)
        whole = stage(model, batch_size=args.batch_size, compute_dtype=DTYPES[args.dtype])
        if args.lora_rank is not None:
            whole = through_adapters(replace(whole, groups=adapters_and_added), args.lora_rank)
        return model, whole

    train_from(name, config, "finetune", args, processes, prepare)


if __name__ == "__main__":
    run(main)
