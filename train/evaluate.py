"""python -m train.evaluate: what sparsity costs a checkpoint, on held-out text and on retrieval tasks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from dsa_export.cli import UserError, console, not_negative, path, positive, progress_bar, run
from dsa_export.config import DSAConfig
from dsa_export.files import (
    MANIFEST,
    as_in_manifest,
    check_output,
    manifest_object,
    output_folder,
    read_manifest,
    remove_partial,
    temporary_name,
    write_atomically,
    write_manifest,
)
from dsa_export.model import load_model, load_tokenizer
from dsa_export.model.checkpoint import DEFAULT_CHECKPOINT, adapted_config, load_config, model_source, require_indexer
from dsa_export.selection import add_selection_arguments, selection_options
from plugins.index_topk.op import check_options, forced_groups
from train import options, plots, precision
from train.allocation import allocate, check_budget, check_topk_output, write_topk
from train.data import TrainingData, check_tokenizer, load_data
from train.distributed import pick_device
from train.documents import check_source
from train.ladder import RUNGS
from train.study import Choice, Record, Study
from train.tables import show, task_table, text_table
from train.tasks import TASKS, smallest
from train.timing import decoding_speed
from train.trainer import another_run, first_difference

OUT = Path("out/evaluation")
KIND, RESULTS = "evaluation", "results.json"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Measures what a sparse checkpoint loses against its own dense attention, on held-out text (a "
        "ladder of selections at every k) and on retrieval tasks made here; prints tables, writes JSON and pictures.",
        epilog="The ladder, at each k: best (the keys of most attention mass), output (those that add most to each "
        "layer's output), trained (the checkpoint's indexer), random (one of random weights), window (the last k "
        "keys); `--base` adds the checkpoint before training. With k of the whole length the model must equal its "
        "dense self, or the command fails. A stopped run (Ctrl-C, kill, power) goes on when the same command is given "
        "again: each length of text and each task at each length is kept once it is measured.",
    )
    where = result.add_argument_group("input and output")
    where.add_argument(
        "--model",
        default=DEFAULT_CHECKPOINT,
        metavar="DIR",
        help=f"checkpoint with an indexer, folder or hub name [{DEFAULT_CHECKPOINT}]",
    )
    where.add_argument(
        "--base", metavar="NAME", help="the checkpoint before training, dense: what all else is compared with as well"
    )
    where.add_argument(
        "--data", metavar="SOURCE", help="as in training [what the checkpoint was trained on, else stdlib]"
    )
    where.add_argument("--out", type=path, default=OUT, metavar="DIR", help=f"output folder [{OUT}]")
    where.add_argument(
        "--overwrite", action="store_true", help="replace a stopped run of other arguments, and an earlier --write-topk"
    )
    where.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … [auto: a GPU if there is one]")
    where.add_argument("--dtype", choices=options.DTYPES, default="fp32", help="of the computation [fp32]")
    where.add_argument("--seed", type=options.seed, default=0, help="of windows, samples and the random indexer [0]")
    where.add_argument("--quick", action="store_true", help="a first look: 2 windows, one k, 1 sample of two tasks")

    text = result.add_argument_group("held-out text")
    text.add_argument("--length", type=int, nargs="+", metavar="T", help="tokens per window [2048; small models: 512]")
    text.add_argument(
        "--topk", "--k", dest="topk", nargs="+", metavar="K",
        help="numbers of selected keys; `auto` adds k by layer under --k-budget [T/16 T/8 T/4 of the longest T, "
        "as the selection takes it]",
    )  # fmt: skip
    text.add_argument("--windows", type=positive, metavar="N", help="windows per length [4; --quick: 2]")
    text.add_argument("--rungs", nargs="+", choices=RUNGS, help="[all]")
    text.add_argument(
        "--score-tokens",
        type=positive,
        metavar="N",
        help="score the last N tokens of each window only, after a prefix that attends to everything: long windows "
        "then cost little more than one dense forward (without the rung `random`, whose keys it would need) [all]",
    )
    text.add_argument(
        "--every",
        type=positive,
        metavar="N",
        help="measure the attention of every N-th query [1 up to 1024 tokens, else 8]",
    )
    text.add_argument(
        "--min-tokens", type=not_negative, default=64, metavar="N", help="leave out shorter documents [64]"
    )
    add_selection_arguments(result)
    text.add_argument("--packing", choices=("pack", "cut"), default="pack", help="as in training [pack]")
    text.add_argument("--allow-malformed", action="store_true", help="leave out lines that cannot be read")

    auto = result.add_argument_group("k by layer (--k auto)")
    auto.add_argument("--k-budget", type=positive, metavar="K", help="mean k over the layers [the checkpoint's own]")
    auto.add_argument("--k-step", type=positive, metavar="N", help="every k is a multiple of this [budget / 8]")
    auto.add_argument(
        "--k-floor",
        type=positive,
        metavar="N",
        help="the least k of a layer [one step, more if more are always selected]",
    )
    auto.add_argument(
        "--write-topk", type=path, metavar="DIR",
        help="write the checkpoint with the chosen k there, its weights hard-linked: export and engines follow it",
    )  # fmt: skip

    retrieval = result.add_argument_group("retrieval tasks")
    retrieval.add_argument(
        "--tasks", nargs="+", choices=[*TASKS, "all"], default=[], help="[none; --quick: passkey kv]"
    )
    retrieval.add_argument(
        "--task-lengths", type=int, nargs="+", metavar="T", help="tokens of prompt and answer [--length]"
    )
    retrieval.add_argument("--samples", type=positive, metavar="N", help="per task and length [5; --quick: 1]")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_output(args.out, KIND)
    config = load_config(args.model)
    resolve(args, config)
    assert isinstance(config, DSAConfig)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(tokenizer, config.vocab_size)
    for name in args.tasks:
        for length in args.task_lengths:
            smallest(name, length, tokenizer, args.seed)  # raises where a length is too short
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
            allow_malformed=args.allow_malformed,
            scored=args.score_tokens,
        )
        for length in args.length
    }
    for length, part in data.items():
        check_measured(args, length, int(part.held_out.lengths.max()))
    source = model_source(args.model)
    facts = manifest_facts(args, data)
    partial = temporary_name(args.out)
    check_partial(args.out, source, facts, args.overwrite)
    console.print(f"Loading {args.model}")
    compute = options.DTYPES[args.dtype]
    model = load_model(args.model, **selection_options(args)).to(device)  # its decoding is timed in fp32
    base = precision.load_frozen(args.base, compute, attention="dense").to(device).train() if args.base else None
    study = Study(model, args.rungs, args.every, args.seed, base, args.score_tokens)
    try:
        with precision.autocast(device, compute), output_folder(args.out, keep_partial=True) as out:
            write_manifest(out, KIND, source, **facts)
            results = measure(study, args, data, tokenizer, out)
            plot(results, out)
            if args.write_topk:
                ks, selection = results["auto"]["topk"], selection_options(args)
                by_layer = {"budget": args.k_budget, "data": {"path": args.data}}
                write_topk(Path(args.model), ks, selection, args.write_topk, **by_layer)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; what was measured is kept in {partial}: the same command goes on from there"
        ) from None
    if args.write_topk:
        console.print(
            f"Wrote {args.write_topk}/: the same weights with k by layer; export it with --model {args.write_topk}"
        )
    console.print(f"Wrote {args.out}/: {RESULTS}, {MANIFEST} and {len(list(args.out.glob('*.png')))} pictures")


def check_measured(args: argparse.Namespace, length: int, longest: int) -> None:
    """Raises UserError if no query that is measured sees more than the least k. longest: tokens of a window."""
    scored = args.score_tokens or longest
    if scored < args.every or longest - scored + scored // args.every * args.every <= min(args.ks):
        raise UserError(
            f"no measured query (--every {args.every}) of the windows of {length} tokens, the longest of which holds "
            f"{longest}, sees more than k = {min(args.ks)} keys: lower --topk or --every, or choose --packing pack"
        )


def manifest_facts(args: argparse.Namespace, data: Mapping[int, TrainingData]) -> Record:
    """What the manifest says of a run beside its checkpoint: all that its figures depend on, as JSON values."""
    free = ("model", "out", "overwrite", "write_topk")
    facts = {
        "arguments": {name: value for name, value in sorted(vars(args).items()) if name not in free},
        "base": model_source(args.base) if args.base else None,
        "data": {str(length): part.facts["sha256"] for length, part in data.items()},
        "torch": torch.__version__,
    }
    return as_in_manifest(facts)


def check_partial(out: Path, source: Record, facts: Record, overwrite: bool) -> None:
    """Raises UserError if a stopped run measured something else than this one; with `overwrite` it is forgotten."""
    partial = temporary_name(out)
    check_output(partial, KIND)
    if not (partial / MANIFEST).is_file():
        if overwrite:
            remove_partial(out)
        return
    there = read_manifest(partial, KIND, "python -m train.evaluate")
    difference = first_difference(there, {"kind": KIND, "source": source, **facts})
    if difference and overwrite:
        remove_partial(out)
    elif difference:
        raise another_run(partial, difference)


def measure(
    study: Study, args: argparse.Namespace, data: Mapping[int, TrainingData], tokenizer: Any, out: Path
) -> Record:
    """All that results.json holds. Written there piece by piece; what it holds already is not measured again."""
    config = study.model.config
    topk = config.topk_per_layer
    results: Record = {"model": args.model, "topk": list(topk), "text": [], "tasks": []}
    if (out / RESULTS).is_file():
        results = json.loads((out / RESULTS).read_text())
        console.print(f"Going on where {out} was left")

    def keep() -> None:
        write_atomically(out / RESULTS, json.dumps(results, indent=1) + "\n")

    def count(progress: Progress, what: str, total: int) -> None:
        task = progress.add_task(what, total=total)
        study.tick = lambda: progress.advance(task)

    choices = [Choice(str(k), (k,) * config.num_hidden_layers) for k in args.ks]
    with progress_bar() as progress:
        if args.auto:
            if "auto" not in results:
                windows = data[max(args.length)].train
                share = study.model.config.index_share
                count(progress, "k by layer", len(windows))
                results["auto"] = {
                    "budget": args.k_budget,
                    "step": args.k_step,
                    "floor": args.k_floor,
                    "topk": allocate(
                        study.caught(windows), args.k_budget, step=args.k_step, floor=args.k_floor, share=share
                    ),
                    # training text: the ladder is on held-out text
                    "chosen_on": data[max(args.length)].facts["sha256"],
                }
                keep()
            chosen = results["auto"]["topk"]
            choices.append(Choice("auto", tuple(chosen)))
            console.print(f"k by layer: {' '.join(map(str, chosen))} (mean {sum(chosen) / len(chosen):.0f})")
        for length, part in data.items():
            record = next((record for record in results["text"] if record["length"] == length), None)
            if record is None:
                count(progress, f"text, {length:,} tokens", study.forwards(choices, part.held_out))
                record, meter = study.text(part.held_out, choices)
                study.model.set_topk(topk)
                record |= {**decoding_speed(study.model, length), "data": part.facts}
                first = int(part.held_out.lengths[0])  # the maps are of this window; those of the longest length stay
                plots.plot_maps(meter.maps, meter.ks[0], first, args.score_tokens or first, out / "maps.png")
                results["text"].append(record)
                keep()
            show(text_table(record))
        for name in args.tasks:
            for length in args.task_lengths:
                if any((record["task"], record["length"]) == (name, length) for record in results["tasks"]):
                    continue
                count(progress, f"{name}, {length:,} tokens", args.samples * (1 + len({*map(str, choices)})))
                results["tasks"] += study.task(name, length, args.samples, choices, tokenizer)
                keep()
            show(task_table([record for record in results["tasks"] if record["task"] == name]))
    return results


def resolve(args: argparse.Namespace, config: Any) -> None:
    """Fills what was left out, and checks what hangs together. Raises UserError with one line before time is spent."""
    require_indexer(config, args.model)
    trained_share = config.index_share
    config = adapted_config(config, **selection_options(args))
    fill_defaults(args, config)
    check_scored_end(args)
    choose_data(args)
    check_base(args, config)
    most = most_k(pick_device(args.device))
    resolve_ks(args, config, most)
    check_ranges(args, config)
    check_ks(args, config, most)
    if args.auto:
        resolve_budget(args, config, trained_share)
    else:
        for name in ("k_budget", "k_step", "k_floor", "write_topk"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --topk auto")


def fill_defaults(args: argparse.Namespace, config: DSAConfig) -> None:
    small = config.hidden_size <= options.SMALL_HIDDEN_SIZE
    args.length = sorted(set(args.length or [512 if small else 2048]))
    args.windows = args.windows or (2 if args.quick else 4)
    for name in ("samples", "task_lengths"):
        if getattr(args, name) and not (args.tasks or args.quick):
            raise UserError(f"--{name.replace('_', '-')} needs --tasks")
    args.samples = args.samples or (1 if args.quick else 5)
    args.every = args.every or (1 if (args.score_tokens or max(args.length)) <= 1024 else 8)
    args.rungs = args.rungs or [rung for rung in RUNGS if not (args.score_tokens and rung == "random")]
    if args.quick and not args.tasks:
        args.tasks = ["passkey", "kv"]
    args.tasks = list(TASKS) if "all" in args.tasks else list(dict.fromkeys(args.tasks))
    args.task_lengths = sorted(set(args.task_lengths or args.length))


def check_scored_end(args: argparse.Namespace) -> None:
    if not args.score_tokens:
        return
    if args.score_tokens >= min(args.length) or args.score_tokens < 2:
        raise UserError(
            f"--score-tokens {args.score_tokens} must be at least 2 and less than --length {min(args.length)}"
        )
    if args.packing == "cut":
        raise UserError("--score-tokens needs --packing pack: it is about the end of a window, which `cut` pads")
    if "random" in args.rungs:
        raise UserError("--score-tokens excludes the rung random: the prefix has no keys of a random indexer")


def choose_data(args: argparse.Namespace) -> None:
    if args.data is None:
        args.data = trained_on(args.model) or "stdlib"
        try:
            check_source(args.data)
        except UserError as error:
            raise UserError(f"{error} (on which {args.model} was trained): name other --data") from None


def check_base(args: argparse.Namespace, config: DSAConfig) -> None:
    if args.base == "":
        raise UserError("--base is empty: name a checkpoint, or leave it out")
    if args.base and adapted_config(load_config(args.base), "dense").vocab_size != config.vocab_size:
        raise UserError(f"--base {args.base} has another vocabulary than {args.model}")


def resolve_ks(args: argparse.Namespace, config: DSAConfig, most: int) -> None:
    """args.ks, the k that are the same in all layers, and args.auto, whether k by layer under args.k_budget is added.

    most: the largest k that can be measured.
    """
    shares = (8,) if args.quick else (16, 8, 4)
    pool, longest = config.index_pool, max(args.length)
    shown = [max(least_k(config), min(longest // share, most) // pool * pool) for share in shares]
    wanted = args.topk or list(dict.fromkeys(map(str, shown)))
    args.auto = "auto" in wanted
    if args.auto:
        args.k_budget = args.k_budget or round(sum(config.topk_per_layer) / config.num_hidden_layers)
    try:
        args.ks = sorted({int(k) for k in wanted if k != "auto"} | ({args.k_budget} if args.auto else set()))
    except ValueError:
        raise UserError(f"--topk takes whole numbers and `auto`, got {' '.join(wanted)}") from None


def least_k(config: DSAConfig) -> int:
    """What is always selected, and at least a group."""
    pool = config.index_pool
    return pool * max(1, forced_groups(config.index_sinks, config.index_window, pool))


def check_ranges(args: argparse.Namespace, config: DSAConfig) -> None:
    """Raises UserError for a k or length too small, or a length beyond the model's positions."""
    for name, values, least in (
        ("topk", args.ks, 1),
        ("length", args.length, 8),
        ("task-lengths", args.task_lengths, 8),
    ):
        if min(values) < least:
            raise UserError(f"--{name} must be at least {least}, got {min(values)}")
    for name, values in (("length", args.length), ("task-lengths", args.task_lengths)):
        if max(values) > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise UserError(f"--{name} {max(values)} is beyond the model's {limit} positions")


