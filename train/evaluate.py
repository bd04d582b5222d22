"""python -m train.evaluate: what sparsity costs a checkpoint, on held-out text and on retrieval tasks.

Also the short evaluation that the training stages make before and after (`evaluate`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsa_export.cli import UserError, console, progress_bar, run
from dsa_export.config import DSAConfig
from dsa_export.files import MANIFEST, check_output, output_folder, read_manifest, write_atomically, write_manifest
from dsa_export.model import DSAForCausalLM, dense_twin, load_model, load_tokenizer
from dsa_export.model.checkpoint import load_config
from dsa_export.selection import DEFAULTS, add_selection_arguments, selection_options
from dsa_export.topk import describe_topk
from plugins.index_topk.op import check_options
from train import options, plots, precision
from train.allocation import allocate, write_topk
from train.data import IGNORED, Windows, check_tokenizer, load_data
from train.distributed import pick_device
from train.ladder import RUNGS
from train.losses import IndexerObserver
from train.study import Choice, Record, Study
from train.tasks import TASKS, fit

CHECKPOINT = "ckpt"
OUT = Path("out/evaluation")
TABLE_WIDTH = 112


@torch.no_grad()
def evaluate(
    model: DSAForCausalLM, windows: Windows, *, batch_size: int = 1, compute_dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Evaluates a model with an indexer on windows it was not trained on, and leaves its switches as they were.

    Returns:
        loss_dense, loss_sparse: cross-entropy per label with everything attended to, and with the k selected.
        kl: of the indexer against the dense attention, over all visible keys, per token.
        recall, recall_window, recall_best: shares of attention mass, see train.losses.IndexerLoss. None of them is
            reported if no window is longer than k.
        recall_normalised: (recall − window) / (best − window): 0 is a sliding window, 1 the best possible selection.
        tokens_per_s_dense, tokens_per_s_sparse: decoding with a cache that holds the first window, in torch. The fair
            comparison, on engines, is bench/compare.py.

    The losses use the masked form of selection (the model's training mode): the same function of its inputs, and at
    these lengths much faster on a CPU than gathering for every token of a window.
    """
    was_training, was_sparse = model.training, model.sparse
    device = next(model.parameters()).device
    topk = model.config.index_topk
    means: dict[str, _Mean] = defaultdict(_Mean)
    batches = [windows.batch(rows, device) for rows in torch.arange(len(windows)).split(batch_size)]
    model.train()
    with progress_bar() as progress, precision.autocast(device, compute_dtype):
        task = progress.add_task("evaluate", total=len(batches))
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            lengths = batch["attention_mask"].sum(1)
            model.sparse = False
            dense = model(**batch, use_cache=False, observer=IndexerObserver(topk, measure_every=1))
            means["loss_dense"].add(dense.loss, labels)
            means["kl"].add(dense.aux_losses["kl"], int(lengths.sum()))
            crowded = int((lengths - min(model.config.topk_per_layer)).clamp(min=0).sum())
            for name in ("recall", "recall_window", "recall_best"):
                means[name].add(dense.aux_losses[name], crowded)
            model.sparse = True
            means["loss_sparse"].add(model(**batch, use_cache=False).loss, labels)
            progress.advance(task)
        result = {name: mean.value for name, mean in means.items() if mean.weight}
        first = windows.batch(torch.zeros(1, dtype=torch.int64), device)["input_ids"]
        result |= decoding_speed(model, first)
    if "recall" in result:
        room = result["recall_best"] - result["recall_window"]
        result["recall_normalised"] = (result["recall"] - result["recall_window"]) / room if room > 0 else 1.0
    model.train(was_training)
    model.sparse = was_sparse
    return result


@torch.no_grad()
def decoding_speed(model: DSAForCausalLM, input_ids: Tensor, tokens: int = 8) -> dict[str, float]:
    """Tokens per second of dense and sparse decoding after the prompt input_ids [1, T], in turn on one cache.

    The prompt is read in the masked form and not timed. What the dense twin appends has no index key: for timing only.
    """
    cache = model.train()(input_ids, use_cache=True, logits_to_keep=1).cache
    model.eval()
    model.sparse = True
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    variants = {"dense": dense_twin(model), "sparse": model}
    for _ in range(tokens):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant(input_ids[:, -1:], cache=cache, use_cache=True)
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {f"tokens_per_s_{name}": 1 / statistics.median(values) for name, values in seconds.items()}


