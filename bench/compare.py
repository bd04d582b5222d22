"""python bench/compare.py: dense against sparse, same weights, same prompts, same capacity, growing context.

Before any figure, both engines must agree where they have to (at most k tokens): a red gate ends the run. Writes
<out>/results.jsonl (one object per measured case and variant), <out>/comparison.png and a manifest.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the repository's root instead of from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from bench import measure, prompts, report, runs
from bench.cases import plan
from dsa_export.cli import UserError, console, progress_bar, run
from dsa_export.files import MANIFEST, check_output, output_folder, read_manifest, write_manifest
from engines import build
from engines.artifacts import BACKENDS, VARIANTS, Engine, Export, open_engine, open_export, runtime_version


def main() -> None:
    """Until the timings, all heavy work is done in children: what it leaves in this process's heap would be inherited
    by the processes that measure memory, and would hide what an engine needs."""
    args = parse_arguments()
    check_output(args.out)
    export = open_export(args.onnx)
    engines = ready_engines(export, args)
    cases = plan(engines, args.context, args.batch, args.phase, args.caches)
    longest = max(case.context for case in cases)
    rows = measure.in_child(prompts.rows, args.onnx, args.prompt_file, max(args.batch), longest)
    pass_the_gate(engines, rows[0], args.threads)
    peaks = runs.peak_memory(engines, cases, rows, args.threads)
    with progress_bar() as progress:
        records = runs.timings(
            engines, cases, rows, caches=args.caches, runs=args.runs, threads=args.threads, progress=progress
        )
    facts = provenance(export, engines, args)
    pairs = zip(records, ((variant, case) for case in cases for variant in engines), strict=True)
    records = [{**record, "peak_mib": peaks[key], **facts} for record, key in pairs]
    with output_folder(args.out) as folder:
        report.write_jsonl(records, folder / "results.jsonl")
        report.picture(records, folder / "comparison.png")
        write_manifest(folder, "bench", facts["source"], command=facts["command"], machine=facts["machine"])
    report.print_table(records)
    console.print(f"wrote {args.out / 'results.jsonl'} and {args.out / 'comparison.png'}")
    console.print(report.sentence(records))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/compare.py", description="dense against sparse engines")
    add = parser.add_argument
    add("--onnx", type=Path, default=Path("out/onnx"), metavar="DIR", help="the export (default: %(default)s)")
    add("--engines", type=Path, default=Path("out/engines"), metavar="DIR", help="its engines (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="ort", help="(default: %(default)s)")
    add("--context", nargs="+", type=build.positive, metavar="N", help="tokens (default: what takes under a minute)")
    add("--batch", nargs="+", type=build.positive, default=[1], metavar="N", help="rows (default: 1)")
    add("--phase", choices=("prefill", "decode", "both"), default="both", help="(default: %(default)s)")
    add(
        "--caches", choices=("prefill", "random"), default="prefill",
        help="computed from the text, or random values: for contexts whose prefill takes too long (no agreement then)",
    )  # fmt: skip
    add(
        "--runs",
        type=build.positive,
        default=15,
        metavar="N",
        help="timed calls per case, more if they are short (default: %(default)s)",
    )
    add("--threads", type=build.positive, default=len(os.sched_getaffinity(0)), metavar="N", help="(default: all)")
    add("--prompt-file", type=Path, metavar="FILE", help="text (default: the Python standard library's sources)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where to write (default: %(default)s)")
    return parser.parse_args(arguments)


def ready_engines(export: Export, args: argparse.Namespace) -> dict[str, Engine]:
    """Both engines of the backend, built from this export. ONNX Runtime's are built here if they are not."""
    folders = {variant: args.engines / args.backend / variant for variant in VARIANTS}
    built = all(is_built_from(folder, export, variant) for variant, folder in folders.items())
    if not built and args.backend == "ort":
        console.print(f"building the ort engines of {args.onnx} into {args.engines}")
        rows = max(build.DEFAULT_MAX_BATCH, *args.batch)
        options = ["--onnx", str(args.onnx), "--out", str(args.engines), "--max-batch", str(rows)]
        measure.in_child(build.build, "ort", build.parse_arguments(options))
    elif not built:
        raise UserError(
            f"{args.engines / args.backend} holds no engines of {args.onnx}: run `python -m engines.build "
            f"--onnx {args.onnx} --out {args.engines} --backend {args.backend}`"
        )
    return {variant: open_engine(folder) for variant, folder in folders.items()}


def is_built_from(folder: Path, export: Export, variant: str) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    source = read_manifest(folder, "engine", "python -m engines.build").get("source", {})
    graph = export.graphs[variant]
    return (source.get("sha256"), source.get("weights_sha256")) == (graph.sha256, graph.weights_sha256)


def pass_the_gate(engines: dict[str, Engine], prompt: np.ndarray, threads: int) -> None:
    """Raises UserError on a red gate."""
    gate = runs.gate(engines, prompt, threads)
    if gate.problem:
        raise UserError(
            f"parity gate red, nothing was measured: up to k tokens dense and sparse must be equal, but {gate.problem}"
        )
    console.print(
        f"parity gate green: up to {gate.tokens} tokens the logits differ by at most {gate.error:.1e} "
        f"(rounding allows {gate.tolerance:.1e})"
    )


def provenance(export: Export, engines: dict[str, Engine], args: argparse.Namespace) -> dict[str, Any]:
    """What every record says about where its numbers come from."""
    return {
        "machine": measure.machine(args.threads),
        "versions": {
            "backend": runtime_version(args.backend),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "source": {
            "path": str(args.onnx),
            "sha256": {variant: engine.manifest["source"]["sha256"] for variant, engine in engines.items()},
            "weights_sha256": engines["sparse"].manifest["source"]["weights_sha256"],
            "checkpoint": export.manifest["source"],
        },
        "command": shlex.join(["python", "bench/compare.py", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "peak_mib_is": runs.PEAK_MIB,
    }


if __name__ == "__main__":
    run(main)
