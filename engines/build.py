"""python -m engines.build: engines from an ONNX export.

Writes <out>/<backend>/<variant>/ per engine, with a manifest that is checked before the engine is loaded.

    ort           the graph and its weights in a folder of their own, loaded and run once; on CPUs with the library of
                  this project's kernels, which g++ compiles in seconds
    tensorrt-rtx  a plan of standard operators; needs no GPU
    tensorrt      a plan with this project's plugins; by trtexec if it is on the PATH, else by TensorRT's Python API
    torch         the checkpoint of the export, for the project's own model: CPU, or a GPU with CUDA graphs
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from dsa_export.cli import UserError, console, positive, run, usable_cpus
from dsa_export.files import PARTIAL, check_output, link_or_copy, output_folder, read_manifest, write_manifest
from dsa_export.selection import describe_selection
from dsa_export.topk import compact_topk
from engines import memory, nvidia_graph, triton, trtexec
from engines.artifacts import (
    BACKENDS,
    VARIANTS,
    Export,
    Graph,
    Limits,
    content_hash,
    installed_gpu,
    open_export,
    read_engine,
    runtime_version,
)
from engines.profiles import Profile, as_json, profiles
from engines.text import tokenizer_files
from plugins import cpu
from plugins.compiler import BuildFailed
from plugins.registry import DOMAIN

PLUGIN_LIBRARY = Path("build/plugins/libdsa_plugins.so")
DEFAULT_MAX_BATCH = 8
# TensorRT-RTX 1.7.1 (an internal check of its compiler; tried with fp32 and fp16 models of two layers).
ONE_KV_HEAD = "; models with a single KV head are known to need --max-batch 1"
QUANTISED = "; quantised sparse graphs are known to fail: export without --weights"
OPTIONS_OF = {
    "dense_slots": ["--backend ort"],
    "standard_operators": ["--backend ort"],
    "triton_repository": [f"--backend {name}" for name in triton.PLATFORMS],
    "compile": ["--backend torch"],
    "compute_capability": ["--backend tensorrt-rtx"],
    "plans": ["--backend tensorrt-rtx", "--backend tensorrt", "--print-trtexec"],
    "timing_cache": ["--backend tensorrt"],
    "plugin_library": ["--backend tensorrt", "--print-trtexec"],
    "serialize_plugins": ["--backend tensorrt", "--print-trtexec"],
}
"""What has no effect without one of these."""

CHECK_TOKENS = 4
"""Tokens that the check after a build (ort, torch) runs."""


def main() -> None:
    args = parse_arguments()
    if args.triton_repository:
        triton.check_options(args.backend, args.plans)
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
    tokenizer_files(export.folder)
    for variant in args.variant:
        check_output(args.out / backend / variant, "engine")
        if args.triton_repository:
            check_output(triton.model_folder(args.triton_repository, variant, backend), triton.KIND)
            triton.check_types(export.graphs[variant])
        graph = replace(export.graphs[variant], for_kernels=uses_kernels(backend, export.graphs[variant], args))
        needed = memory.estimate(graph, limits, export.manifest["weights"]["bytes"])
        console.print(f"{backend} {variant} will need {needed} at {limits.max_batch} x {limits.max_context:,} tokens")
        memory.check(backend, needed)
    BUILDERS[backend](export, limits, args)
    if args.triton_repository:
        for variant in args.variant:
            engine = read_engine(args.out / backend / variant)
            console.print(f"wrote {triton.write_model(engine, args.triton_repository)}")


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
    add(
        "--beyond-positions", action="store_true",
        help="accept a --max-context beyond the model's positions: good for timings only, what it says there means "
        "nothing (recorded in the manifest)",
    )  # fmt: skip
    add("--prefill-chunk", type=positive, default=128, metavar="N", help="tokens per call (default: %(default)s)")
    add(
        "--compile", action="store_true",
        help="torch: decode through torch.compile, for fewer, larger kernels; needs a C++ compiler, and takes minutes: "
        "in the build, and at the first calls of other sizes or on another machine",
    )  # fmt: skip
    add(
        "--dense-slots", type=positive, metavar="N",
        help="ort on CPUs: attend to everything while the caches have at most N slots per row, which is faster up to "
        "some thousand; with N above k that is more than the k best tokens, and an answer may change with the size of "
        "the caches (default: k, where nothing else changes)",
    )  # fmt: skip
    add(
        "--standard-operators", action="store_true",
        help="ort on CPUs: select by standard ONNX operators instead of this project's kernels, as is always done "
        "without AVX2; needs no C++ compiler, and is slower",
    )  # fmt: skip
    add(
        "--compute-capability", nargs="+", default=[], metavar="X.Y",
        help="tensorrt-rtx: GPUs to build for, e.g. 8.9 12.0 (default: left open)",
    )  # fmt: skip
    add(
        "--plans", choices=("one", "two"), default="one",
        help="NVIDIA: one plan with a profile for decoding and one for prefill chunks, or a plan for each, which lets "
        "each be tuned alone and holds the weights twice (default: %(default)s)",
    )  # fmt: skip
    add(
        "--timing-cache", type=Path, metavar="FILE",
        help="tensorrt: measured kernel times, read and written, so that the next build is faster "
        "(default: OUT/tensorrt/timing.cache)",
    )  # fmt: skip
    add(
        "--triton-repository", type=Path, metavar="DIR",
        help="also write the engines as models for Triton Inference Server (ort, tensorrt)",
    )  # fmt: skip
    add("--plugin-library", type=Path, default=PLUGIN_LIBRARY, metavar="FILE", help="tensorrt (default: %(default)s)")
    add("--serialize-plugins", action="store_true", help="tensorrt: put the plugin library into the plan")
    add("--print-trtexec", action="store_true", help="write the graphs for trtexec, print its commands and stop")
    args = parser.parse_args(arguments)
    args.backend = list(dict.fromkeys(args.backend))
    args.variant = list(dict.fromkeys(args.variant))
    chosen = {"--print-trtexec"} if args.print_trtexec else {f"--backend {name}" for name in args.backend}
    for name, served in OPTIONS_OF.items():
        if getattr(args, name) != parser.get_default(name) and chosen.isdisjoint(served):
            instead = ", not for --print-trtexec" if args.print_trtexec else ""
            parser.error(f"--{name.replace('_', '-')} is for {' or '.join(served)}{instead}")
    if args.dense_slots and "sparse" not in args.variant:
        parser.error("--dense-slots is for the sparse engine")
    for folder in filter(None, [args.out, args.triton_repository]):
        if folder.resolve().is_relative_to(args.onnx.resolve()):
            parser.error(f"{folder} lies in the export, {args.onnx}: the next export would remove it, choose another")
    args.timing_cache = args.timing_cache or args.out / "tensorrt" / "timing.cache"
    for capability in args.compute_capability:
        if not re.fullmatch(r"\d+\.\d", capability):
            parser.error(f"--compute-capability: {capability!r} is not of the form X.Y")
    return args


def limits_of(export: Export, args: argparse.Namespace) -> Limits:
    """The engine's limits. Raises UserError where the model cannot follow them."""
    graph = next(iter(export.graphs.values()))
    missing = [variant for variant in args.variant if variant not in export.graphs]
    if missing:
        raise UserError(f"{export.folder} holds no {missing[0]} graph: choose another --variant")
    positions = graph.model.max_position_embeddings
    context = args.max_context or positions
    if context > positions and not args.beyond_positions:
        raise UserError(
            f"--max-context {context} exceeds the model's {positions} positions: choose a smaller one, or pass "
            "--beyond-positions if only timings are wanted"
        )
    if graph.max_topk > context and "sparse" in args.variant:
        raise UserError(
            f"k = {graph.max_topk} exceeds the capacity of {context} tokens: choose a larger --max-context, "
            "or export with a smaller --topk"
        )
    if (args.dense_slots or 0) >= context:
        raise UserError(
            f"with --dense-slots {args.dense_slots} an engine of {context} tokens would never select: choose fewer"
        )
    return Limits(args.max_batch, context, min(args.prefill_chunk, context))