class _Mean:
    """A weighted mean of scalars."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.weight = 0

    def add(self, value: Tensor, weight: int) -> None:
        if weight:  # an empty mean is NaN
            self.sum += value.item() * weight
            self.weight += weight

    @property
    def value(self) -> float:
        return self.sum / self.weight


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Measures what a sparse checkpoint loses against its own dense attention, on held-out text (a "
        "ladder of selections at every k) and on retrieval tasks made here, and writes tables, JSON and pictures.",
        epilog="The ladder, at each k: best (the keys of most attention mass), trained (the checkpoint's indexer), "
        "random (an untrained one), window (the last k keys); `--base` adds the checkpoint before training. With k of "
        "the whole length the model must equal its dense self, or the command fails.",
    )
    where = result.add_argument_group("input and output")
    where.add_argument(
        "--model",
        default=CHECKPOINT,
        metavar="DIR",
        help=f"checkpoint with an indexer, folder or hub name [{CHECKPOINT}]",
    )
    where.add_argument(
        "--base", metavar="NAME", help="the checkpoint before training: dense, to tell drift from sparsity"
    )
    where.add_argument(
        "--data", metavar="SOURCE", help="as in training [what the checkpoint was trained on, else stdlib]"
    )
    where.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"output folder [{OUT}]")
    where.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … [auto: a GPU if there is one]")
    where.add_argument("--dtype", choices=options.DTYPES, default="fp32", help="of the computation [fp32]")
    where.add_argument("--seed", type=int, default=0, help="of windows, samples and the random indexer [0]")
    where.add_argument("--quick", action="store_true", help="a first look: 2 windows, one k, 1 sample of two tasks")

    text = result.add_argument_group("held-out text")
    text.add_argument("--length", type=int, nargs="+", metavar="T", help="tokens per window [2048; small models: 512]")
    text.add_argument(
        "--topk", "--k", dest="topk", nargs="+", metavar="K",
        help="numbers of selected keys; `auto` adds k by layer under --k-budget [T/16 T/8 T/4 of the longest T]",
    )  # fmt: skip
    text.add_argument("--windows", type=int, metavar="N", help="windows per length [4; --quick: 2]")
    text.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), help="[all]")
    text.add_argument(
        "--every", type=int, metavar="N", help="measure the attention of every N-th query [1 up to 1024 tokens, else 8]"
    )
    text.add_argument("--min-tokens", type=int, default=64, metavar="N", help="leave out shorter documents [64]")
    add_selection_arguments(result)
    text.add_argument("--packing", choices=("pack", "cut"), default="pack", help="as in training [pack]")

    auto = result.add_argument_group("k by layer (--k auto)")
    auto.add_argument("--k-budget", type=int, metavar="K", help="mean k over the layers [the checkpoint's own]")
    auto.add_argument("--k-step", type=int, metavar="N", help="every k is a multiple of this [budget / 8]")
    auto.add_argument("--k-floor", type=int, metavar="N", help="the least k of a layer [one step]")
    auto.add_argument(
        "--write-topk", type=Path, metavar="DIR",
        help="write the checkpoint with the chosen k there, its weights hard-linked: export and engines follow it",
    )  # fmt: skip

    retrieval = result.add_argument_group("retrieval tasks")
    retrieval.add_argument(
        "--tasks", nargs="+", choices=[*TASKS, "all"], default=[], help="[none; --quick: passkey kv]"
    )
    retrieval.add_argument(
        "--task-lengths", type=int, nargs="+", metavar="T", help="tokens of prompt and answer [--length]"
    )
    retrieval.add_argument("--samples", type=int, metavar="N", help="per task and length [5; --quick: 1]")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_output(args.out)
    config = load_config(args.model)
    resolve(args, config)
    assert isinstance(config, DSAConfig)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(tokenizer, config.vocab_size)
    planned = [(name, length) for name in args.tasks for length in args.task_lengths]
    for name, length in planned:
        fit(name, length, tokenizer, args.seed)  # raises where a length is too short
    data = {
        length: load_data(
            args.data,
            tokenizer,
            length,
            train_windows=args.windows if args.auto and length == max(args.length) else 0,
            held_out_windows=args.windows,
            min_tokens=args.min_tokens,
            packing=args.packing,
            seed=args.seed,
        )
        for length in args.length
    }
    console.print(f"Loading {args.model}")
    model = load_model(args.model, **selection_options(args)).to(device)
    base = load_model(args.base, attention="dense").to(device).train() if args.base else None
    if base is not None and base.config.vocab_size != config.vocab_size:
        raise UserError(f"--base {args.base} has another vocabulary than {args.model}")
    compute = options.DTYPES[args.dtype]
    precision.prepare(model, compute)
    study = Study(model, args.rungs, args.every, args.seed, base)
    choices = [Choice(str(k), (k,) * config.num_hidden_layers) for k in args.ks]
    results: Record = {"model": args.model, "topk": list(config.topk_per_layer), "text": [], "tasks": []}
    with precision.autocast(device, compute), progress_bar() as progress, output_folder(args.out) as out:
        if args.auto:
            windows = data[max(args.length)].train
            task = progress.add_task("k by layer", total=len(windows))
            study.tick = lambda: progress.advance(task)
            chosen = allocate(study.caught(windows), args.k_budget, step=args.k_step, floor=args.k_floor)
            choices.append(Choice("auto", tuple(chosen)))
            results["auto"] = {
                "budget": args.k_budget,
                "step": args.k_step,
                "floor": args.k_floor,
                "topk": chosen,
                "chosen_on": data[max(args.length)].facts["sha256"],  # training text: the ladder is on held-out text
            }
            console.print(f"k by layer: {' '.join(map(str, chosen))} (mean {sum(chosen) / len(chosen):.0f})")
        for length, source in data.items():
            task = progress.add_task(f"text, {length:,} tokens", total=study.forwards(choices, source.held_out))
            study.tick = lambda task=task: progress.advance(task)  # type: ignore[misc]
            record = study.text(source.held_out, choices)
            first = source.held_out.batch(torch.zeros(1, dtype=torch.int64), device)["input_ids"]
            model.set_topk(config.topk_per_layer)
            results["text"].append({**record, **decoding_speed(model, first), "data": source.facts})
            show(text_table(results["text"][-1]))
        task = progress.add_task("tasks", total=len(planned) * args.samples * (1 + len(choices)), visible=bool(planned))
        study.tick = lambda: progress.advance(task)
        for name, length in planned:
            results["tasks"] += study.task(name, length, args.samples, choices, tokenizer)
        if planned:
            show(task_table(results["tasks"]))
        write_results(out, results, study, args)
    if args.write_topk:
        write_topk(args.model, results["auto"]["topk"], args.write_topk, budget=args.k_budget, data={"path": args.data})
        console.print(
            f"Wrote {args.write_topk}/: the same weights with k by layer; export it with --model {args.write_topk}"
        )
    console.print(f"Wrote {args.out}/: results.json, manifest.json and {len(list(args.out.glob('*.png')))} pictures")


def resolve(args: argparse.Namespace, config: Any) -> None:
    """Fills what was left out, and checks what hangs together. Raises UserError with one line before time is spent."""
    if not isinstance(config, DSAConfig) or config.attention == "dense":
        raise UserError(f"{args.model} has no indexer: run `python -m train.warmup --model {args.model}` first")
    small = config.hidden_size <= options.SMALL_HIDDEN_SIZE
    args.length = sorted(set(args.length or [512 if small else 2048]))
    args.windows = args.windows or (2 if args.quick else 4)
    args.samples = args.samples or (1 if args.quick else 5)
    args.every = args.every or (1 if max(args.length) <= 1024 else 8)
    if args.quick and not args.tasks:
        args.tasks = ["passkey", "kv"]
    args.tasks = list(TASKS) if "all" in args.tasks else list(dict.fromkeys(args.tasks))
    args.task_lengths = sorted(set(args.task_lengths or args.length))
    args.data = args.data or trained_on(args.model) or "stdlib"

    longest = max(args.length)
    shares = (8,) if args.quick else (16, 8, 4)
    wanted = args.topk or [str(max(1, longest // share)) for share in shares]
    args.auto = "auto" in wanted
    budget = args.k_budget or round(sum(config.topk_per_layer) / config.num_hidden_layers)
    try:
        args.ks = sorted({int(k) for k in wanted if k != "auto"} | ({budget} if args.auto else set()))
    except ValueError:
        raise UserError(f"--topk takes whole numbers and `auto`, got {' '.join(wanted)}") from None
    for name, values, least in (
        ("topk", args.ks, 1),
        ("length", args.length, 8),
        ("task-lengths", args.task_lengths, 8),
        ("windows", [args.windows], 1),
        ("samples", [args.samples], 1),
        ("every", [args.every], 1),
    ):
        if min(values) < least:
            raise UserError(f"--{name} must be at least {least}, got {min(values)}")
    for name, values in (("length", args.length), ("task-lengths", args.task_lengths)):
        if max(values) > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise UserError(f"--{name} {max(values)} is beyond the model's {limit} positions")
    chosen = {name: getattr(config, name) for name in DEFAULTS} | selection_options(args)
    for k in args.ks:
        try:
            check_options(k, chosen["index_sinks"], chosen["index_window"], chosen["index_pool"])
        except ValueError as error:
            raise UserError(f"--topk {k} does not fit the options of the selection: {error}") from None
    if args.auto and chosen["index_share"] > 1:
        raise UserError("--k auto needs an indexer in every layer: it excludes --index-share")
    if args.auto and budget >= longest:
        raise UserError(f"--k-budget {budget} leaves nothing to choose at {longest} tokens: measure a longer --length")
    if min(args.ks) >= min(args.length):
        raise UserError(f"k = {min(args.ks)} leaves nothing out of {min(args.length)} tokens: lower --topk")
    if not args.auto:
        for name in ("k_budget", "k_step", "k_floor", "write_topk"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --k auto")
        return
    args.k_budget = budget
    args.k_step = args.k_step or max(1, budget // 8)
    args.k_floor = args.k_floor or args.k_step
    if args.write_topk:
        check_output(args.write_topk)


def trained_on(model: str) -> str | None:
    """The data that the checkpoint's manifest names, if there is one."""
    if not (Path(model) / MANIFEST).is_file():
        return None
    return read_manifest(Path(model), "checkpoint", "python -m train.warmup").get("data", {}).get("path")


