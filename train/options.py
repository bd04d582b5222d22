"""The arguments that the training commands share, their defaults, and what is checked before time is spent."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from dsa_export.cli import UserError, console, not_negative, path, positive
from dsa_export.files import MANIFEST, check_output, check_writable, manifest_object, read_manifest
from dsa_export.model.checkpoint import has_indexer, load_tokenizer, model_source
from dsa_export.selection import add_selection_arguments, selection_options
from train import distributed
from train.data import MAX_ROWS, TrainingData, check_tokenizer, load_data
from train.distributed import Processes, pick_device
from train.documents import CACHE, check_source
from train.losses import TARGETS
from train.muon import muon
from train.precision import is_fast_in_bf16
from train.trainer import Settings, Stage, Trainer, adamw, first_difference

SMALL_HIDDEN_SIZE = 256
"""Models up to this hidden size, such as the default one, train by the small recipe."""

INDEXER_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], Settings, int], list[torch.optim.Optimizer]]] = {
    "muon": muon,
    "adamw": lambda parameters, settings, _: [adamw(parameters, settings)],
}
"""Given the parameters, the settings and the size of an indexer's head."""

SEEDS = 2**32
"""Seeds are below this."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """Defaults of a stage for a size of model."""

    batch_size: int
    length: tuple[int, ...]
    lr: float
    min_tokens: int
    steps: int | None = None
    max_tokens: int | None = None
    """Either of the two, as of --steps and --max-tokens."""
    indexer_lr: float | None = None
    topk: int = 512
    index_heads: int = 8
    index_dim: int = 64
    held_out: int = 8
    kl_queries: int | None = None
    """Of each window in a step, dealt out to its passes."""
    passes: int = 1
    position_span: int = 0
    """As far as the model has positions."""


def positive_number(text: str) -> float:
    """The type of an argument that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive, finite number")
    return number


def seed(text: str) -> int:
    """The type of an argument that is a seed."""
    if (number := not_negative(text)) >= SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is not below {SEEDS}")
    return number


def argument_parser(
    name: str,
    description: str,
    small: Recipe,
    real: Recipe | None,
    out: str,
    model_help: str | None = None,
    *,
    trains_indexer: bool = False,
) -> argparse.ArgumentParser:
    """The parser of `python -m train.<name>`. Arguments left out are None and filled by resolve().

    model_help: what --model is; None: the stage has no such argument.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m train.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A stopped run (Ctrl-C, kill, power) goes on when the same command is given again, and ends in the same "
        "weights.\nWithout a terminal the progress bar becomes a line now and then.",
    )
    _add_places(parser, out, model_help)
    run = parser.add_argument_group("training")
    _add_extent(run, small, real)
    if trains_indexer:
        _add_indexer_training(run, small, real)
    _add_optimization(run, small, real)
    _add_running(run)
    _add_data(parser, small, real)
    return parser


def _default(field: str, small: Recipe, real: Recipe | None) -> str:
    """What the help says of a default that hangs on the model's size."""
    values = [getattr(recipe, field) for recipe in (real, small) if recipe]
    shown = [" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values]
    return f"[{shown[0]}]" if shown[0] == shown[-1] else f"[{shown[0]}; small models: {shown[-1]}]"


def _add_places(parser: argparse.ArgumentParser, out: str, model_help: str | None) -> None:
    where = parser.add_argument_group("input and output")
    if model_help:
        where.add_argument("--model", metavar="NAME", help=model_help)
    where.add_argument(
        "--data",
        default="stdlib",
        metavar="SOURCE",
        help="JSON lines of chats (messages), of plain text (text), or of instruction, input and output (a file, a "
        "folder, hf:// or https://), a folder of text or code (one document a file), or one file of text [stdlib: the "
        "Python standard library's sources]",
    )
    where.add_argument("--out", type=path, default=Path(out), metavar="DIR", help=f"output folder [{out}]")
    where.add_argument(
        "--overwrite", action="store_true", help="replace a finished run, or a stopped one of other arguments"
    )


def _add_extent(run: argparse._ArgumentGroup, small: Recipe, real: Recipe | None) -> None:
    """How much is read."""
    end = run.add_mutually_exclusive_group()
    recipes = [recipe for recipe in (real, small) if recipe]
    length_of_run = "; small models: ".join(
        f"{recipe.steps} updates" if recipe.steps else f"{recipe.max_tokens} tokens" for recipe in recipes
    )
    end.add_argument("--steps", type=positive, metavar="N", help="updates")
    end.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help=f"as many updates as read at most this many tokens [{length_of_run}]",
    )
    run.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"windows per micro-batch {_default('batch_size', small, real)}",
    )
    run.add_argument(
        "--accumulation",
        type=positive,
        metavar="N",
        help="micro-batches per update, dealt out to the processes: the same update whatever their number [one each]",
    )
    run.add_argument(
        "--length",
        type=int,
        nargs="+",
        metavar="T",
        help="tokens per window; with several the windows grow in this order, and each length gets the same number of "
        f"tokens: more steps while they are short {_default('length', small, real)}",
    )