def check_ks(args: argparse.Namespace, config: DSAConfig, most: int) -> None:
    """Raises UserError for a k that cannot be measured, or if every one covers a whole text."""
    for k in args.ks:
        check_selected("topk", k, config)
    if max(args.ks) > most:
        raise UserError(f"--topk {max(args.ks)}: the GPU kernels select up to {most} keys; --device cpu takes more")
    longest = max(args.length)
    if args.auto and args.k_budget >= longest:
        raise UserError(
            f"--k-budget {args.k_budget} leaves nothing to choose at {longest} tokens: measure a longer --length"
        )
    if min(args.ks) >= min(args.length):
        raise UserError(f"k = {min(args.ks)} leaves nothing out of {min(args.length)} tokens: lower --topk")


def check_selected(option: str, k: int, config: DSAConfig) -> None:
    try:
        check_options(k, config.index_sinks, config.index_window, config.index_pool)
    except ValueError as error:
        raise UserError(f"--{option} {k} does not fit the options of the selection: {error}") from None


def resolve_budget(args: argparse.Namespace, config: DSAConfig, trained_share: int) -> None:
    """How k by layer is chosen. trained_share: index_share of the checkpoint, config's being that of the arguments."""
    pool = config.index_pool
    args.k_step = args.k_step or max(pool, args.k_budget // 8 // pool * pool)
    if args.k_step % pool:
        raise UserError(f"--k-step {args.k_step} must be a multiple of the pool of {pool} keys")
    args.k_floor = args.k_floor or args.k_step * -(-least_k(config) // args.k_step)
    check_selected("k-floor", args.k_floor, config)
    check_budget(args.k_budget, step=args.k_step, floor=args.k_floor)
    if args.write_topk:
        if config.index_share != trained_share:
            raise UserError(
                f"--write-topk keeps the checkpoint's weights, with indexers that --index-share {config.index_share} "
                "takes from layers: train.warmup with it first"
            )
        check_topk_output(args.write_topk, args.model, args.out, args.overwrite)


def most_k(device: torch.device) -> int:
    """The largest k that can be measured on the device."""
    if device.type != "cuda":
        return sys.maxsize
    from plugins.index_topk.plan import MAX_K  # needs triton

    return MAX_K


def trained_on(model: str) -> str | None:
    """The data that the checkpoint's manifest names, if there is one."""
    if not (Path(model) / MANIFEST).is_file():
        return None
    made_by = "python -m train.joint"
    manifest = read_manifest(Path(model), "checkpoint", made_by)
    return manifest_object(Path(model), manifest, "data", made_by).get("path")


def plot(results: Record, out: Path) -> None:
    """The pictures of what results.json holds."""
    plots.plot_losses(results["text"], out / "loss.png")
    plots.plot_recall(results["text"], out / "recall.png")
    longest = results["text"][-1]
    plots.plot_heads(longest["heads"], longest["length"], out / "heads.png")
    if results["tasks"]:
        plots.plot_tasks(results["tasks"], out / "tasks.png")


if __name__ == "__main__":
    run(main)
