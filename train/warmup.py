"""Stage 1, the warm-up: the base is frozen and dense; only the indexer learns, from the attention over all keys."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from dsa_export.cli import UserError, run
from dsa_export.model import AttentionTrace
from dsa_export.model.attention.base import mean_over_layers
from dsa_export.model.checkpoint import INDEXER, adapted_config, indexed_attention, load_config
from dsa_export.topk import TopK
from train import base
from train.data import Windows
from train.losses import TARGETS, IndexerObserver, queries_apart
from train.options import (
    DTYPES,
    INDEXER_OPTIMIZERS,
    Recipe,
    add_indexer_arguments,
    argument_parser,
    indexer_options,
    resolve,
    start,
    train_from,
)
from train.positions import model_inputs
from train.precision import load_frozen
from train.trainer import Stage
from train.validation import evaluate

OUT = "out/warmup"
MEASURE_EVERY = 32
"""While training, the recall is measured on every 32nd query that the indexer is trained on, on four at least."""

SMALL = Recipe(steps=150, batch_size=2, length=(512,), lr=1e-2, min_tokens=64, topk=64, index_heads=4, index_dim=32)
REAL = Recipe(
    max_tokens=250_880,
    batch_size=1,
    length=(1024, 2048, 4096, 8192),
    lr=3e-3,
    min_tokens=1024,
    held_out=1,
    kl_queries=2048,
    passes=16,
    position_span=32768,
)
"""35 to 44 minutes on one core in bf16 for Qwen2.5-0.5B. Measured in docs/results.md."""

Recorded = tuple[list[AttentionTrace], dict[str, Tensor]]


def indexer_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    return {"indexer": [p for name, p in model.named_parameters() if INDEXER in name]}


def observer(batch: dict[str, Tensor], topk: TopK, kl_queries: int | None, kl_target: str) -> IndexerObserver:
    """The indexer's loss on a batch, over about kl_queries of each row's tokens (None: over all)."""
    every = MEASURE_EVERY if kl_queries is None else min(MEASURE_EVERY, max(1, kl_queries // 4))
    return IndexerObserver(topk, every, queries_apart(batch["attention_mask"], kl_queries), kl_target)


def warmup_terms(
    model: Any,
    batch: dict[str, Tensor],
    topk: TopK,
    kl_queries: int | None = None,
    kl_target: str = TARGETS[0],
) -> dict[str, Tensor]:
    """{"kl", "recall", …} of a batch under dense attention. The head is not run: no cross-entropy is trained."""
    model.sparse = False
    return model.model(**model_inputs(batch), observer=observer(batch, topk, kl_queries, kl_target)).aux_losses


def record(model: Any, batch: dict[str, Tensor]) -> Recorded:
    """Every layer's trace under dense attention, and the batch: several updates share it, the base is frozen."""
    traces: list[AttentionTrace] = []
    model.sparse = False

    def keep(trace: AttentionTrace) -> dict[str, Tensor]:
        traces.append(trace.without_indexer())
        return {}

    model.model(**model_inputs(batch), observer=keep)
    return traces, batch


def replayed_terms(model: Any, recorded: Recorded, **options: Any) -> dict[str, Tensor]:
    """warmup_terms, of which only the indexers are run; about other queries each time."""
    traces, batch = recorded
    observe = observer(batch, **options)
    terms = []
    leader = traces[0]
    for trace in traces:
        if trace.again:
            trace = leader = trace.again(observe.queries)
        else:
            trace = replace(trace, q=trace.q[:, :, observe.queries]).with_indexer_of(leader)
        terms.append(observe.terms(trace))
    return mean_over_layers(terms)


def evaluation(args: argparse.Namespace, teacher: Any = None) -> Callable[[nn.Module, Windows], dict[str, float]]:
    """How the stages that train an indexer judge their model."""
    return partial(
        evaluate,
        batch_size=args.batch_size,
        compute_dtype=DTYPES[args.dtype],
        kl_target=args.kl_target,
        kl_queries=args.kl_queries,
        teacher=teacher,
    )


def parser() -> argparse.ArgumentParser:
    model_help = (
        f"folder or hub name of a Qwen2, Qwen2.5, Qwen3 or Llama model [{base.OUT}: a small model, trained first if "
        "missing]"
    )
    result = argument_parser("warmup", __doc__ or "", SMALL, REAL, OUT, model_help, trains_indexer=True)
    add_indexer_arguments(result, SMALL, REAL)
    return result


def config_of(model: str | None) -> PreTrainedConfig:
    """The configuration of a checkpoint; None: of the default warm-up's, which ensure() may still have to run."""
    if model is None and not base.is_trained(OUT):
        plain = base.config_of(None)
        indexer = indexer_options(parser().parse_args([]), SMALL, REAL, plain)
        return adapted_config(plain, indexed_attention(plain), **indexer)
    return load_config(model or OUT)


def ensure() -> str:
    """The folder of the warm-up's checkpoint; if it is missing, the warm-up runs first, by its defaults."""
    if not base.is_trained(OUT):
        main([])
    return OUT


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    processes = start(args)
    config = base.config_of(args.model)
    attention = indexed_attention(config)
    resolve(args, SMALL, REAL, config)
    if args.gradient_checkpointing and args.passes > 1:
        raise UserError(f"--gradient-checkpointing needs --passes 1: {args.passes} share a forward without gradients")
    indexer = indexer_options(args, SMALL, REAL, config)
    adapted_config(config, attention, **indexer)  # refuses before time is spent what load_model would
    name = args.model or base.ensure()
    for option, value in indexer.items():
        setattr(args, {"index_topk": "topk"}.get(option, option), value)

    def prepare() -> tuple[Any, Stage]:
        model = load_frozen(name, DTYPES[args.dtype], attention=attention, **indexer)
        return model, Stage(
            name="warmup",
            groups=indexer_parameters,
            terms=partial(
                warmup_terms if args.passes == 1 else replayed_terms,
                topk=model.config.index_topk,
                kl_queries=args.kl_queries,
                kl_target=args.kl_target,
            ),
            losses=("kl",),
            evaluate=evaluation(args),
            optimizers=lambda groups, settings: INDEXER_OPTIMIZERS[args.indexer_optimizer](
                groups["indexer"], settings, model.config.index_dim
            ),
            passes=args.passes,
            record=record if args.passes > 1 else None,
        )

    train_from(name, config, "warmup", args, processes, prepare)


if __name__ == "__main__":
    run(main)