def _add_indexer_training(run: argparse._ArgumentGroup, small: Recipe, real: Recipe | None) -> None:
    run.add_argument(
        "--kl-queries",
        type=positive,
        metavar="N",
        help="train and judge the indexer on about N queries of each window, evenly spaced: long windows then cost "
        "little more than the model itself "
        + (
            "[all]"
            if real is None or real.kl_queries is None
            else f"[{real.kl_queries} over --passes; small models: all]"
        ),
    )
    run.add_argument(
        "--kl-target",
        choices=TARGETS,
        default=TARGETS[0],
        help="what of the heads' attention the indexer learns: the root of its mean square (rms), this weighed by "
        "what each key's value adds to the layer's output (output), or, as published, its "
        f"mean [{TARGETS[0]}]",
    )
    run.add_argument(
        "--position-span",
        type=not_negative,
        metavar="N",
        help="let the tokens of a window stand at positions below N, with gaps between some of them: short windows "
        "then teach the distances of longer texts, in the same time; 0: without gaps "
        + (
            f"[{real.position_span}, or the model's positions; small models: {small.position_span}]"
            if real
            else f"[{small.position_span}]"
        ),
    )
    run.add_argument(
        "--indexer-optimizer",
        choices=INDEXER_OPTIMIZERS,
        default="muon",
        help="muon (for matrices, and AdamW for the rest) needs far fewer tokens than AdamW [muon]",
    )


def _add_optimization(run: argparse._ArgumentGroup, small: Recipe, real: Recipe | None) -> None:
    run.add_argument("--lr", type=positive_number, help=f"peak learning rate {_default('lr', small, real)}")
    run.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="[cosine]")
    run.add_argument(
        "--warmup-steps", type=not_negative, metavar="N", help="linear rise of the learning rate [steps / 20]"
    )
    run.add_argument("--clip", type=positive_number, default=1.0, metavar="NORM", help="largest gradient norm [1.0]")
    run.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the computation; weights stay fp32 "
        + (
            "[bf16 on GPUs since Ampere and CPUs with AVX512-BF16 or AMX, else fp32; small models: fp32]"
            if real
            else "[fp32]"
        ),
    )
    run.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")


def _add_running(run: argparse._ArgumentGroup) -> None:
    """On what, from which seed, how long."""
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … [auto: a GPU if there is one]")
    run.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="how the processes of `accelerate launch` or torchrun share the model: ddp, a copy each; fsdp, weights, "
        "gradients and optimizer in shards (FSDP2) [ddp, or what accelerate launch --use_fsdp says]",
    )
    run.add_argument("--seed", type=seed, default=0, help="[0]")
    run.add_argument(
        "--max-minutes", type=positive_number, metavar="M", help="end after this much training time [no limit]"
    )
    run.add_argument("--save-every", type=positive, default=50, metavar="N", help="steps between saved states [50]")


def _add_data(parser: argparse.ArgumentParser, small: Recipe, real: Recipe | None) -> None:
    rows = parser.add_argument_group("data")
    rows.add_argument(
        "--packing", choices=("pack", "cut"), default="pack", help="documents end to end, or one each [pack]"
    )
    rows.add_argument(
        "--min-tokens",
        type=not_negative,
        metavar="N",
        help=f"leave out shorter documents {_default('min_tokens', small, real)}",
    )
    rows.add_argument(
        "--max-rows", type=positive, default=MAX_ROWS, metavar="N", help=f"documents to train on, at most [{MAX_ROWS}]"
    )
    rows.add_argument(
        "--cache",
        type=path,
        default=CACHE,
        metavar="DIR",
        help=f"where tokens are kept for the next run [{CACHE}]",
    )
    rows.add_argument(
        "--held-out",
        type=not_negative,
        metavar="N",
        help=f"windows to evaluate on, before and after; 0: none {_default('held_out', small, real)}",
    )
    rows.add_argument(
        "--allow-malformed", action="store_true", help="go on when more than 1 %% of the lines are malformed"
    )


