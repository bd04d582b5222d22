"""python -m engines.build: engines from an ONNX export.

Writes <out>/<backend>/<variant>/ per engine, with a manifest that is checked before the engine is loaded.

    ort           the graph and its weights in a folder of their own, loaded and run once
    tensorrt-rtx  a plan of standard operators; needs no GPU
    tensorrt      a plan with this project's plugins; by trtexec if it is on the PATH, else by TensorRT's Python API
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dsa_export.cli import UserError, console, run
from dsa_export.files import check_output, output_folder, read_manifest, write_manifest
from dsa_export.topk import compact_topk, describe_topk
from engines import nvidia_graph, trtexec
from engines.artifacts import (
    BACKENDS,
    VARIANTS,
    Export,
    Graph,
    Limits,
    content_hash,
    open_export,
    runtime_version,
)
from engines.profiles import as_json, profiles

PLUGIN_LIBRARY = Path("build/plugins/libdsa_plugins.so")
DEFAULT_MAX_BATCH = 8
# TensorRT-RTX 1.7.1 (an internal check of its compiler; tried with fp32 and fp16 models of two layers).
ONE_KV_HEAD = "; models with a single KV head are known to need --max-batch 1"
CHECK_TOKENS = 4
"""Tokens that the check after an ONNX Runtime build pre-fills."""


def main() -> None:
    args = parse_arguments()
    if args.print_trtexec:
        print_trtexec(args)
        return
    if len(args.backend) > 1:
        build_each_in_its_own_process(args)
        return
    build(args.backend[0], args)


def build(backend: str, args: argparse.Namespace) -> None:
    export = open_export(args.onnx)
    limits = limits_of(export, args)
    for variant in args.variant:
        check_output(args.out / backend / variant)
    BUILDERS[backend](export, limits, args)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engines.build", description="engines from an ONNX export")
    add = parser.add_argument
    add("--onnx", type=Path, default=Path("out/onnx"), metavar="DIR", help="the export (default: %(default)s)")
    add("--out", type=Path, default=Path("out/engines"), metavar="DIR", help="where to write (default: %(default)s)")
    add("--backend", nargs="+", choices=BACKENDS, default=["ort"], help="one or several (default: ort)")
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: both)")
    add("--max-batch", type=positive, default=DEFAULT_MAX_BATCH, metavar="N", help="rows (default: %(default)s)")
    add(
        "--max-context", type=positive, metavar="N",
        help="tokens per row; the fixed cache capacity of NVIDIA engines (default: the model's limit)",
    )  # fmt: skip
    add("--prefill-chunk", type=positive, default=128, metavar="N", help="tokens per call (default: %(default)s)")
    add(
        "--compute-capability", nargs="+", default=[], metavar="X.Y",
        help="tensorrt-rtx: GPUs to build for, e.g. 8.9 12.0 (default: left open)",
    )  # fmt: skip
    add("--plugin-library", type=Path, default=PLUGIN_LIBRARY, metavar="FILE", help="tensorrt (default: %(default)s)")
    add("--serialize-plugins", action="store_true", help="tensorrt: put the plugin library into the plan")
    add("--print-trtexec", action="store_true", help="write the graphs for trtexec, print its commands and stop")
    args = parser.parse_args(arguments)
    args.backend = list(dict.fromkeys(args.backend))
    args.variant = list(dict.fromkeys(args.variant))
    for capability in args.compute_capability:
        if not re.fullmatch(r"\d+\.\d", capability):
            parser.error(f"--compute-capability: {capability!r} is not of the form X.Y")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def limits_of(export: Export, args: argparse.Namespace) -> Limits:
    """The engine's limits. Raises UserError where the model cannot follow them."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file: choose another --out")
    graph = next(iter(export.graphs.values()))
    missing = [variant for variant in args.variant if variant not in export.graphs]
    if missing:
        raise UserError(f"{export.folder} holds no {missing[0]} graph: choose another --variant")
    positions = graph.model.max_position_embeddings
    context = args.max_context or positions
    if context > positions:
        raise UserError(f"--max-context {context} exceeds the model's {positions} positions: choose a smaller one")
    if graph.max_topk > context and "sparse" in args.variant:
        raise UserError(
            f"k = {graph.max_topk} exceeds the capacity of {context} tokens: choose a larger --max-context, "
            "or export with a smaller --topk"
        )
    return Limits(args.max_batch, context, min(args.prefill_chunk, context))


# ONNX Runtime


