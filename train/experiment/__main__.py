"""Does sparse attention learn as well as dense attention, and from which length on is it faster?

Trains twins from scratch that differ in attention alone (dense, DSA, NSA), from the same weights and on the same data
for every seed, measures them on held-out text, times them over lengths, and writes tables and pictures.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsa_export.cli import UserError, console, not_negative, path, positive, progress_bar, run
from dsa_export.files import (
    MANIFEST,
    as_in_manifest,
    check_output,
    check_writable,
    output_folder,
    read_manifest,
    write_manifest,
)
from dsa_export.model import load_model
from train import distributed
from train.base import train_tokenizer
from train.data import MAX_ROWS, TrainingData, load_data
from train.distributed import Processes
from train.documents import CACHE, training_texts
from train.experiment import measure, report
from train.experiment.presets import PRESETS, Preset, quick
from train.experiment.twins import Plan, Twin, train_twin
from train.options import DTYPES, positive_number, seed
from train.trainer import read_steps

OUT = Path("out/experiment")
ATTENTION = ("dense", "dsa", "nsa")
DEFAULT_SEEDS, SPEED_LENGTHS = (0, 1, 2), (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_SPEED_LENGTHS = (128, 512, 2048)
MIN_TOKENS = 64
DATA_SEED = 0
"""All seeds read the same windows, each in an order of its own, and are measured on the same held-out ones."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m train.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Presets: glm4-moe and plain, 128 tokens; glm4-moe-256 … glm4-moe-4096 and plain-256 … plain-4096 (the "
        "same decoder with\na plain feed-forward). Several presets share one table. Several processes: accelerate "
        "launch --num_processes 2 -m train.experiment …\n\nA stopped run (Ctrl-C, kill, power) goes on when the same "
        "command is given again; finished twins are not trained\nagain, also when seeds, presets or attentions "
        "are added.\n\nThe timings here are torch's. Each sparse twin is a checkpoint, <out>/runs/<preset>-<attention>-"
        "seed<n>; in ONNX Runtime, at\nany length:\n"
        "  python -m dsa_export.onnx --model <checkpoint> --out out/twin-onnx\n"
        "  python -m engines.build --onnx out/twin-onnx --out out/twin-engines --max-batch 1 --max-context 65536 \\\n"
        "      --beyond-positions\n"
        "  python bench/compare.py --engines out/twin-engines --caches random --phase decode --peers none \\\n"
        "      --context 128 1024 4096 16384 65536",
    )
    what = result.add_argument_group("what is compared")
    what.add_argument("--preset", nargs="+", choices=PRESETS, default=["glm4-moe"], metavar="NAME", help="[glm4-moe]")
    what.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION), help="[dense dsa nsa]")
    what.add_argument("--seeds", type=seed, nargs="+", metavar="N", help="[0 1 2; --quick: 0]")
    what.add_argument("--quick", action="store_true", help="the whole experiment in small: two minutes on a laptop")
    what.add_argument(
        "--k", nargs="+", metavar="K",
        help="keys that DSA selects: one number, one per layer, or `auto` (by layer after the warm-up, with the "
        "preset's k as their mean) [the preset's: 64 up to 512 tokens, then an eighth of the length]",
    )  # fmt: skip
    what.add_argument(
        "--speed-lengths", type=int, nargs="*", metavar="T",
        help="tokens at which decoding and prefill are timed [128 to 16384; --quick: 128 512 2048]",
    )  # fmt: skip
    what.add_argument(
        "--prefill-limit",
        type=not_negative,
        default=2048,
        metavar="T",
        help="prefill is timed up to this length [2048]",
    )

    training = result.add_argument_group("training (defaults: the preset's)")
    training.add_argument("--steps", type=positive, metavar="N", help="updates of the main stage [3000]")
    training.add_argument("--warm-up", type=not_negative, metavar="N", help="updates of the warm-up before it [200]")
    training.add_argument("--lr", type=positive_number, help="peak learning rate of the main stage [3e-3]")
    training.add_argument("--warm-up-lr", type=positive_number, help="of the warm-up [1e-3]")
    training.add_argument("--tokens-per-update", type=positive, metavar="N", help="[2048]")
    training.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the computation; weights stay fp32 [fp32]"
    )
    training.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … [auto: a GPU if there is one]")
    training.add_argument("--parallel", choices=("ddp", "fsdp"), help="for several processes [ddp]")
    training.add_argument(
        "--save-every", type=positive, default=50, metavar="N", help="updates between saved states [50]"
    )

    where = result.add_argument_group("input and output")
    where.add_argument("--data", default="stdlib", metavar="SOURCE", help="as in train.warmup [stdlib]")
    where.add_argument("--allow-malformed", action="store_true", help="leave out lines that cannot be read")
    where.add_argument("--vocabulary", type=int, metavar="N", help="tokens of the tokenizer trained on it [4096]")
    where.add_argument("--held-out", type=positive, metavar="N", help="windows to measure on [64]")
    where.add_argument("--cache", type=path, default=CACHE, metavar="DIR", help=f"where tokens are kept [{CACHE}]")
    where.add_argument("--out", type=path, metavar="DIR", help=f"output folder [{OUT}; --quick: {OUT}-quick]")
    where.add_argument("--overwrite", action="store_true", help="train everything again")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    presets = resolve(args)
    processes = distributed.start(args.device, args.parallel)
    for preset in presets:
        if preset.batch_size % processes.count:
            raise UserError(
                f"{preset.batch_size} windows per update cannot be dealt out to {processes.count} processes"
            )
    prepare_output(args, processes)
    notes = remarks(presets, args)
    for note in notes:
        console.print(note)
    plan = make_plan(args, presets, processes)
    twins = [Twin(p, attention, seed) for p in presets for seed in args.seeds for attention in args.attention]
    folders = {}
    for number, twin in enumerate(twins, start=1):
        console.print(f"[{number}/{len(twins)}] {twin.name}")
        folders[twin] = train_twin(twin, plan)
    if processes.is_first:
        write(args, plan, folders, notes)
    processes.wait()
    processes.leave()


