"""Command lines for trtexec, for TensorRT 10.16 and 11.x.

What differs (NVIDIA's migration guide 10.x -> 11.x): 11 is strongly typed always and dropped --stronglyTyped; CUDA
graphs, spin wait and "no data transfers" became its defaults (--noCudaGraph, --includeDataTransfers undo them), so they
are passed to 10.16 for comparable numbers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.artifacts import Limits
from engines.profiles import Profile

VERSIONS = ("10.16", "11.x")


@dataclass(frozen=True)
class TrtexecJob:
    """One graph for trtexec. `plugin_library` is None for a graph without plugins."""

    onnx: Path
    plan: Path
    layers: Path  # trtexec writes what the engine consists of here (JSON)
    timing_cache: Path  # read, if it is there, and written
    profiles: Sequence[Profile]
    limits: Limits
    plugin_library: Path | None
    serialize_plugins: bool
    dtype: str  # fp32 | fp16 | bf16


def build_command(job: TrtexecJob, version: str) -> list[str]:
    """The command that builds the engine without timing it. version: "10.16" or "11.x"."""
    command = ["trtexec", f"--onnx={job.onnx}", f"--saveEngine={job.plan}", "--skipInference"]
    command += ["--stronglyTyped"] if version == "10.16" else []
    if job.dtype == "fp32":
        command.append("--noTF32")  # TF32 would break the parity with the exported graph
    # Where there is no fused attention: in fp32, and for one token with long caches.
    command.append("--decomposableAttentions=*")
    command += _plugins(job)
    if job.plugin_library and job.serialize_plugins:
        command.append(f"--setPluginsToSerialize={job.plugin_library}")
    command.append(f"--timingCacheFile={job.timing_cache}")
    command += ["--profilingVerbosity=detailed", f"--exportLayerInfo={job.layers}"]
    for number, profile in enumerate(job.profiles):
        command.append(f"--profile={number}")
        for position, kind in enumerate(("min", "opt", "max")):
            shapes = {name: ranges[position] for name, ranges in profile.shapes.items()}
            command.append(f"--{kind}Shapes={_shapes(shapes)}")
    return command


def time_command(job: TrtexecJob, version: str, profile: int, inputs: Path) -> list[str]:
    """The command that times one profile, one row, all but the last S slots of the caches filled.

    inputs: folder of write_inputs(). trtexec would otherwise invent lengths, and the graph would write out of bounds.
    """
    chosen = job.profiles[profile]
    files = ",".join(f"{name}:{inputs / f'{chosen.name}.{name}.bin'}" for name in LENGTH_INPUTS)
    command = ["trtexec", f"--loadEngine={job.plan}", *_plugins(job), f"--useProfile={profile}"]
    command += [f"--shapes={_shapes({name: opt for name, (_, opt, _) in chosen.shapes.items()})}"]
    command += [f"--loadInputs={files}", "--warmUp=500", "--duration=10", "--percentile=50,90,99"]
    command += ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"] if version == "10.16" else []
    return command


LENGTH_INPUTS = ("input_ids", "past_lengths", "input_lengths")


def write_inputs(job: TrtexecJob, inputs: Path) -> None:
    """Writes the int64 inputs of time_command() as raw files, one row: tokens 0, a context that fills the capacity."""
    for profile in job.profiles:
        B, S = profile.shapes["input_ids"][1]
        values = {
            "input_ids": np.zeros((B, S), np.int64),
            "past_lengths": np.full(B, job.limits.max_context - S, np.int64),
            "input_lengths": np.full(B, S, np.int64),
        }
        for name, value in values.items():
            (inputs / f"{profile.name}.{name}.bin").write_bytes(value.tobytes())


def printed(jobs: Sequence[TrtexecJob], inputs: Path) -> str:
    """All commands of a variant for both versions, ready to be pasted into a shell."""
    names = " and ".join(profile.name for job in jobs for profile in job.profiles)
    blocks = []
    for version in VERSIONS:
        lines = [f"# TensorRT {version}: build, then time {names}"]
        commands = [build_command(job, version) for job in jobs]
        commands += [time_command(job, version, n, inputs) for job in jobs for n in range(len(job.profiles))]
        lines += [" \\\n  ".join(shlex.quote(word) for word in command) for command in commands]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def parse_version(banner: str) -> str | None:
    """The dotted version in trtexec's first line ("... [TensorRT v101600] ..."), or None."""
    found = re.search(r"\[TensorRT v(\d{6})\]", banner)
    if not found:
        return None
    number = int(found.group(1))
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _plugins(job: TrtexecJob) -> list[str]:
    return [f"--dynamicPlugins={job.plugin_library}"] if job.plugin_library else []


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
