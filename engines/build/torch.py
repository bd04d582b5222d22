"""torch: the checkpoint of the export, for the project's own model."""

from __future__ import annotations

import argparse

from dsa_export.files import output_folder
from engines.artifacts import Export, Limits
from engines.build.folder import check_engine, dense_slots_facts, report, write_engine_manifest


def build_torch(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.torch_runner import link_checkpoint

    for variant in args.variant:
        graph = export.graphs[variant]
        with output_folder(args.out / "torch" / variant) as folder:
            files = dict.fromkeys(link_checkpoint(export, folder))
            facts = dense_slots_facts(graph, args.dense_slots) if graph.can_attend_densely else {}
            write_engine_manifest(folder, "torch", graph, export, limits, files, compiled=args.compile, **facts)
            check_engine(folder)
        report(args.out / "torch" / variant)
