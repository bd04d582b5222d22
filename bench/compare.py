"""python bench/compare.py: dense against sparse, same weights, same prompts, same capacity, growing context.

Takes every engine below --engines and compares, within each backend, precision and k, the sparse engine with the
strongest dense one. Before any figure the engines must agree where they have to (at most k tokens): a red gate ends the
run. What cannot run here is listed with the reason. Writes <out>/report.html, results.jsonl (one object per line) and
the pictures.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository's root instead of from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from dsa_export import interrupt

    interrupt.expect(__name__ == "__main__")


import numpy as np

from bench import layers, matrix, measure, peers, plots, profiling, prompts, report, runs, summary, tables
from bench.matrix import Case, Group, Wish
from bench.runs import Record, Settings
from dsa_export.cli import UserError, console, not_negative, path, positive, run, thread_count, usable_cpus
from dsa_export.files import (
    MANIFEST,
    check_output,
    output_folder,
    read_manifest,
    remove_partial,
    write_lines,
    write_manifest,
)
from engines import build, huge_pages
from engines.artifacts import BACKENDS

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "tensorrt-cu13", "tensorrt-rtx-cu13", "numpy")
ENGINES = Path("out/engines")
QUICK_CONTEXTS = (512, 8192, 32768)
QUICK_PREFILL = 2048
QUICK_SECONDS = 3.0
RESULTS = "results.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """All heavy work is done in children: what it leaves in this process's heap would be inherited by the processes
    that measure memory, and would hide what an engine needs."""
    args = parse_arguments(argv)
    check_output(args.out, "bench")
    check_peers(args)
    build_missing(args)
    engines, skips = matrix.discover(args.engines)
    groups, alone = matrix.groups(engines)
    groups = [group for group in groups if wanted(group, args)]
    skips = [{"kind": "skipped", **skip} for skip in (*skips, *alone)]
    if not groups:
        raise UserError(nothing_to_compare(args, skips))
    matrix.check_comparable(groups)
    if args.debug_layers is not None:
        debug_layers(groups, args)
        return
    facts = provenance(args, sys.argv[1:] if argv is None else argv)
    remove_partial(args.out)
    with output_folder(args.out, keep_partial=True) as folder:
        written = folder / RESULTS
        kept: list[Record] = []

        def keep(more: Sequence[Record]) -> None:
            kept.extend(more)
            if summary.of_kind(kept, "timing"):
                write_lines(written, [with_facts(record, facts) for record in kept])

        try:
            keep(skips)
            proofs = measure_all(groups, args, keep)
            records = list(kept)
            measured = summary.pairs(records)
            if not measured:
                reasons = dict.fromkeys(record["reason"] for record in summary.of_kind(records, "skipped"))
                raise UserError(f"nothing could be measured: {'; '.join(reasons)}")
            keep(summary.first_tokens(measured))
            pictures = plots.draw(records, folder)
            report.write(folder / "report.html", records, pictures, proofs=proofs, facts=facts)
            write_manifest(folder, "bench", groups[0].sparse.manifest["source"], **facts)
        except BaseException as error:
            if not written.exists():
                shutil.rmtree(folder)
            elif isinstance(error, KeyboardInterrupt):
                where = f"{written}, until another comparison writes to --out {args.out}"
                raise KeyboardInterrupt(f"stopped; what was measured until then is in {where}") from None
            raise
    tables.print_tables(tables.all_tables(records))
    console.print(f"wrote {args.out / 'report.html'} and {args.out / RESULTS}")
    console.print(summary.sentence(measured))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/compare.py",
        description="Dense against sparse engines: every backend, precision and k found below --engines, over contexts "
        "and batches, decoding and prefill, with peers. Writes a report (HTML), JSON lines and pictures.",
        epilog="Sizes that do not fit (capacity, memory, no GPU) are listed with the reason, not tried.",
    )
    what = parser.add_argument_group("what is compared").add_argument
    what(
        "--engines", type=path, nargs="+", default=[ENGINES], metavar="DIR",
        help="folders with engines of `python -m engines.build`, searched to the bottom (default: out/engines)",
    )  # fmt: skip
    what(
        "--onnx", type=path, metavar="DIR",
        help="the export, for its tokenizer, and to build ONNX Runtime engines from where --engines holds none "
        "(default: where the engines came from, out/onnx for out/engines)",
    )  # fmt: skip
    what("--backend", nargs="+", metavar="NAME", help="only these (default: all that are found)")
    what("--precision", nargs="+", metavar="NAME", help="only these: fp32 fp16 bf16 int8 int4 (default: all)")
    what("--k", nargs="+", type=positive, metavar="K", help="only these (default: all)")
    case = parser.add_argument_group("cases").add_argument
    case("--context", nargs="+", type=positive, metavar="N", help="tokens (default: what takes under a minute)")
    case("--batch", nargs="+", type=positive, default=[1], metavar="N", help="rows (default: 1)")
    case("--phase", choices=("prefill", "decode", "both"), default="both", help="(default: %(default)s)")
    case(
        "--caches", choices=("prefill", "random"),
        help="computed from the text, or random values: for contexts whose prefill takes too long (no agreement, loss "
        "or measured time to first token then) (default: prefill)",
    )  # fmt: skip
    case("--prompt-file", type=path, metavar="FILE", help="text (default: the Python standard library's sources)")
    case(
        "--quick",
        action="store_true",
        help="under a minute: random caches, few contexts and runs, short prefills, no peers",
    )
    how = parser.add_argument_group("measuring").add_argument
    how(
        "--runs", type=positive, metavar="N",
        help="timed calls per case, more if they are short (default: 15; --quick: 5)",
    )  # fmt: skip
    how(
        "--max-seconds", type=positive, metavar="S",
        help=f"per case: fewer calls, at least {measure.MIN_RUNS}, once this is spent (default: no limit)",
    )  # fmt: skip
    how("--threads", type=thread_count, default=usable_cpus(), metavar="N", help="(default: all)")
    how(
        "--score-tokens", type=positive, default=32, metavar="N",
        help="teacher-forced tokens for loss and agreement, half of the context at most (default: %(default)s)",
    )  # fmt: skip
    how(
        "--profile", type=not_negative, metavar="N",
        help="context of the decoding step that ONNX Runtime's profiler looks into; 0: none (default: the longest; "
        "--quick: none)",
    )  # fmt: skip
    how(
        "--debug-layers", type=positive, nargs="?", const=0, metavar="TOKENS",
        help="compare the graphs layer by layer with Polygraphy on so many tokens (default: at most k), and stop",
    )  # fmt: skip
    other = parser.add_argument_group("peers").add_argument
    other(
        "--peers", nargs="+", choices=(*peers.NAMES, "none"),
        help="others on the same checkpoint, decoding one row: stock transformers, and dense scores with a top-k mask "
        "(default: both)",
    )  # fmt: skip
    other("--genai", type=path, nargs="+", default=[], metavar="DIR", help="models of onnxruntime-genai's builder")
    other("--genai-python", type=path, metavar="FILE", help="the interpreter that has it (default: this one)")
    other("--checkpoint", metavar="NAME", help="the peers' checkpoint (default: what the export came from)")
    other("--peer-context", nargs="+", type=positive, metavar="N", help="(default: all contexts of batch 1)")
    parser.add_argument("--out", type=path, default=Path("out/bench"), metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        if args.caches == "prefill" or args.peers not in (None, ["none"]):
            raise UserError("--quick takes random caches and no peers: leave --caches and --peers out")
        args.caches, args.peers, args.runs = "random", ["none"], args.runs or 5
        args.max_seconds = args.max_seconds or QUICK_SECONDS
        args.profile = args.profile or 0
    args.caches, args.runs = args.caches or "prefill", args.runs or 15
    if args.peers is None:  # they decode one row
        args.peers = list(peers.NAMES) if args.phase != "prefill" and 1 in args.batch else ["none"]
    return args


def check_peers(args: argparse.Namespace) -> None:
    """Raises UserError for a peer of a wrong name, which would only be seen when all else has been measured."""
    if args.genai:
        peers.genai_python(args.genai_python)
    for model in args.genai:
        peers.genai_model(model)
    if args.checkpoint:
        measure.in_child(peers.torch_bytes, args.checkpoint, 1)


def build_missing(args: argparse.Namespace) -> None:
    """Builds ONNX Runtime engines into the first of --engines if there are none at all, and the export is known.

    Raises UserError if only some of --engines hold engines.
    """
    empty = [folder for folder in args.engines if not matrix.engine_folders([folder])]
    if len(empty) < len(args.engines):
        if empty:
            raise UserError(f"{empty[0]} holds no engines: run `python -m engines.build`, or leave it out")
        return
    if args.onnx is None and args.engines != [ENGINES]:
        where = " ".join(map(str, args.engines))
        raise UserError(f"{where} holds no engines: run `python -m engines.build`, or name the export with --onnx")
    args.onnx = args.onnx or Path("out/onnx")
    read_manifest(args.onnx, "onnx", "python -m dsa_export.onnx")
    if args.backend and args.backend != ["ort"]:
        backends = " ".join(args.backend)
        raise UserError(
            f"{args.engines[0]} holds no engines: run `python -m engines.build --onnx {args.onnx} "
            f"--out {args.engines[0]} --backend {backends}`"
        )
    console.print(f"building the ort engines of {args.onnx} into {args.engines[0]}")
    rows = max(build.options.DEFAULT_MAX_BATCH, *args.batch)
    options = ["--onnx", str(args.onnx), "--out", str(args.engines[0]), "--max-batch", str(rows)]
    measure.in_child(build.build, "ort", build.parse_arguments(options))


def wanted(group: Group, args: argparse.Namespace) -> bool:
    k = {group.k} if isinstance(group.k, int) else set(group.k)
    return (
        (not args.backend or group.backend in args.backend)
        and (not args.precision or group.precision in args.precision)
        and (not args.k or k <= set(args.k))
    )


def nothing_to_compare(args: argparse.Namespace, skips: Sequence[Record]) -> str:
    """Why there is no pair of engines, in one line."""
    asked = [
        f"--{name} {' '.join(map(str, getattr(args, name)))}"
        for name in ("backend", "precision", "k")
        if getattr(args, name)
    ]
    unknown = [name for name in args.backend or [] if name not in BACKENDS]
    if unknown:
        return f"no backend is called {unknown[0]!r}: choose from {', '.join(BACKENDS)}"
    reasons = "; ".join(dict.fromkeys(skip["reason"] for skip in skips))
    where = " ".join(map(str, args.engines))
    return (
        f"{where} holds no pair of dense and sparse engines"
        + (f" for {' '.join(asked)}" if asked else "")
        + (f": {reasons}" if reasons else ": run `python -m engines.build`")
    )


class RedGate(UserError):
    """Engines that must agree do not."""


Plan = tuple[Group, list[Case], list[matrix.Skip]]


def measure_all(
    groups: Sequence[Group], args: argparse.Namespace, keep: Callable[[Sequence[Record]], None]
) -> list[str]:
    """Gives the records of every group and peer to `keep` as they come; returns what was proved before."""
    phases = ("decode", "prefill") if args.phase == "both" else (args.phase,)
    wish = Wish(args.context, args.batch, phases, args.caches, QUICK_PREFILL if args.quick else None)
    limit = min(engine.limits.max_context for group in groups for engine in group.sides.values())
    if args.profile and args.profile > limit:
        raise UserError(f"--profile {args.profile} is beyond the engines' capacity of {limit:,} tokens")
    if args.quick and not args.context:
        wish = replace(wish, contexts=[n for n in QUICK_CONTEXTS if n <= limit] or [limit])
    planned = [(group, *matrix.plan(group, wish, runs.free_bytes(group.backend))) for group in groups]
    skipped: list[Record] = [{"kind": "skipped", **skip} for _, _, skips in planned for skip in skips]
    if not any(cases for _, cases, _ in planned):
        reasons = "; ".join(dict.fromkeys(record["reason"] for record in skipped))
        raise UserError(f"no case can be measured: {reasons}")
    keep(skipped)
    longest = max(case.context for _, cases, _ in planned for case in cases)
    rows = measure.in_child(
        prompts.rows, tokenizer_folder(groups, args), args.prompt_file, max(args.batch), longest + 1
    )
    contexts = peer_contexts(args.peer_context, planned)
    settings = Settings(args.caches, budget_of(args), args.threads, args.score_tokens)
    proofs = identical_operators(groups)
    measurable: list[tuple[Group, list[Case]]] = []

    def skip(group: Group, error: UserError) -> None:
        console.print(f"{group.name}: {error}")
        keep([{"kind": "skipped", **group.facts(), "reason": str(error)}])

    for group, cases, _ in planned:
        if not cases:
            continue
        try:
            proofs += pass_the_gate(group, rows[0], args.threads)
            measurable.append((group, cases))
        except (RedGate, measure.ChildDied):
            raise
        except UserError as error:  # its engines cannot run here
            skip(group, error)
    if not measurable:
        return proofs
    for group, cases in measurable:
        try:
            keep(measure_group(group, cases, rows, settings, args))
        except UserError as error:
            skip(group, error)
    keep(measure_peers(groups[0], contexts, rows[0], args))
    return proofs


def peer_contexts(asked: Sequence[int] | None, planned: Sequence[Plan]) -> list[int]:
    """Where the peers decode: as asked (None: everywhere), of the contexts at which the engines decode one row.

    Raises UserError for a context that is none of the run's.
    """
    decoded = {case.context for _, cases, _ in planned for case in cases if case.batch == 1 and case.phase == "decode"}
    unknown = set(asked or ()) - decoded - {skip["context"] for _, _, skips in planned for skip in skips}
    if asked and not decoded:
        raise UserError("--peer-context: peers decode one row, which needs --phase decode and --batch 1")
    if unknown:
        raise UserError(f"--peer-context {min(unknown)}: no engine decodes one row there; add it to --context")
    return sorted(decoded & set(asked) if asked else decoded)


def budget_of(args: argparse.Namespace) -> measure.Budget:
    return measure.Budget(args.runs, at_most=args.max_seconds or float("inf"))


def tokenizer_folder(groups: Sequence[Group], args: argparse.Namespace) -> Path:
    return args.onnx or groups[0].sparse.folder


def measure_group(
    group: Group, cases: Sequence[Case], rows: np.ndarray, settings: Settings, args: argparse.Namespace
) -> list[Record]:
    """Timings with the peak memory beside them, and the operators' shares at one context."""
    records = runs.timings(group, cases, rows, settings)
    timed = summary.of_kind(records, "timing")
    by_place = {(case.phase, case.batch, case.context): case for case in cases}
    case_of = [by_place[record["phase"], record["batch"], record["context"]] for record in timed]
    cases = list(dict.fromkeys(case_of))  # those for which there was memory
    if not cases:
        return records
    remembered = cases if not args.quick else [max(cases, key=lambda case: (case.phase == "decode", case.context))]
    contexts = [case.context for case in cases if case.phase == "decode"]
    context = max(contexts, default=0) if args.profile is None else args.profile
    peaks: dict[str, dict[Case, float | None]] = {}
    try:
        for name, engine in group.sides.items():
            peaks[name] = runs.peak_memory(engine, remembered, rows, args.threads)
        if context and group.backend == "ort":
            for engine in group.sides.values():
                records.append({**profiling.profile(engine, context, args.threads), "k": group.k})
    except UserError as error:  # the timings stand
        records.append({"kind": "skipped", **group.facts(), "reason": f"memory and profile: {error}"})
    for record, case in zip(timed, case_of, strict=True):
        record |= {"peak_mib": peaks.get(record["core"], {}).get(case), "peak_mib_is": runs.PEAK_MIB}
    return records


