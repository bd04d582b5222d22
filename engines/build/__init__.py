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
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from dsa_export.cli import Terminated, UserError, console, run
from dsa_export.files import check_output
from engines import memory, triton_server
from engines.artifacts import open_export, read_engine
from engines.build.options import limits_of, parse_arguments
from engines.build.ort import as_cached, build_ort, uses_kernels
from engines.build.tensorrt import build_tensorrt, print_trtexec
from engines.build.tensorrt_rtx import build_tensorrt_rtx
from engines.build.torch import build_torch
from engines.text import tokenizer_files

BUILDERS = {"ort": build_ort, "tensorrt-rtx": build_tensorrt_rtx, "tensorrt": build_tensorrt, "torch": build_torch}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.triton_repository:
        triton_server.check_options(args.backend, args.plans)
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
            check_output(triton_server.model_folder(args.triton_repository, variant, backend), triton_server.KIND)
            triton_server.check_types(export.graphs[variant])
        graph = export.graphs[variant]
        if variant == "sparse" and uses_kernels(backend, graph, args):  # of the dense ones, what the exported needs
            graph = as_cached(replace(graph, for_kernels=True), args)
        needed = memory.estimate(graph, limits, export.manifest["weights"]["bytes"])
        console.print(f"{backend} {variant} will need {needed} at {limits.max_batch} x {limits.max_context:,} tokens")
        memory.check(backend, needed)
    BUILDERS[backend](export, limits, args)
    if args.triton_repository:
        for variant in args.variant:
            engine = read_engine(args.out / backend / variant)
            console.print(f"wrote {triton_server.write_model(engine, args.triton_repository)}")


def build_each_in_its_own_process(args: argparse.Namespace) -> None:
    """Builds several backends one after the other: NVIDIA's two products must not share a process."""
    for backend in args.backend:
        process = multiprocessing.get_context("fork").Process(target=run, args=(lambda b=backend: build(b, args),))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):  # Ctrl-C reaches it without us
                process.terminate()
            process.join()  # it says so
            sys.exit(process.exitcode or 1)
        if process.exitcode and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise UserError(f"the build of {backend} was ended by {name}: a crash of its compiler, or no memory left")
        if process.exitcode:
            sys.exit(process.exitcode)