def write_results(out: Path, results: Record, study: Study, args: argparse.Namespace) -> None:
    """results.json, manifest.json and the pictures."""
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    plots.plot_losses(results["text"], out / "loss.png")
    plots.plot_recall(results["text"], out / "recall.png")
    longest, meter = results["text"][-1], study.meters[-1]
    plots.plot_heads(longest["heads"], longest["length"], out / "heads.png")
    plots.plot_maps(meter.maps, meter.ks[0], longest["length"], out / "maps.png")
    if results["tasks"]:
        plots.plot_tasks(results["tasks"], out / "tasks.png")
    given = {name: value for name, value in sorted(vars(args).items()) if name not in ("out", "model")}
    write_manifest(out, "evaluation", options.model_source(args.model), arguments=given, torch=torch.__version__)


def show(table: Table) -> None:
    """Prints a table; into a pipe or file at its full width."""
    wide = None if console.is_terminal else TABLE_WIDTH
    Console(file=console.file, width=wide, highlight=False).print(table)


def text_table(record: Record) -> Table:
    """The ladder at one length, with the shares of attention mass beside the trained indexer."""
    check, dense = record["full_selection"], record["dense"]
    table = Table(
        title=f"{record['length']:,} tokens, {record['windows']} windows, {record['tokens']:,} predictions",
        caption=f"Everything selected equals dense: logits within {check['max_abs_error']:.1e} (allowed "
        f"{check['tolerance']:.1e}). Recall: share of the attention mass; normalised: 0 a window, 1 the best possible. "
        f"Decoding in torch: {record['tokens_per_s_dense']:.1f} tokens/s dense, "
        f"{record['tokens_per_s_sparse']:.1f} sparse.",
        caption_justify="left",
    )  # fmt: skip
    for name in ("selection", "k", "loss", "vs dense", "perplexity", "KL", "top-1", "recall", "normalised"):
        table.add_column(name, justify="left" if name == "selection" else "right")
    recalls = {item["k"]: item for item in record["attention"]}
    shown = [("dense", "all", dense), *([("dense, base", "all", record["base"])] if record["base"] else [])]
    for rung in (*RUNGS, "auto"):
        shown += [(rung, describe_topk(r["k"]), r) for r in record["ladder"] if r["rung"] == rung]
    for rung, k, row in shown:
        mass = recalls.get(row.get("k")) if not isinstance(row.get("k"), list) else None
        recall = {"best": "best", "trained": "recall", "window": "window"}.get(rung)
        table.add_row(
            rung,
            k,
            f"{row['loss']:.4f}",
            f"{row['increase']:+.2%}" if row is not dense else "",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}" if row is not dense else "",
            f"{row['top1']:.1%}" if row is not dense else "",
            f"{mass[recall]:.3f}" if mass and recall else "",
            f"{mass['normalised']:.3f}" if mass and rung == "trained" else "",
        )
    return table


def task_table(records: Sequence[Record]) -> Table:
    """Scores of dense and sparse, a row per task and length."""
    ks = list(dict.fromkeys(record["k"] for record in records))
    table = Table(title=f"retrieval, {records[0]['samples']} samples each: share of the expected strings in the answer")
    for name in ("task", "tokens", "dense", *(f"k = {k}" for k in ks)):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name, length in dict.fromkeys((record["task"], record["length"]) for record in records):
        row = {r["k"]: r for r in records if (r["task"], r["length"]) == (name, length)}
        dense = next(iter(row.values()))["dense"]
        table.add_row(name, f"{length:,}", f"{dense:.2f}", *(f"{row[k]['sparse']:.2f}" for k in ks))
    return table


if __name__ == "__main__":
    run(main)