def resolve(args: argparse.Namespace) -> list[Preset]:
    """The presets with what the arguments change. Raises UserError with one line for what cannot work."""
    args.out = args.out or (Path(f"{OUT}-quick") if args.quick else OUT)
    args.attention = [name for name in ATTENTION if name in args.attention]
    args.seeds = list(
        dict.fromkeys(args.seeds if args.seeds is not None else DEFAULT_SEEDS[:1] if args.quick else DEFAULT_SEEDS)
    )
    if args.speed_lengths is None:
        args.speed_lengths = list(QUICK_SPEED_LENGTHS if args.quick else SPEED_LENGTHS)
    measure.check_lengths(args.speed_lengths)
    names = list(dict.fromkeys(args.preset))
    if "dense" not in args.attention:
        raise UserError("--attention needs dense: it is what the others are measured against")
    if args.vocabulary is not None and args.vocabulary < 300:
        raise UserError(f"--vocabulary must be at least 300 (256 bytes and the chat tokens), got {args.vocabulary}")
    changes: dict[str, Any] = {
        "steps": args.steps,
        "warm_up_updates": args.warm_up,
        "lr": args.lr,
        "warmup_lr": args.warm_up_lr,
        "tokens_per_update": args.tokens_per_update,
        "vocabulary": args.vocabulary,
        "held_out": args.held_out,
    }
    presets = [quick(PRESETS[name]) if args.quick else PRESETS[name] for name in names]
    presets = [replace(preset, **{k: v for k, v in changes.items() if v is not None}) for preset in presets]
    args.auto_k = args.k == ["auto"]
    if args.k is not None:
        check_k(args, presets)
        if not args.auto_k:
            ks = [int(k) for k in args.k]
            presets = [replace(preset, topk=ks[0] if len(ks) == 1 else tuple(ks)) for preset in presets]
    try:
        for preset in presets:
            preset.config()
    except ValueError as error:
        raise UserError(str(error)) from None
    return presets