# ONNX Runtime


def build_ort(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines import ort_cuda
    from engines.ort import check_types
    from engines.ort_graph import OPERATOR, OWN_OPERATOR, group_query, with_cpu_kernels

    runtime_version("ort")
    for_cpu = not ort_cuda.usable()
    for option in ("--dense-slots", "--standard-operators"):
        if not for_cpu and getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{option} is for CPUs, and ONNX Runtime would use the GPU here: leave it out")
    for variant in args.variant:  # all are checked before the first is written
        check_types(export.graphs[variant])
    adapted: onnx.ModelProto | None = None
    facts: dict[str, Any] = {}
    if "sparse" in args.variant and for_cpu:
        adapted, facts = sparse_for_cpus(export.graphs["sparse"], args)
    with_kernels = [variant for variant in args.variant if uses_kernels("ort", export.graphs[variant], args)]
    compiled = compiled_kernels() if with_kernels else None
    for variant in args.variant:
        graph = export.graphs[variant]
        library = compiled if variant in with_kernels else None
        with output_folder(args.out / "ort" / variant) as folder:
            if variant == "dense" or adapted is None:
                link_or_copy(graph.path, folder / "model.onnx")
                write_ort_engine(folder, graph, export, limits, graph.sha256)
            else:
                onnx.save(adapted, folder / "model.onnx")
                write_ort_engine(folder, graph, export, limits, None, library, **facts)
        report(args.out / "ort" / variant)
        if variant == "sparse" or not for_cpu:
            continue
        others: list[tuple[str, str, onnx.ModelProto, Path | None]] = []
        grouped = group_query(graph)
        if grouped is not None:
            others.append(("dense-gqa", OPERATOR, grouped, None))
        if library is not None:
            own = onnx.load(graph.path, load_external_data=False)
            if with_cpu_kernels(own):
                others.append(("dense-kernels", OWN_OPERATOR, own, library))
        for name, operator, model, its_library in others:
            with output_folder(args.out / "ort" / name) as folder:
                onnx.save(model, folder / "model.onnx")
                write_ort_engine(folder, graph, export, limits, None, its_library, attention_operator=operator)
            report(args.out / "ort" / name)


def uses_kernels(backend: str, graph: Graph, args: argparse.Namespace) -> bool:
    """Whether our CPU kernels are to select and attend."""
    from engines import ort_cuda
    from engines.ort_graph import fits_cpu_kernels

    wanted = backend == "ort" and not args.standard_operators
    return wanted and cpu.fast_here() and fits_cpu_kernels(graph) and not ort_cuda.usable()


def sparse_for_cpus(graph: Graph, args: argparse.Namespace) -> tuple[onnx.ModelProto | None, dict[str, Any]]:
    """The sparse graph as CPUs run it fastest (None: as exported), and facts for its manifest."""
    from engines.ort_graph import dense_while_short, with_cpu_kernels

    facts: dict[str, Any] = {"standard_operators": True} if args.standard_operators else {}
    slots = max(args.dense_slots or 0, min(graph.topk))
    adapted = dense_while_short(graph, slots)
    if adapted is not None:
        slots = slots if slots >= graph.max_topk else 0  # a session's caches have max_topk slots at least
        later = {"dense_slots": slots} if slots > graph.max_topk else {}
        facts |= {"dense_slots": slots, "selection": graph.selection | later}
    elif args.dense_slots:
        raise UserError("--dense-slots is for DSA with a cache of keys and values: leave it out for this model")
    if uses_kernels("ort", graph, args):
        model = adapted or onnx.load(graph.path, load_external_data=False)
        adapted = model if with_cpu_kernels(model) else adapted
    return adapted, facts


def compiled_kernels() -> Path:
    """The library of our CPU kernels. Raises UserError if it cannot be built."""
    try:
        with console.status("g++ compiles the kernels…"):
            return cpu.build()
    except BuildFailed as error:
        raise UserError(f"no kernels without a compiler: {error}; --standard-operators does without") from None


def write_ort_engine(
    folder: Path,
    graph: Graph,
    export: Export,
    limits: Limits,
    graph_sha256: str | None,
    library: Path | None = None,
    **facts: Any,
) -> None:
    """Completes a folder that holds model.onnx, and runs it once. graph_sha256: None is computed.

    library: of the custom operators in model.onnx.
    """
    link_or_copy(graph.path.parent / graph.weights, folder / graph.weights)
    files = {"model.onnx": graph_sha256, graph.weights: graph.weights_sha256}
    if library is not None:
        shutil.copyfile(library, folder / cpu.LIBRARY)
        files[cpu.LIBRARY] = None
    write_engine_manifest(folder, "ort", graph, export, limits, files, cpu=cpu_name(), **facts)
    check_engine(folder)


def check_engine(folder: Path) -> None:
    """Loads a fresh engine folder and runs calls of every kind. Raises UserError if a logit is not finite."""
    from engines.session import Session, open_runner

    runner = open_runner(folder, verify=False)
    engine = runner.engine
    tokens = np.arange(min(CHECK_TOKENS, engine.model.vocab_size))
    capacities = sorted({engine.max_topk, min(engine.selecting_slots, engine.limits.max_context)})
    logits = [Session(runner, capacity=capacity).prefill([tokens]) for capacity in capacities]
    session = Session(runner)  # as large as an answer's at first: torch.compile keeps what it makes of this size
    session.prefill([tokens[:-1]])
    logits.append(session.decode(tokens[-1:]))
    if not np.isfinite(logits).all():
        raise UserError(f"{folder}: the engine's logits are not finite; check the checkpoint that was exported")


# TensorRT-RTX


def build_tensorrt_rtx(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.nvidia import build_plan

    runtime_version("tensorrt-rtx")
    for variant in args.variant:
        graph = export.graphs[variant]
        plans = plans_of(graph, limits, args)
        with output_folder(args.out / "tensorrt-rtx" / variant) as folder, adapted_graph(graph, limits, folder) as onnx:
            try:
                for file, shapes in plans.items():
                    build_plan(
                        onnx,
                        folder / file,
                        shapes,
                        product="tensorrt-rtx",
                        title=f"tensorrt-rtx {variant} {file}",
                        compute_capabilities=args.compute_capability,
                        decompose_attention=graph.dtype == "fp32",
                    )
            except UserError as error:
                hint = ONE_KV_HEAD if graph.model.kv_heads == 1 and limits.max_batch > 1 else ""
                if variant == "sparse" and graph.precision != graph.dtype:
                    hint = QUANTISED
                raise UserError(f"{error}{hint}") from None
            write_engine_manifest(
                folder, "tensorrt-rtx", graph, export, limits, dict.fromkeys(plans),
                compute_capability=args.compute_capability, profiles=profile_table(plans),
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
    gpu = gpu_compute_capability()
    for variant in args.variant:
        graph = export.graphs[variant]
        with output_folder(args.out / "tensorrt" / variant) as folder, adapted_graph(graph, limits, folder) as onnx:
            jobs = trtexec_jobs(graph, limits, args, onnx, folder)
            for job in jobs:
                with timing_cache(args.timing_cache, job.timing_cache):
                    if binary:
                        flavour = "10.16" if version.startswith("10.") else "11.x"
                        run_trtexec(binary, trtexec.build_command(job, flavour), folder)
                    else:
                        build_with_python(job, f"tensorrt {variant} {job.plan.name}")
                if job.plugin_library:
                    from engines.nvidia import check_plugin_layers

                    check_plugin_layers(job.layers.read_text(), plugin_nodes(graph.path))
            write_engine_manifest(
                folder, "tensorrt", graph, export, limits, {job.plan.name: None for job in jobs},
                runtime=version, compute_capability=[gpu],
                plugin={"path": str(library.resolve()), "sha256": content_hash(library)}
                if variant == "sparse" else None,
                profiles=profile_table({job.plan.name: job.profiles for job in jobs}),
            )  # fmt: skip
        report(args.out / "tensorrt" / variant)


def plugin_nodes(path: Path) -> Counter[str]:
    """Nodes of this project's operators in a graph, by operator."""
    return Counter(node.op_type for node in ir.load(path).graph if node.domain == DOMAIN)


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
        timing_cache=job.timing_cache,
    )
    job.layers.write_text(inspect(job.plan, "tensorrt", job.plugin_library))


def trtexec_version(binary: str) -> str:
    banner = subprocess.run([binary, "--help"], capture_output=True, text=True).stdout
    version = trtexec.parse_version(banner)
    if version is None or not (10, 16) <= tuple(map(int, version.split("."))) < (12,):
        raise UserError(f"{binary} is not a trtexec of TensorRT 10.16 or 11.x: put that one on the PATH")
    return version


def print_trtexec(args: argparse.Namespace) -> None:
    """Writes <out>/trtexec/<variant>/ (graph for NVIDIA's parser, inputs for timing) and prints the commands."""
    export = open_export(args.onnx)
    limits = limits_of(export, args)
    blocks = []
    for variant in args.variant:
        graph = export.graphs[variant]
        target = args.out / "trtexec" / variant
        with output_folder(target) as folder:
            nvidia_graph.write(graph, limits.max_context, folder / "model.onnx")
            link_or_copy(graph.path.parent / graph.weights, folder / graph.weights)
            jobs = trtexec_jobs(graph, limits, args, target / "model.onnx", target)
            for job in jobs:
                trtexec.write_inputs(job, folder)
            write_manifest(folder, "trtexec", source_of(graph, export), limits=asdict(limits), variant=variant)
        blocks.append(f"# {variant}\n{trtexec.printed(jobs, target)}\n")
        if variant == "sparse" and not args.plugin_library.is_file():
            blocks.append(f"# {args.plugin_library} is not there yet: make plugins\n")
    print("\n".join(blocks), flush=True)  # all folders are written by now: the reader may leave after the first line


def trtexec_jobs(
    graph: Graph, limits: Limits, args: argparse.Namespace, onnx: Path, folder: Path
) -> list[trtexec.TrtexecJob]:
    """One job per plan."""
    return [
        trtexec.TrtexecJob(
            onnx=onnx,
            plan=folder / file,
            layers=folder / f"{Path(file).stem}.layers.json",
            timing_cache=folder / "timing.cache",
            profiles=shapes,
            limits=limits,
            plugin_library=args.plugin_library if graph.variant == "sparse" else None,
            serialize_plugins=args.serialize_plugins,
            dtype=graph.dtype,
        )
        for file, shapes in plans_of(graph, limits, args).items()
    ]


@contextmanager
def timing_cache(shared: Path, private: Path) -> Iterator[None]:
    """Gives a build its own copy of the timing cache; a build that succeeds replaces the shared file with it."""
    if shared.is_file():
        shutil.copyfile(shared, private)
    yield
    if private.is_file():
        shared.parent.mkdir(parents=True, exist_ok=True)
        partial = shared.with_name(shared.name + PARTIAL)
        shutil.copyfile(private, partial)
        partial.replace(shared)
        private.unlink()


# torch


def build_torch(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.torch_runner import link_checkpoint

    for variant in args.variant:
        graph = export.graphs[variant]
        with output_folder(args.out / "torch" / variant) as folder:
            files = link_checkpoint(export, folder, link_or_copy)
            write_engine_manifest(folder, "torch", graph, export, limits, dict.fromkeys(files), compiled=args.compile)
            check_engine(folder)
        report(args.out / "torch" / variant)


# Shared


def plans_of(graph: Graph, limits: Limits, args: argparse.Namespace) -> dict[str, list[Profile]]:
    """Plan file -> the profiles in it."""
    shapes = profiles(graph, limits)
    return {"engine.plan": shapes} if args.plans == "one" else {f"{one.name}.plan": [one] for one in shapes}


def profile_table(plans: Mapping[str, Sequence[Profile]]) -> list[dict[str, Any]]:
    """The manifest's list: name, plan file, number within the plan, shapes."""
    return [as_json(profile, file, number) for file, group in plans.items() for number, profile in enumerate(group)]


def build_each_in_its_own_process(args: argparse.Namespace) -> None:
    """Builds several backends one after the other: NVIDIA's two products must not share a process."""
    for backend in args.backend:
        process = multiprocessing.get_context("fork").Process(target=run, args=(lambda b=backend: build(b, args),))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:
            process.join()  # it got the signal too, and says so
        if process.exitcode and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise UserError(f"the build of {backend} was ended by {name}: a crash of its compiler, or no memory left")
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
    """files: name -> SHA-256 (None: computed here). runtime: its version, if not that of the installed package.

    The tokenizer comes with every engine.
    """
    tokenizer = tokenizer_files(export.folder)
    for file in tokenizer:
        shutil.copyfile(file, folder / file.name)
    files = {**files, **{file.name: None for file in tokenizer}}
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
        beyond_positions=limits.max_context > graph.model.max_position_embeddings,
        versions={"runtime": runtime or runtime_version(backend), "python": platform.python_version()},
        **asdict(step_weights(graph.path)),
        files={
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest or content_hash(folder / name)}
            for name, digest in files.items()
        },
        **{"selection": graph.selection, "compute_capability": [], "plugin": None, "profiles": [], **facts},
    )


def source_of(graph: Graph, export: Export) -> dict[str, str]:
    return {"path": str(export.folder.resolve()), "sha256": graph.sha256, "weights_sha256": graph.weights_sha256}


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
    return f"{name}, {usable_cpus()} cores"


def gpu_compute_capability() -> str:
    """Compute capability of the first GPU, e.g. "9.0"."""
    capability = installed_gpu()
    if capability is None:
        raise UserError("nvidia-smi names no GPU: a TensorRT engine is built on the machine that runs it")
    return capability


def report(folder: Path) -> None:
    manifest = read_manifest(folder, "engine", "python -m engines.build")
    mib = sum(facts["bytes"] for facts in manifest["files"].values()) / 2**20
    k = describe_selection(manifest["topk"], manifest["selection"])
    console.print(f"wrote {folder}: {manifest['variant']}, {manifest['precision']}, k = {k}, {mib:,.1f} MiB")


BUILDERS = {"ort": build_ort, "tensorrt-rtx": build_tensorrt_rtx, "tensorrt": build_tensorrt, "torch": build_torch}

if __name__ == "__main__":
    run(main)
