"""TensorRT: a plan with this project's plugins, by trtexec or TensorRT's Python API; trtexec's command lines."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import onnx

from dsa_export.cli import UserError, console
from dsa_export.files import link_or_copy, output_folder, temporary_name, write_manifest
from engines import nvidia, nvidia_graph, trtexec
from engines.artifacts import Export, Graph, Limits, content_hash, installed_gpu, open_export, runtime_version
from engines.build.folder import report, source_of, write_engine_manifest
from engines.build.options import limits_of
from engines.build.plans import adapted_graph, buildable, plans_of, profile_table
from plugins.registry import DOMAIN


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
    graphs = buildable(export, args.variant)
    version = installed_tensorrt(binary)
    gpu = gpu_compute_capability()
    for graph in graphs:
        variant = graph.variant
        with output_folder(args.out / "tensorrt" / variant) as folder, adapted_graph(graph, limits, folder) as adapted:
            jobs = trtexec_jobs(graph, limits, args, adapted, folder)
            for job in jobs:
                with timing_cache(args.timing_cache, job.timing_cache):
                    if binary:
                        flavour = "10.16" if version.startswith("10.") else "11.x"
                        run_trtexec(binary, trtexec.build_command(job, flavour), job)
                    else:
                        build_with_python(job, f"tensorrt {variant} {job.plan.name}")
                if job.plugin_library:
                    nvidia.check_plugin_layers(job.layers.read_text(), plugin_nodes(graph.path))
            write_engine_manifest(
                folder, "tensorrt", graph, export, limits, {job.plan.name: None for job in jobs},
                runtime=version, compute_capability=[gpu],
                plugin={"path": str(library.resolve()), "sha256": content_hash(library)}
                if variant == "sparse" else None,
                plugins_serialized=args.serialize_plugins,
                profiles=profile_table({job.plan.name: job.profiles for job in jobs}),
            )  # fmt: skip
        report(args.out / "tensorrt" / variant)


def plugin_nodes(path: Path) -> Counter[str]:
    """Nodes of this project's operators in a graph, by operator."""
    return Counter(
        node.op_type for node in onnx.load(path, load_external_data=False).graph.node if node.domain == DOMAIN
    )


def run_trtexec(binary: str, command: list[str], job: trtexec.TrtexecJob) -> None:
    """Runs trtexec; its output goes to build.log beside the plan. Raises UserError with its last error line."""
    log = job.plan.with_name("build.log")
    with console.status("trtexec builds the engine…"), log.open("w") as output:
        code = subprocess.run([binary, *command[1:]], stdout=output, stderr=subprocess.STDOUT).returncode
    if code or not (job.plan.is_file() and job.layers.is_file()):  # it has been seen to pass without having written
        lines = log.read_text(errors="replace").splitlines()
        error = next((line for line in reversed(lines) if "[E]" in line), lines[-1] if lines else "no output")
        raise UserError(f"trtexec failed (exit code {code}): {error}")


def build_with_python(job: trtexec.TrtexecJob, title: str) -> None:
    nvidia.build_plan(
        job.onnx,
        job.plan,
        job.profiles,
        product="tensorrt",
        title=title,
        plugin_library=job.plugin_library,
        serialize_plugins=job.serialize_plugins,
        timing_cache=job.timing_cache,
    )
    job.layers.write_text(nvidia.inspect(job.plan))


def installed_tensorrt(trtexec_path: str | None) -> str:
    """Version of trtexec, or without one of the Python package. Raises UserError unless it is 10.16 to 11.x."""
    version: str | None
    if trtexec_path is None:
        version = runtime_version("tensorrt")
        refusal = f"the package tensorrt {version} is not of 10.16 or 11.x: pip install 'tensorrt-cu13>=10.16,<12'"
    else:
        banner = subprocess.run([trtexec_path, "--help"], capture_output=True, text=True).stdout
        version = trtexec.parse_version(banner)
        refusal = f"{trtexec_path} is not a trtexec of TensorRT 10.16 or 11.x: put that one on the PATH"
    if version is None or not (10, 16) <= tuple(map(int, version.split(".")[:2])) < (12,):
        raise UserError(refusal)
    return version


def print_trtexec(args: argparse.Namespace) -> None:
    """Writes <out>/trtexec/<variant>/ (graph for NVIDIA's parser, inputs for timing) and prints the commands."""
    export = open_export(args.onnx)
    limits = limits_of(export, args)
    blocks = []
    for graph in buildable(export, args.variant):
        variant = graph.variant
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
        partial = temporary_name(shared)
        shutil.copyfile(private, partial)
        partial.replace(shared)
        private.unlink()


def gpu_compute_capability() -> str:
    """Compute capability of the first GPU, e.g. "9.0"."""
    capability = installed_gpu()
    if capability is None:
        raise UserError("nvidia-smi names no GPU: a TensorRT engine is built on the machine that runs it")
    return capability
