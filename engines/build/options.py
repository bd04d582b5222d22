"""The arguments of `python -m engines.build`, and what is checked before anything is written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from dsa_export.cli import UserError, path, positive
from engines import triton_server
from engines.artifacts import BACKENDS, VARIANTS, Export, Limits
from plugins.load import LIBRARY

PLUGIN_LIBRARY = Path("build/plugins", LIBRARY)
DEFAULT_MAX_BATCH = 8
OPTIONS_OF = {
    "dense_slots": ["--backend ort", "--backend torch"],
    "standard_operators": ["--backend ort"],
    "kv_cache": ["--backend ort"],
    "triton_repository": [f"--backend {name}" for name in triton_server.PLATFORMS],
    "compile": ["--backend torch"],
    "compute_capability": ["--backend tensorrt-rtx"],
    "plans": ["--backend tensorrt-rtx", "--backend tensorrt", "--print-trtexec"],
    "timing_cache": ["--backend tensorrt"],
    "plugin_library": ["--backend tensorrt", "--print-trtexec"],
    "serialize_plugins": ["--backend tensorrt", "--print-trtexec"],
}
"""What has no effect without one of these."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engines.build", description="engines from an ONNX export")
    add = parser.add_argument
    add("--onnx", type=path, default=Path("out/onnx"), metavar="DIR", help="the export (default: %(default)s)")
    add(
        "--out",
        type=path,
        default=Path("out/engines"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
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
        help="ort on CPUs, torch: attend to everything while the caches have at most N slots per row, which is faster "
        "up to some thousand (one row on a GPU: up to 128K and more); with N above k that is more than the k best "
        "tokens, and an answer may change with the size of the caches (default: k, where nothing else changes)",
    )  # fmt: skip
    add(
        "--kv-cache", choices=("fp16",),
        help="ort on CPUs, with this project's kernels: keep keys and values in 16 bits, in half of the memory; the "
        "dense engine with those kernels too (default: the graph's type)",
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
        "--timing-cache", type=path, metavar="FILE",
        help="tensorrt: measured kernel times, read and written, so that the next build is faster "
        "(default: OUT/tensorrt/timing.cache)",
    )  # fmt: skip
    add(
        "--triton-repository", type=path, metavar="DIR",
        help="also write the engines as models for Triton Inference Server (ort, tensorrt)",
    )  # fmt: skip
    add(
        "--plugin-library",
        type=path,
        default=PLUGIN_LIBRARY,
        metavar="FILE",
        help="tensorrt (default: %(default)s)",
    )
    add("--serialize-plugins", action="store_true", help="tensorrt: put the plugin library into the plan")
    add("--print-trtexec", action="store_true", help="write the graphs for trtexec, print its commands and stop")
    args = parser.parse_args(argv)
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
        if not folder.name:
            parser.error(f"{folder} is no place for engines: name a new folder")
    args.timing_cache = args.timing_cache or args.out / "tensorrt" / "timing.cache"
    for capability in args.compute_capability:
        if not re.fullmatch(r"\d+\.\d", capability):
            parser.error(f"--compute-capability: {capability!r} is not of the form X.Y")
    return args


def limits_of(export: Export, args: argparse.Namespace) -> Limits:
    """The engine's limits. Raises UserError where the model cannot follow them."""
    missing = [variant for variant in args.variant if variant not in export.graphs]
    if missing:
        raise UserError(f"{export.folder} holds no {missing[0]} graph: choose another --variant")
    graph = next(iter(export.graphs.values()))
    positions = graph.model.max_position_embeddings
    context = args.max_context or positions
    if context > positions and not args.beyond_positions:
        raise UserError(
            f"--max-context {context} exceeds the model's {positions} positions: choose a smaller one, or pass "
            "--beyond-positions if only timings are wanted"
        )
    if context < 2:
        raise UserError(f"--max-context {context} leaves nothing to generate: choose more")
    if graph.max_topk > context and "sparse" in args.variant:
        raise UserError(
            f"k = {graph.max_topk} exceeds the capacity of {context} tokens: choose a larger --max-context, "
            "or export with a smaller --topk"
        )
    if args.dense_slots and not export.graphs["sparse"].can_attend_densely:
        raise UserError("--dense-slots is for DSA with a cache of keys and values: leave it out for this model")
    if args.dense_slots is not None and args.dense_slots < graph.max_topk:
        raise UserError(
            f"--dense-slots {args.dense_slots}: up to k = {graph.max_topk} all is attended to anyway, choose more"
        )
    if (args.dense_slots or 0) >= context:
        raise UserError(
            f"with --dense-slots {args.dense_slots} an engine of {context} tokens would never select: choose fewer"
        )
    return Limits(args.max_batch, context, min(args.prefill_chunk, context))