def add_indexer_arguments(parser: argparse.ArgumentParser, small: Recipe, real: Recipe) -> None:
    group = parser.add_argument_group("indexer")
    group.add_argument(
        "--topk", type=positive, metavar="K", help=f"keys selected per token [{real.topk}; small models: {small.topk}]"
    )
    group.add_argument(
        "--index-heads", type=positive, metavar="N", help=f"[{real.index_heads}; small models: {small.index_heads}]"
    )
    group.add_argument(
        "--index-dim",
        type=positive,
        metavar="N",
        help=f"size of an indexer head [{real.index_dim}; small models: {small.index_dim}]",
    )
    group.add_argument(
        "--index-queries", choices=("own", "shared"), help="own projection, or the attention's queries [own]"
    )
    group.add_argument(
        "--passes",
        type=positive,
        metavar="N",
        help="updates of each step, from one forward pass of the frozen model, about other queries each time: many "
        "about a few are worth more than few about many. Keeps what all layers attend with, 6 GB for 32,768 tokens of "
        "a 0.5B, of every micro-batch "
        f"[{real.passes}; small models, and with fsdp, which cannot: {small.passes}]",
    )
    add_selection_arguments(parser)


def start(args: argparse.Namespace) -> Processes:
    """Checks the arguments and joins the processes that a launcher started. Raises UserError with one line."""
    check(args)
    check_source(args.data)
    check_output(args.out, "checkpoint")
    model = getattr(args, "model", None)
    _require(
        not model or not args.out.exists() or args.out.resolve() != Path(model).resolve(),
        f"--out {args.out} is the --model, which training would replace: choose another folder",
    )
    check_writable(args.cache, "--cache")
    processes = distributed.start(args.device, args.parallel)
    several = processes.count > 1
    if args.accumulation is None:
        args.accumulation = processes.count
    _require(
        args.accumulation % processes.count == 0,
        f"--accumulation {args.accumulation} cannot be dealt out to {processes.count} processes",
    )
    if processes.sharded and hasattr(args, "passes"):
        args.passes = args.passes or 1
        _require(
            args.passes == 1,
            f"--passes {args.passes} needs --parallel ddp: fsdp gathers weights in a forward pass only",
        )
    _require(not several or getattr(args, "model", "") is not None, "several processes need a --model to start from")
    return processes


def check(args: argparse.Namespace) -> None:
    """Raises UserError with one line for the first value given that cannot work, whatever the model."""
    _require(getattr(args, "model", None) != "", "--model is empty: name a checkpoint, or leave it out")
    lengths = args.length or [2]
    _require(min(lengths) >= 2, f"--length must be at least 2, got {min(lengths)}")
    for shorter, longer in pairwise(lengths):
        _require(shorter < longer, f"--length must grow, got {shorter} before {longer}")
        _require(lengths[-1] % shorter == 0, f"--length {shorter} does not divide the longest, {lengths[-1]}")
    _require(len(lengths) == 1 or args.packing == "pack", "--packing cut takes one --length: pieces of a padded window")


def default_lengths(recipe: Recipe, config: PreTrainedConfig, args: argparse.Namespace) -> list[int]:
    """The recipe's, as far as the model's positions and the updates go; the shortest for "cut"."""
    longest = config.max_position_embeddings
    fitting = [length for length in recipe.length if length <= longest] or [longest]
    lengths = fitting[:1] if args.packing == "cut" else fitting
    while len(lengths) > 1 and without_updates(args, lengths):
        lengths.pop()
    return lengths


def updates(args: argparse.Namespace, lengths: Sequence[int]) -> int:
    """--steps, or as many as --max-tokens allows."""
    if args.max_tokens is None:
        return args.steps
    read = Settings(0, tuple(lengths), args.batch_size, args.accumulation)
    steps = int(args.max_tokens / mean_tokens(args, lengths))
    while replace(read, steps=steps).tokens_before(steps) > args.max_tokens:  # shares are whole steps
        steps -= 1
    return steps


def mean_tokens(args: argparse.Namespace, lengths: Sequence[int]) -> float:
    """Tokens of an update, a mean where windows grow."""
    return len(lengths) / sum(1 / length for length in lengths) * args.batch_size * args.accumulation