def check_k(args: argparse.Namespace, presets: Sequence[Preset]) -> None:
    if "dsa" not in args.attention:
        raise UserError("--k is DSA's: it needs dsa among --attention")
    if args.auto_k:
        for preset in presets:
            if not preset.warm_up_updates:
                raise UserError("--k auto chooses by what the warm-up taught the indexers: it needs --warm-up above 0")
            if isinstance(preset.topk, int) and preset.topk >= preset.length:
                raise UserError(f"--k auto: k = {preset.topk} leaves nothing to choose at {preset.length} tokens")
        return
    if "auto" in args.k or not all(k.isdecimal() and int(k) for k in args.k):
        raise UserError(f"--k takes whole numbers from 1 on, or `auto` alone, got {' '.join(args.k)}")
    for preset in presets:
        if len(args.k) not in (1, preset.layers):
            raise UserError(f"--k takes one number or one per layer: {preset.name} has {preset.layers} layers")


def remarks(presets: Sequence[Preset], args: argparse.Namespace) -> list[str]:
    """What a reader of the table must know."""
    notes = []
    for preset in presets:
        ks = [preset.topk] if isinstance(preset.topk, int) else preset.topk
        if "dsa" in args.attention and max(ks) >= preset.length:
            notes.append(
                f"{preset.name}: k = {max(ks)} covers all {preset.length} tokens: DSA attends to everything there"
            )
        full = PRESETS[preset.name]
        reduced = "" if preset == full else f" (the full preset: {described(full)})"
        notes.append(f"{preset.name}: {described(preset)}{reduced}")
    notes.append(
        "every twin makes all of these updates, the warm-up counted: there DSA attends to everything and trains base "
        "and indexer, the others train as ever"
    )
    notes.append(
        "± is the standard deviation over the seeds; coverage is the attention mass that DSA's selection catches, "
        "window and best that of the last k keys and of the best possible k, all these and the mean distance over the "
        "queries that see more than k keys; step MiB is beside weights and optimizer; "
        f"{torch.get_num_threads()} threads, {args.dtype}"
    )
    return notes


def described(preset: Preset) -> str:
    """The model and its training, in one line."""
    experts = f"{preset.active} of {preset.experts} experts of {preset.expert_size}"
    feed_forward = experts if preset.feed_forward == "moe" else f"feed-forward of {preset.active * preset.expert_size}"
    return (
        f"{preset.layers} layers of {preset.hidden_size}, {preset.heads} heads, {feed_forward}, {preset.vocabulary} "
        f"tokens of vocabulary; {preset.warm_up_updates} + {preset.steps} updates of {preset.batch_size} × "
        f"{preset.length} tokens"
    )


def prepare_output(args: argparse.Namespace, processes: Processes) -> None:
    """Makes <out> with its manifest, so that a stopped experiment is known as ours. Raises UserError if it is not."""
    check_output(args.out)
    check_writable(args.cache, "--cache")
    stopped = False
    if (args.out / MANIFEST).is_file():
        manifest = read_manifest(args.out, "experiment", "python -m train.experiment")
        stopped = manifest.get("arguments") == as_in_manifest(vars(args)) and not (args.out / "report").exists()
    processes.wait()  # all have looked before the first one replaces it
    if processes.is_first:
        if args.overwrite and not stopped:  # by this very command, which began by removing what was there
            shutil.rmtree(args.out, ignore_errors=True)
        args.out.mkdir(parents=True, exist_ok=True)
        write_manifest(args.out, "experiment", {"path": args.data}, torch=torch.__version__, arguments=vars(args))
    processes.wait()