def measure_peers(group: Group, contexts: Sequence[int], text: np.ndarray, args: argparse.Namespace) -> list[Record]:
    """Every peer that was asked for: timed at the contexts, or skipped with the reason."""
    checkpoint = args.checkpoint or "CHECKPOINT"  # genai needs none
    options = group.sparse.model_options
    task = peers.Task(checkpoint, contexts, text, args.caches, group.k, options, budget_of(args), args.threads)

    def in_torch(name: str) -> list[Record]:
        return peers.measure_torch(name, replace(task, checkpoint=args.checkpoint or peers.checkpoint_of(group)))

    def in_genai(model: Path) -> list[Record]:
        return peers.measure_genai(model, peers.genai_python(args.genai_python), task)

    asked = {name: partial(in_torch, name) for name in args.peers if name != "none"}
    asked |= {f"onnxruntime-genai ({model.name})": partial(in_genai, model) for model in args.genai}
    records: list[Record] = []
    for name, measured in asked.items():
        try:
            if not contexts:
                raise UserError("peers decode one row, which was not asked for: --phase decode or both, --batch 1")
            records += measured()
        except UserError as error:
            records.append({"kind": "skipped", "peer": name, "reason": str(error)})
    return records


def identical_operators(groups: Sequence[Group]) -> list[str]:
    """What the exports say about their own graphs: the export refuses to write graphs that differ elsewhere."""
    proofs = []
    for export in dict.fromkeys(group.sparse.manifest["source"]["path"] for group in groups):
        if not (Path(export) / MANIFEST).is_file():
            continue
        same = read_manifest(Path(export), "onnx", "python -m dsa_export.onnx").get("identical_operators")
        if same:
            proofs.append(
                f"{export}: {same['shared']} nodes and {same['weights']} weights are the same in both graphs; "
                f"{same['dense_core']} attention nodes are replaced by {same['sparse_core']} SparseAttention nodes, "
                f"fed by {same['indexer']} nodes of the indexer; nothing else differs "
                f"(python -m dsa_export.onnx.identical {export})"
            )
    return proofs


