"""Stage 2, joint training: attention over the selection. The base learns what the checkpoint predicts with dense
attention (or, as published, the next token); the indexer learns the attention on the selected keys. The two do not mix:
the indexer's input and its target are detached."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsa_export.cli import UserError, positive, run
from dsa_export.model import feed_forward
from dsa_export.model.checkpoint import DEFAULT_CHECKPOINT, INDEXER, adapted_config, require_indexer
from dsa_export.selection import add_selection_arguments, selection_options
from dsa_export.topk import TopK, topk_per_layer
from train import warmup
from train.adapters import ADAPTER, add_adapter_argument, load_base, through_adapters
from train.cross_entropy import cross_entropy_terms
from train.losses import TARGETS
from train.options import (
    DTYPES,
    INDEXER_OPTIMIZERS,
    Recipe,
    argument_parser,
    positive_number,
    resolve,
    start,
    train_from,
)
from train.precision import load_frozen
from train.trainer import Settings, Stage, adamw

SMALL = Recipe(steps=100, batch_size=2, length=(512,), lr=3e-4, min_tokens=64, indexer_lr=2e-3)
REAL = Recipe(steps=1000, batch_size=1, length=(2048,), lr=3e-6, min_tokens=1024, indexer_lr=5e-4, position_span=32768)
OBJECTIVES = ("distillation", "next-token")


def parameter_groups(model: nn.Module, lora: bool = False) -> dict[str, list[nn.Parameter]]:
    named = list(model.named_parameters())
    return {
        "base": [p for name, p in named if (ADAPTER in name if lora else INDEXER not in name)],
        "indexer": [p for name, p in named if INDEXER in name],
    }


def joint_terms(
    model: Any,
    batch: dict[str, Tensor],
    topk: TopK,
    kl_queries: int | None = None,
    kl_target: str = TARGETS[0],
    teacher: Any = None,
) -> dict[str, Tensor]:
    """{"cross_entropy", "kl", "recall", …} of a batch under selection.

    teacher: a model of the same vocabulary, which adds {"distillation"}: the divergence from what it predicts.
    """
    model.sparse = True
    return cross_entropy_terms(model, batch, warmup.observer(batch, topk, kl_queries, kl_target), teacher)


def dense_teacher(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint as it is before this stage, attending to everything; constant, and a whole copy per process.

    dtype: of the computation. The matrices of the layers are kept in it. What autocast leaves in fp32 must stay in
    fp32, so that where nothing is left out the teacher predicts what the model does.
    """
    teacher = load_frozen(name, dtype, rounded=True, attention="dense")
    return teacher.requires_grad_(False).train().to(device)


def optimizers(
    groups: dict[str, list[nn.Parameter]],
    settings: Settings,
    indexer_optimizer: str,
    indexer_lr: float,
    index_dim: int,
) -> list[torch.optim.Optimizer]:
    """AdamW for the base; the indexer has an optimizer and a rate of its own."""
    indexer = replace(settings, lr=indexer_lr)
    return [
        adamw(groups["base"], settings),
        *INDEXER_OPTIMIZERS[indexer_optimizer](groups["indexer"], indexer, index_dim),
    ]


def parser() -> argparse.ArgumentParser:
    model_help = f"the warm-up's checkpoint [{warmup.OUT}: the warm-up runs first, by its defaults, if it is missing]"
    result = argument_parser("joint", __doc__ or "", SMALL, REAL, DEFAULT_CHECKPOINT, model_help, trains_indexer=True)
    result.add_argument("--topk", type=positive, metavar="K", help="keys selected per token [the checkpoint's]")
    result.add_argument(
        "--indexer-lr",
        type=positive_number,
        metavar="LR",
        help=f"peak learning rate of the indexer [{REAL.indexer_lr}; small models: {SMALL.indexer_lr}]",
    )
    result.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default=OBJECTIVES[0],
        help="what the base learns: what the checkpoint predicts with dense attention, so that it keeps what it knows "
        "whatever the data (holds the weights once more, whole in every process), or, as published, the next token of "
        f"the data [{OBJECTIVES[0]}]",
    )
    add_selection_arguments(result)
    add_adapter_argument(result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    processes = start(args)
    config = warmup.config_of(args.model)
    require_indexer(config, args.model or warmup.OUT)
    resolve(args, SMALL, REAL, config)
    args.topk = args.topk or config.index_topk
    adapted_config(config, index_topk=args.topk, **selection_options(args))  # refuses what load_model would
    least = min(topk_per_layer(args.topk, config.num_hidden_layers))
    if args.objective == "distillation" and least >= min(args.length):
        raise UserError(
            f"--topk {least} selects everything in windows of {min(args.length)} tokens: nothing would be left to "
            "distil: choose a smaller --topk, a longer --length or --objective next-token"
        )
    name = args.model or warmup.ensure()

    def prepare() -> tuple[Any, Stage]:
        model = load_base(name, args.lora_rank, DTYPES[args.dtype], index_topk=args.topk, **selection_options(args))
        distils = args.objective == "distillation"
        teacher = dense_teacher(name, DTYPES[args.dtype], processes.device) if distils else None
        stage = Stage(
            name="joint",
            groups=partial(parameter_groups, lora=args.lora_rank is not None),
            terms=partial(
                joint_terms,
                topk=args.topk,
                kl_queries=args.kl_queries,
                kl_target=args.kl_target,
                teacher=teacher,
            ),
            losses=(
                "distillation" if distils else "cross_entropy",
                "kl",
                *feed_forward.VARIANTS[model.config.feed_forward].LOSSES,
            ),
            evaluate=warmup.evaluation(args, teacher),
            optimizers=partial(
                optimizers,
                indexer_optimizer=args.indexer_optimizer,
                indexer_lr=args.indexer_lr,
                index_dim=model.config.index_dim,
            ),
        )
        if args.lora_rank is not None:
            stage = through_adapters(stage, args.lora_rank)
        return model, stage

    train_from(name, config, "joint", args, processes, prepare)


if __name__ == "__main__":
    run(main)