def make_plan(args: argparse.Namespace, presets: Sequence[Preset], processes: Processes) -> Plan:
    """Tokenizers and windows, the same in every process; the first one writes what is cached."""
    tokenizers: dict[int, Any] = {}
    data: dict[str, TrainingData] = {}
    for preset in presets:
        if preset.vocabulary not in tokenizers:
            texts = training_texts(args.data, args.allow_malformed, args.cache, MAX_ROWS)
            with processes.first_goes_first(), console.status("Training the tokenizer"):
                tokenizers[preset.vocabulary] = train_tokenizer(texts, preset.vocabulary)
        with processes.first_goes_first():
            data[preset.name] = load_data(
                args.data,
                tokenizers[preset.vocabulary],
                preset.length,
                train_windows=(preset.warm_up_updates + preset.steps) * preset.batch_size,
                held_out_windows=preset.held_out,
                min_tokens=MIN_TOKENS,
                seed=DATA_SEED,
                allow_malformed=args.allow_malformed,
                train_on_prompt=True,
                cache=args.cache,
            )
        if len(data[preset.name].train) < 2:
            raise UserError(f"{args.data} fills less than two windows of {preset.length} tokens: more text is needed")
    runs = args.out / "runs"
    runs.mkdir(exist_ok=True)
    return Plan(
        runs, data, args.data, tokenizers, processes, DTYPES[args.dtype], args.auto_k, args.save_every
    )  # fmt: skip


def write(args: argparse.Namespace, plan: Plan, folders: dict[Twin, Path], notes: Sequence[str]) -> None:
    """Measures the twins and writes <out>/report."""
    records, selections = [], {}
    with console.status("Measuring"):
        for twin, run_folder in folders.items():
            of_first_seed = twin.seed == args.seeds[0]
            record, selected = measure.record_of(twin, run_folder, plan, memory=of_first_seed)
            records.append(record)
            if twin.attention == "dsa" and of_first_seed:
                if selected is None:  # the record was there
                    model = load_model(run_folder).to(plan.processes.device)
                    selected = measure.selection(model, plan.data[twin.preset.name].held_out)
                selections[twin.preset.name] = selected
    speeds = time_lengths(args, folders, plan)
    with output_folder(args.out / "report") as folder:
        text = report.write(folder, records, speeds, notes)
        curves: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
        for twin, run_folder in folders.items():
            curves.setdefault((twin.preset.name, twin.attention), []).append(read_steps(run_folder))
        for preset, selected in selections.items():
            report.plot_selection(selected, lambda what, preset=preset: folder / f"{what}-{preset}.png")  # type: ignore[misc]
        report.plot_curves(curves, folder / "loss.png")
        if speeds:
            report.plot_speed(speeds, folder / "speed.png")
        runs = {twin.name: str(run_folder) for twin, run_folder in folders.items()}
        data = {name: d.facts for name, d in plan.data.items()}
        write_manifest(folder, "experiment report", {"path": str(args.out)}, runs=runs, data=data, notes=notes)
        pictures = len(list(folder.glob("*.png")))
    console.print(text)
    console.print(f"Wrote {args.out}/report: results.md, results.json, results.jsonl and {pictures} pictures")


def time_lengths(args: argparse.Namespace, folders: dict[Twin, Path], plan: Plan) -> list[measure.Record]:
    """Dense against sparse over the lengths, on the first preset's twins of the first seed."""
    first = next(iter(folders)).preset
    models = {
        twin.attention: load_model(folder).to(plan.processes.device)
        for twin, folder in folders.items()
        if twin.preset == first and twin.seed == args.seeds[0]
    }
    if len(models) < 2 or not args.speed_lengths:
        return []
    prefills = sum(length <= args.prefill_limit for length in args.speed_lengths)
    with progress_bar() as progress:
        task = progress.add_task("time", total=len(args.speed_lengths) + prefills)
        runs = 5 if args.quick else 11
        return measure.speed(models, args.speed_lengths, args.prefill_limit, runs, lambda: progress.advance(task))


if __name__ == "__main__":
    run(main)
