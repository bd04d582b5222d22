"""torch: the checkpoint of the export, for the project's own model."""

from __future__ import annotations

import argparse

from dsa_export.files import link_or_copy, output_folder
from engines.artifacts import Export, Limits
from engines.build.folder import check_engine, report, write_engine_manifest


def build_torch(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.torch_runner import link_checkpoint

    for variant in args.variant:
        graph = export.graphs[variant]
        with output_folder(args.out / "torch" / variant) as folder:
            files = link_checkpoint(export, folder, link_or_copy)
            write_engine_manifest(folder, "torch", graph, export, limits, dict.fromkeys(files), compiled=args.compile)
            check_engine(folder)
        report(args.out / "torch" / variant)