def build_ort(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.ort import check_dtype

    runtime_version("ort")
    for variant in args.variant:
        graph = export.graphs[variant]
        check_dtype(graph.dtype)
        with output_folder(args.out / "ort" / variant) as folder:
            link_or_copy(graph.path, folder / "model.onnx")
            link_or_copy(graph.path.parent / graph.weights, folder / graph.weights)
            files = {"model.onnx": graph.sha256, graph.weights: graph.weights_sha256}
            write_engine_manifest(folder, "ort", graph, export, limits, files, cpu=cpu_name())
            run_one_step(folder)
        report(args.out / "ort" / variant)


def run_one_step(folder: Path) -> None:
    """Loads a fresh engine folder and runs it. Raises UserError if its logits are not finite."""
    from engines.session import Session, open_runner

    session = Session(open_runner(folder, verify=False))
    logits = session.prefill([np.arange(min(CHECK_TOKENS, session.engine.model.vocab_size))])
    if not np.isfinite(logits).all():
        raise UserError(f"{folder}: the engine's logits are not finite; check the checkpoint that was exported")


# TensorRT-RTX


def build_tensorrt_rtx(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.nvidia import build_plan

    runtime_version("tensorrt-rtx")
    for variant in args.variant:
        graph = export.graphs[variant]
        shapes = profiles(graph, limits)
        with output_folder(args.out / "tensorrt-rtx" / variant) as folder, adapted_graph(graph, limits, folder) as onnx:
            try:
                build_plan(
                    onnx,
                    folder / "engine.plan",
                    shapes,
                    product="tensorrt-rtx",
                    title=f"tensorrt-rtx {variant}",
                    compute_capabilities=args.compute_capability,
                    decompose_attention=graph.dtype == "fp32",
                )
            except UserError as error:
                hint = ONE_KV_HEAD if graph.model.kv_heads == 1 and limits.max_batch > 1 else ""
                raise UserError(f"{error}{hint}") from None
            write_engine_manifest(
                folder, "tensorrt-rtx", graph, export, limits, {"engine.plan": None},
                compute_capability=args.compute_capability, profiles=[as_json(profile) for profile in shapes],
            )  # fmt: skip
        report(args.out / "tensorrt-rtx" / variant)


# TensorRT


def build_tensorrt(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    binary = shutil.which("trtexec")
    if not binary and importlib.util.find_spec("tensorrt") is None:
        raise UserError(
            "backend tensorrt needs an NVIDIA GPU and trtexec on the PATH (TensorRT 10.16 or 11.x), or else "
            "`pip install tensorrt-cu13`; --print-trtexec prints the commands for another machine"
        )
    library = args.plugin_library
    if "sparse" in args.variant and not library.is_file():
        raise UserError(f"{library} is missing: run `make plugins`, or name it with --plugin-library")
    version = trtexec_version(binary) if binary else runtime_version("tensorrt")
    for variant in args.variant:
        graph = export.graphs[variant]
        with output_folder(args.out / "tensorrt" / variant) as folder, adapted_graph(graph, limits, folder) as onnx:
            job = trtexec_job(graph, limits, args, onnx, folder)
            if binary:
                flavour = "10.16" if version.startswith("10.") else "11.x"
                run_trtexec(binary, trtexec.build_command(job, flavour), folder)
            else:
                build_with_python(job, f"tensorrt {variant}")
            if job.plugin_library:
                from engines.nvidia import check_plugin_layers

                check_plugin_layers(job.layers.read_text(), graph.model.layers)
            write_engine_manifest(
                folder, "tensorrt", graph, export, limits, {"engine.plan": None},
                runtime=version, compute_capability=[gpu_compute_capability()],
                plugin={"path": str(library), "sha256": content_hash(library)} if job.plugin_library else None,
                profiles=[as_json(profile) for profile in job.profiles],
            )  # fmt: skip
        report(args.out / "tensorrt" / variant)


def run_trtexec(binary: str, command: list[str], folder: Path) -> None:
    """Runs trtexec; its output goes to <folder>/build.log. Raises UserError with its last error line."""
    log = folder / "build.log"
    with console.status("trtexec builds the engine…"), log.open("w") as output:
        code = subprocess.run([binary, *command[1:]], stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text(errors="replace").splitlines()
        error = next((line for line in reversed(lines) if "[E]" in line), lines[-1] if lines else "no output")
        raise UserError(f"trtexec failed with exit code {code}: {error}")


def build_with_python(job: trtexec.TrtexecJob, title: str) -> None:
    from engines.nvidia import build_plan, inspect

    build_plan(
        job.onnx,
        job.plan,
        job.profiles,
        product="tensorrt",
        title=title,
        plugin_library=job.plugin_library,
        serialize_plugins=job.serialize_plugins,
        decompose_attention=job.dtype == "fp32",
    )
    job.layers.write_text(inspect(job.plan, "tensorrt", job.plugin_library))


def trtexec_version(binary: str) -> str:
    banner = subprocess.run([binary, "--help"], capture_output=True, text=True).stdout
    version = trtexec.parse_version(banner)
    if version is None or int(version.split(".")[0]) not in (10, 11):
        raise UserError(f"{binary} is not a trtexec of TensorRT 10.16 or 11.x: put that one on the PATH")
    return version


def print_trtexec(args: argparse.Namespace) -> None:
    """Writes <out>/trtexec/<variant>/ (graph for NVIDIA's parser, inputs for timing) and prints the commands."""
    export = open_export(args.onnx)
    limits = limits_of(export, args)
    for variant in args.variant:
        graph = export.graphs[variant]
        target = args.out / "trtexec" / variant
        with output_folder(target) as folder:
            nvidia_graph.write(graph, limits.max_context, folder / "model.onnx")
            link_or_copy(graph.path.parent / graph.weights, folder / graph.weights)
            job = trtexec_job(graph, limits, args, target / "model.onnx", target)
            trtexec.write_inputs(job, folder)
            write_manifest(folder, "trtexec", source_of(graph, export), limits=asdict(limits), variant=variant)
        print(f"# {variant}\n{trtexec.printed(job, target)}\n", flush=True)
        if job.plugin_library and not job.plugin_library.is_file():
            print(f"# {job.plugin_library} is not there yet: make plugins\n", flush=True)


def trtexec_job(graph: Graph, limits: Limits, args: argparse.Namespace, onnx: Path, folder: Path) -> trtexec.TrtexecJob:
    return trtexec.TrtexecJob(
        onnx=onnx,
        plan=folder / "engine.plan",
        layers=folder / "layers.json",
        profiles=profiles(graph, limits),
        limits=limits,
        plugin_library=args.plugin_library if graph.variant == "sparse" else None,
        serialize_plugins=args.serialize_plugins,
        dtype=graph.dtype,
    )


# Shared


def build_each_in_its_own_process(args: argparse.Namespace) -> None:
    """Builds several backends one after the other: NVIDIA's two products must not share a process."""
    for backend in args.backend:
        process = multiprocessing.get_context("fork").Process(target=run, args=(lambda b=backend: build(b, args),))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:
            process.join()  # it got the signal too, and says so
        if process.exitcode:
            sys.exit(process.exitcode)


@contextmanager
def adapted_graph(graph: Graph, limits: Limits, folder: Path) -> Iterator[Path]:
    """The graph as NVIDIA's parser wants it, with its weights beside it, for as long as the build needs it."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="onnx-") as scratch:
        path = Path(scratch) / "model.onnx"
        nvidia_graph.write(graph, limits.max_context, path)
        link_or_copy(graph.path.parent / graph.weights, path.parent / graph.weights)
        yield path


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system allows none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_engine_manifest(
    folder: Path,
    backend: str,
    graph: Graph,
    export: Export,
    limits: Limits,
    files: Mapping[str, str | None],
    *,
    runtime: str | None = None,
    **facts: Any,
) -> None:
    """files: name -> SHA-256 (None: computed here). runtime: its version, if not that of the installed package."""
    write_manifest(
        folder,
        "engine",
        source_of(graph, export),
        backend=backend,
        variant=graph.variant,
        dtype=graph.dtype,
        precision=graph.precision,
        topk=compact_topk(graph.topk),
        random_indexer=graph.random_indexer,
        model=asdict(graph.model),
        cache=[asdict(tensor) for tensor in graph.cache],
        limits=asdict(limits),
        versions={"runtime": runtime or runtime_version(backend), "python": platform.python_version()},
        **asdict(step_weights(graph.path)),
        files={
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest or content_hash(folder / name)}
            for name, digest in files.items()
        },
        **{"compute_capability": [], "plugin": None, "profiles": [], **facts},
    )


def source_of(graph: Graph, export: Export) -> dict[str, str]:
    return {"path": str(export.folder), "sha256": graph.sha256, "weights_sha256": graph.weights_sha256}


@dataclass(frozen=True)
class StepWeights:
    """Weights that one call of a graph must read, scales of quantised ones included. Tables that are only looked up
    (embedding, angles) do not count: a token reads one row of them."""

    step_weight_bytes: int
    step_weights: int


def step_weights(path: Path) -> StepWeights:
    model = ir.load(path)
    lookups = {"Gather": (0,), "RotaryEmbedding": (1, 2)}
    read = {
        value.name
        for node in model.graph
        for position, value in enumerate(node.inputs)
        if value is not None and position not in lookups.get(node.op_type, ())
    }
    tensors = [v.const_value for name, v in model.graph.initializers.items() if name in read and v.const_value]
    return StepWeights(sum(tensor.nbytes for tensor in tensors), sum(tensor.size for tensor in tensors))


def cpu_name() -> str:
    """The processor's name and the number of its cores that may be used."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found.group(1) if found else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def gpu_compute_capability() -> str:
    """Compute capability of the first GPU, e.g. "9.0"."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError("nvidia-smi names no GPU: a TensorRT engine is built on the machine that runs it") from None


def report(folder: Path) -> None:
    manifest = read_manifest(folder, "engine", "python -m engines.build")
    mib = sum(facts["bytes"] for facts in manifest["files"].values()) / 2**20
    k = describe_topk(manifest["topk"])
    console.print(f"wrote {folder}: {manifest['variant']}, {manifest['precision']}, k = {k}, {mib:,.1f} MiB")


BUILDERS = {"ort": build_ort, "tensorrt-rtx": build_tensorrt_rtx, "tensorrt": build_tensorrt}

if __name__ == "__main__":
    run(main)
