"""Times a step of the warm-up against the original's way, and measures the memory of both.

    python -m bench.training [--model DIR] [--length 2048] [--layers 4] [--out out/bench/training.jsonl]

The original keeps the attention probabilities of every layer [Hq, T, T], scores every pair of tokens at once, and takes
the KL over the logits gathered at the indexer's own top-k. All steps are forward and backward of the same model, the
same batch and the same indexer; without --model it has the shape of Qwen2.5-0.5B and random weights. --passes N times
one of N steps that share a forward of the base, as train.warmup makes them, here about all queries each time.
--kl-lengths adds the memory of one layer's loss at longer windows, where the original's way would not fit.

Memory is what a fresh process gained at most beside its model. One JSON line per figure, and a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from bench.measure import Budget, alternate, in_child, machine
from dsa_export.cli import console, path, positive, progress_bar, run
from dsa_export.config import DSAConfig
from dsa_export.files import check_output_file, write_lines
from dsa_export.memory import PeakMemory
from dsa_export.model import DSAForCausalLM, load_model
from dsa_export.model.attention.base import Call
from dsa_export.model.attention.dsa import SparseAttention
from dsa_export.model.checkpoint import INDEXER
from dsa_export.model.decoder import DecoderLayer
from train.losses import TARGETS, indexer_kl, peak_bytes
from train.warmup import record, replayed_terms, warmup_terms

TOPK = 128
SHAPE: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
INDEXER_SHAPE: dict[str, Any] = {"index_heads": 8, "index_dim": 64, "index_topk": TOPK}
VOCABULARY = 1024
"""The warm-up does not run the head: the size of the vocabulary costs nothing."""


class OriginalAttention(SparseAttention):
    """Eager attention that keeps its probabilities, and the original's loss over what the indexer chose."""

    probabilities: Tensor
    kl: Tensor

    def attend(
        self, hidden: Tensor, q_BSE: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        T, group = q.shape[2], self.query_heads // self.kv_heads
        hidden_keys = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * self.scale
        self.probabilities = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
        output = self.probabilities @ v.repeat_interleave(group, 1)

        index_q, index_weights, index_k = self.indexer(hidden, q_BSE, call)
        activations = torch.relu(torch.einsum("bthd,bsd->bths", index_q, index_k))
        index_scores = torch.einsum("bth,bths->bts", index_weights, activations).masked_fill(hidden_keys, -1e9)
        chosen, indices = index_scores.topk(min(TOPK, T), dim=-1)
        target = F.normalize(self.probabilities.sum(1), p=1, dim=-1).gather(-1, indices)
        return output, {"kl": F.kl_div(chosen.log_softmax(-1), target, reduction="batchmean")}


def build(way: str, model: str | None, layers: int | None) -> DSAForCausalLM:
    """The model of a way ("ours" or "original"), its base frozen, in training mode."""
    torch.manual_seed(0)
    if model is not None:
        ours = load_model(model, **INDEXER_SHAPE)
        if layers is not None:
            ours.model.layers = ours.model.layers[:layers]
    else:
        ours = DSAForCausalLM(DSAConfig(**SHAPE, **INDEXER_SHAPE, num_hidden_layers=layers or 4, vocab_size=VOCABULARY))
    if way == "original":
        for number, layer in enumerate(ours.model.layers):
            assert isinstance(layer, DecoderLayer)
            with torch.device("meta"):
                attention = OriginalAttention(ours.config, number)
            attention.load_state_dict(layer.self_attn.state_dict(), assign=True)
            layer.self_attn = attention
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(INDEXER in name)
    return ours.train()


def batch_of(model: DSAForCausalLM, length: int) -> dict[str, Tensor]:
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def steps(way: str, passes: int, model: DSAForCausalLM, batch: dict[str, Tensor]) -> None:
    """Forward and backward of the loss; `passes` > 1 (ours only): as many of the loss from one forward of the base."""

    def finish(loss: Tensor) -> None:
        loss.backward()
        model.zero_grad(set_to_none=True)

    if passes > 1:
        recorded = record(model, batch)
        for _ in range(passes):
            finish(replayed_terms(model, recorded, topk=TOPK, kl_queries=None, kl_target=TARGETS[0])["kl"])
    elif way == "ours":
        finish(warmup_terms(model, batch, TOPK)["kl"])
    else:
        model.sparse = False
        finish(model.model(**batch, observer=None).aux_losses["kl"])


def step_peak(way: str, passes: int, model_name: str | None, layers: int | None, length: int) -> float | None:
    """MiB that a step takes beside the model; the short step before it loads what the libraries keep."""
    model = build(way, model_name, layers)
    steps(way, passes, model, batch_of(model, 64))
    memory = PeakMemory()
    memory.reset()
    steps(way, passes, model, batch_of(model, length))
    return memory.mib()


def kl_peak(length: int) -> float | None:
    """MiB that one layer's loss and its backward take beside their inputs, in the shape of Qwen2.5-0.5B."""
    call = partial(indexer_kl, scale=0.125, topk=TOPK, measure_every=8)
    call(*_kl_inputs(64)).kl.backward()
    inputs = _kl_inputs(length)
    memory = PeakMemory()
    memory.reset()
    call(*inputs).kl.backward()
    return memory.mib()


def _kl_inputs(T: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    student = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((1, T, 8, 64), (1, T, 8), (1, T, 64))]
    teacher = [torch.randn(1, heads, T, 64, generator=g) for heads in (14, 2)]
    return [*student, *teacher, torch.empty(0), torch.tensor([T])]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--model", metavar="NAME", help="folder or hub name of a model without an indexer [random weights]"
    )
    result.add_argument("--length", type=positive, default=2048, metavar="T", help="tokens of the window [2048]")
    result.add_argument("--layers", type=positive, metavar="N", help="only the first N layers [the model's; random: 4]")
    result.add_argument("--runs", type=positive, default=5, metavar="N", help="timed steps of each way, in turn [5]")
    result.add_argument(
        "--passes",
        type=positive,
        default=4,
        metavar="N",
        help="also one of N steps that share a forward of the base [4; 1: not]",
    )
    result.add_argument(
        "--kl-lengths",
        type=positive,
        nargs="*",
        default=[],
        metavar="T",
        help="also the memory of one layer's loss [none]",
    )
    result.add_argument("--out", type=path, default=Path("out/bench/training.jsonl"), metavar="FILE")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_output_file(args.out)
    ways = {"original": ("original", 1), "ours": ("ours", 1)}
    if args.passes > 1:
        ways[f"ours, {args.passes} passes"] = ("ours", args.passes)
    kl = {T: in_child(kl_peak, T, method="spawn") for T in args.kl_lengths}
    peaks = {
        name: in_child(step_peak, *way, args.model, args.layers, args.length, method="spawn")
        for name, way in ways.items()
    }
    models = {way: build(way, args.model, args.layers) for way in ("original", "ours")}
    batch = batch_of(models["ours"], args.length)
    calls = {name: partial(steps, way, passes, models[way], batch) for name, (way, passes) in ways.items()}
    with progress_bar() as progress:
        task = progress.add_task("steps of each way", total=args.runs)
        times = alternate(calls, Budget(args.runs, at_least=0), lambda: progress.advance(task))
    medians = {name: float(np.median(times[name])) / 1e3 / passes for name, (_, passes) in ways.items()}

    facts = {
        "model": args.model or "random weights, shape of Qwen2.5-0.5B",
        "layers": len(models["ours"].model.layers),
        "length": args.length,
        **machine(torch.get_num_threads()),
    }
    lines: list[dict[str, Any]] = []
    table = Table(
        *("", "s/step", "original / this", "extra MiB", "original / this"),
        title=f"warm-up step, {facts['layers']} layers, T = {args.length}",
    )
    for name, (_, passes) in ways.items():
        time_ratio = medians["original"] / medians[name]
        peak, largest = peaks[name], peaks["original"]
        memory_ratio = largest / peak if largest and peak else None
        measured = {"seconds": medians[name], "runs": args.runs, "time_ratio": time_ratio}
        memory = {"peak_mib": peak, "memory_ratio": memory_ratio}
        lines.append({"what": "step", "way": name, "passes": passes, **measured, **memory, **facts})
        ratios = (f"{time_ratio:.2f}×", "" if memory_ratio is None else f"{memory_ratio:.1f}×")
        table.add_row(name, f"{medians[name]:.3f}", ratios[0], _mib(peak), ratios[1])
    console.print(table)
    if kl:
        table = Table("T", "extra MiB", "formula", title="one layer's loss and gradient")
        for T, peak in kl.items():
            formula = peak_bytes(T, 14, 2, 8, 64) / 2**20
            table.add_row(f"{T:,}", _mib(peak), f"{formula:.0f}")
            lines.append({"what": "kl", "length": T, "peak_mib": peak, "formula_mib": formula, **machine(1)})
        console.print(table)
    write_lines(args.out, lines)
    console.print(f"written: {args.out}")


def _mib(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    run(main)