def without_updates(args: argparse.Namespace, lengths: Sequence[int]) -> list[int]:
    """Those of the lengths that no update falls to."""
    phases = Settings(updates(args, lengths), tuple(lengths), args.batch_size, args.accumulation).phases()
    return [phase.length for phase in phases if phase.end == phase.first]


def resolve(args: argparse.Namespace, small: Recipe, real: Recipe | None, config: PreTrainedConfig) -> None:
    """Fills what was left out from the recipe of the model's size, and checks what hangs together.

    Raises UserError with one line for the first combination that cannot work.
    """
    recipe = small if real is None or config.hidden_size <= SMALL_HIDDEN_SIZE else real
    for name in ("batch_size", "lr", "min_tokens", "held_out"):
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(recipe, name))
    for name in ("indexer_lr", "passes"):
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    if hasattr(args, "kl_queries") and args.kl_queries is None and recipe.kl_queries:
        args.kl_queries = max(1, recipe.kl_queries // getattr(args, "passes", 1))
    if args.dtype is None:
        args.dtype = "bf16" if recipe is not small and is_fast_in_bf16(pick_device(args.device)) else "fp32"
    if args.steps is None and args.max_tokens is None:
        args.steps, args.max_tokens = recipe.steps, recipe.max_tokens
    args.length = list(args.length or default_lengths(recipe, config, args))
    span, shortest = getattr(args, "position_span", None), args.length[0]
    _require(
        not span or span > shortest,
        f"--position-span {span} leaves no gaps in windows of {shortest} tokens: give more, or 0 for none",
    )
    if hasattr(args, "position_span") and span is None:
        args.position_span = min(recipe.position_span, config.max_position_embeddings)
    budget = f"--steps {args.steps}" if args.max_tokens is None else f"--max-tokens {args.max_tokens}"
    args.steps = updates(args, args.length)
    least = f"{mean_tokens(args, args.length):.0f}"
    _require(args.steps > 0, f"{budget} is less than one update ({least} tokens)")
    if args.warmup_steps is None:
        args.warmup_steps = args.steps // 20
    _require(
        args.warmup_steps <= args.steps, f"--warmup-steps {args.warmup_steps} is more than --steps {args.steps} in all"
    )
    rank = getattr(args, "lora_rank", None) or 1
    _require(rank <= config.hidden_size, f"--lora-rank {rank} is more than the model's {config.hidden_size} dimensions")
    idle = without_updates(args, args.length)
    _require(not idle, f"{budget} leaves no update for windows of {' and '.join(map(str, idle))} tokens (--length)")
    for name, tokens in {
        "length": args.length[-1],
        "topk": getattr(args, "topk", None) or 1,
        "position-span": getattr(args, "position_span", 0),
    }.items():
        _require(
            tokens <= config.max_position_embeddings,
            f"--{name} {tokens} is beyond the model's {config.max_position_embeddings} positions",
        )


def indexer_options(args: argparse.Namespace, small: Recipe, real: Recipe, config: PreTrainedConfig) -> dict[str, Any]:
    """The indexer that is trained, as fields of DSAConfig: the checkpoint's own, or a new one of the recipe's size.

    Raises UserError for arguments that would change the weights of one that is there.
    """
    given = {"index_heads": args.index_heads, "index_dim": args.index_dim, "index_queries": args.index_queries}
    if has_indexer(config):
        for name, value in given.items():
            own = getattr(config, name)
            flag = f"--{name.replace('_', '-')}"
            _require(
                value in (None, own), f"{flag} {value}: the checkpoint's indexer has {own}, which cannot be changed"
            )
        return {name: getattr(config, name) for name in given} | {
            "index_topk": args.topk or config.index_topk,
            **selection_options(args),
        }
    recipe = small if config.hidden_size <= SMALL_HIDDEN_SIZE else real
    shared = args.index_queries == "shared"
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "index_topk": args.topk or recipe.topk,
        "index_heads": args.index_heads or (config.num_attention_heads if shared else recipe.index_heads),
        "index_dim": args.index_dim or (head_size if shared else recipe.index_dim),
        "index_queries": args.index_queries or "own",
        **selection_options(args),
    }


