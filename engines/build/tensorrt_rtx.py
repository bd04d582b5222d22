"""TensorRT-RTX: a plan of standard operators, built without a GPU."""

from __future__ import annotations

import argparse

from dsa_export.cli import UserError
from dsa_export.files import output_folder
from engines import nvidia
from engines.artifacts import Export, Limits, runtime_version
from engines.build.folder import report, write_engine_manifest
from engines.build.plans import adapted_graph, buildable, plans_of, profile_table

# TensorRT-RTX 1.7.1 (an internal check of its compiler; tried with fp32 and fp16 models of two layers).
ONE_KV_HEAD = "; models with a single KV head are known to need --max-batch 1"
QUANTISED = "; quantised sparse graphs are known to fail: export without --weights"


def build_tensorrt_rtx(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    runtime_version("tensorrt-rtx")
    for graph in buildable(export, args.variant):
        variant = graph.variant
        plans = plans_of(graph, limits, args)
        with output_folder(args.out / "tensorrt-rtx" / variant) as folder, adapted_graph(graph, limits, folder) as onnx:
            try:
                for file, shapes in plans.items():
                    nvidia.build_plan(
                        onnx,
                        folder / file,
                        shapes,
                        product="tensorrt-rtx",
                        title=f"tensorrt-rtx {variant} {file}",
                        compute_capabilities=args.compute_capability,
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