def pass_the_gate(group: Group, prompt: np.ndarray, threads: int) -> list[str]:
    """Returns what was proved, for every dense side. Raises RedGate, and UserError where the engines cannot run."""
    if not group.sparse.reduces_to_dense:
        said = (
            f"no parity gate ({group.name}): native sparse attention equals dense attention at no length. What holds: "
            "its export agreed with torch, and shares the dense graph's weights"
        )
        console.print(said)
        return [said]
    proofs = []
    for name, gate in runs.gates(group, prompt, threads).items():
        if gate.problem:
            raise RedGate(
                f"parity gate red, nothing was measured: up to k tokens dense and sparse must be equal, but "
                f"{gate.problem} ({group.name}; dense: {name})"
            )
        proofs.append(
            f"parity gate green ({group.name}): up to {gate.tokens} tokens the logits of {name} and SparseAttention "
            f"differ by at most {gate.error:.1e} (rounding allows {gate.tolerance:.1e})"
        )
        console.print(proofs[-1])
    return proofs


def debug_layers(groups: Sequence[Group], args: argparse.Namespace) -> None:
    """Prints the tensors of every group's two graphs that differ, the first one by name."""
    for group in groups:
        if not group.sparse.reduces_to_dense:
            raise UserError(f"--debug-layers needs graphs that equal each other up to k tokens: {group.name} is NSA")
        tokens = args.debug_layers or min(*group.sparse.topk, 64)
        limit = min(engine.limits.max_context for engine in group.sides.values())
        if tokens > limit:
            raise UserError(f"--debug-layers {tokens} is beyond the engines' capacity of {limit:,} tokens")
        text = measure.in_child(prompts.rows, tokenizer_folder(groups, args), args.prompt_file, 1, tokens)[0]
        for dense in group.dense:
            found = measure.in_child(layers.compare_layers, dense, group.sparse, text)
            name = f"{group.name}, {matrix.core_of(dense)} against SparseAttention, {tokens} tokens"
            worst = max(found, key=lambda difference: difference.error / max(difference.allowed, 1e-30))
            first = layers.first_difference(found)
            if first is None:
                console.print(
                    f"{name}: all {len(found)} tensors agree; closest to its bound is {worst.tensor} "
                    f"(differs by {worst.error:.1e}, allowed {worst.allowed:.1e})"
                )
                continue
            others = sum(not difference.agrees for difference in found) - 1
            beyond = tokens > min(group.sparse.topk)
            console.print(
                f"{name}: {first.tensor} is the first of {len(found)} tensors that differs (by {first.error:.1e}, "
                f"allowed {first.allowed:.1e}), {others} behind it differ too"
                + ("; beyond k tokens that is what selection does" if beyond else "")
            )


def with_facts(record: Record, facts: dict[str, Any]) -> Record:
    """The record with what is true of all; what it says itself about versions, as a peer does, stands."""
    return {**record, **facts, "versions": facts["versions"] | record.get("versions", {})}


def provenance(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What every record says about where its numbers come from."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    command = shlex.join(["python", "bench/compare.py", *argv])
    if switched := os.environ.get(huge_pages.SWITCH):
        command = f"{huge_pages.SWITCH}={switched} {command}"
    return {
        "machine": measure.machine(args.threads),
        "versions": versions,
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    run(main)