def training_data(
    args: argparse.Namespace, tokenizer: Any, processes: Processes, *, train_on_prompt: bool = False
) -> TrainingData:
    """The first process tokenizes and writes the cache, the others read it."""
    longest, phases = args.length[-1], settings_of(args).phases()
    per_step = args.batch_size * args.accumulation
    windows = max(-(-(phase.end - phase.first) * phase.length * per_step // longest) for phase in phases)
    with processes.first_goes_first():
        data = load_data(
            args.data,
            tokenizer,
            longest,
            train_windows=len(phases) * windows,  # Windows.cut() gives each phase as many
            held_out_windows=args.held_out,
            min_tokens=args.min_tokens,
            max_rows=args.max_rows,
            packing=args.packing,
            seed=args.seed,
            allow_malformed=args.allow_malformed,
            train_on_prompt=train_on_prompt,
            cache=args.cache,
        )
    filled = len(data.train)
    _require(
        filled >= len(phases), f"{args.data} fills {filled} windows of {longest} tokens, --length wants {len(phases)}"
    )
    return data


def train_from(
    name: str,
    config: PreTrainedConfig,
    stage_name: str,
    args: argparse.Namespace,
    processes: Processes,
    prepare: Callable[[], tuple[Any, Stage]],
) -> None:
    """What the stages that start from a checkpoint do once their arguments are resolved: data, model, training.

    name: folder or hub name. prepare: loads the model and makes the stage; called after the data was read, and not at
    all if args.out holds the result of this very command.
    """
    source, run_identity = model_source(name), identity(stage_name, args)
    if is_done(args.out, source["sha256"], run_identity, overwrite=args.overwrite):
        return
    tokenizer = load_tokenizer(name)
    check_tokenizer(tokenizer, config.vocab_size)
    data = training_data(args, tokenizer, processes)
    torch.manual_seed(args.seed)
    model, stage = prepare()
    train(stage, model, tokenizer, data, source, run_identity, args, processes)


def train(
    stage: Stage,
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    source: dict[str, Any],
    identity: dict[str, Any],
    args: argparse.Namespace,
    processes: Processes,
) -> None:
    """Runs a stage by the arguments and writes args.out."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = Trainer(
        stage, model, tokenizer, data, settings_of(args), args.out, source, identity, processes,
        max_minutes=args.max_minutes, save_every=args.save_every, overwrite=args.overwrite,
    )  # fmt: skip
    trainer.run()
    del trainer  # see leave()
    processes.leave()


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        steps=args.steps,
        lengths=tuple(args.length),
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        lr=args.lr,
        schedule=args.schedule,
        warmup_steps=args.warmup_steps,
        clip=args.clip,
        seed=args.seed,
        dtype=DTYPES[args.dtype],
        position_span=getattr(args, "position_span", 0),
    )


def identity(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a finished or stopped run must share with this one to be reused. --max-minutes and the like are free."""
    # Beware: whatever is not named here counts. A new argument whose resolved value is not None makes every run that an
    # earlier version finished or left stopped "another configuration", however it was started.
    free = {
        "out",
        "overwrite",
        "max_minutes",
        "save_every",
        "device",
        "model",
        "parallel",
        "gradient_checkpointing",
        "max_tokens",
        "cache",
    }
    return {
        "stage": stage,
        "arguments": {name: value for name, value in sorted(vars(args).items()) if name not in free},
    }


def is_done(
    out: Path, source_sha256: str | None, identity: dict[str, Any], *, overwrite: bool, knows_data: bool = False
) -> bool:
    """Whether `out` holds the result of this very command: then says so, and there is nothing to do.

    knows_data: the identity tells one data from another. Raises UserError if `out` holds something else of ours, unless
    that is to be overwritten.
    """
    if overwrite or not (out / MANIFEST).is_file():
        return False
    made_by = f"python -m train.{identity['stage']} --overwrite"
    manifest = read_manifest(out, "checkpoint", made_by)
    old = {"model": manifest["source"].get("sha256"), **{name: manifest.get(name) for name in identity}}
    difference = first_difference(old, {"model": source_sha256, **identity})
    if difference:
        raise UserError(
            f"{out} is finished already, with another configuration ({difference}): choose another --out, or "
            "--overwrite to replace it"
        )
    result = manifest_object(out, manifest, "after", made_by)
    after = "  ".join(f"{name} {value:.4f}" for name, value in result.items())
    done, steps = manifest.get("steps_done"), manifest.get("steps")
    ended = f", which ended after step {done} of {steps}" if done != steps else ""
    unread = "" if knows_data else " (its data was not looked at again)"
    console.print(
        f"{out}/ is there already, made by this very command{ended}{unread}; --overwrite would redo it.  {after}"
    )
    return True


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
