"""What an engine needs while it runs, known before it is built; what cannot fit is refused before the time is spent.

Peak = weights + caches + one layer's workspace, whatever the context: prefill chunks shrink where a longer cache would
make their workspace exceed WORKSPACE_BYTES.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsa_export.cli import UserError, console
from dsa_export.memory import available_memory
from engines.artifacts import Engine, Limits, Variant, nvidia_smi

HOST_BYTES_PER_WEIGHT_BYTE = 4
"""TensorRT-RTX holds several copies while it builds: 9 GB for the 2.4 GB of Qwen2.5-0.5B in fp32."""
MIB = 2**20
WORKSPACE_BYTES = 512 * 2**20
"""Bound of what one layer may need for one prefill chunk; the chunk is halved until it fits."""

ADVICE = {
    "ort": "export with --weights int4",
    "tensorrt": "choose a smaller --max-batch or --max-context, or export with --weights int4",
    "tensorrt-rtx": "export with --dtype bf16",
    "torch": "export with --dtype bf16",
}
"""What needs less of what check() asks for: but for TensorRT that is weights alone, and not all take quantised ones."""


class OutOfMemory(UserError):
    """There was no memory for caches or for a call: with less in use it may work."""


def no_room(engine: Engine, batch: int, capacity: int) -> OutOfMemory:
    gib = batch * capacity * engine.cache_bytes_per_token() / 2**30
    return OutOfMemory(f"no memory for {gib:.1f} GiB of caches ({batch} rows of {capacity} tokens)")


@dataclass(frozen=True)
class Estimate:
    """Bytes. caches: what every row's full context takes. workspace: one layer's, for the largest call."""

    weights: int
    caches: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.workspace

    def __str__(self) -> str:
        parts = {"weights": self.weights, "caches": self.caches, "workspace": self.workspace}
        text = " + ".join(f"{size / MIB:,.0f} MiB {name}" for name, size in parts.items())
        return f"{text} = {self.total / MIB:,.0f} MiB"


def chunk_tokens(variant: Variant, largest: int, batch: int, capacity: int) -> int:
    """The largest halving of `largest` tokens per row whose workspace in one layer stays below WORKSPACE_BYTES."""
    chunk = largest
    while chunk > 1 and chunk * batch * variant.workspace_bytes_per_query(capacity) > WORKSPACE_BYTES:
        chunk //= 2
    return chunk


def estimate(variant: Variant, limits: Limits, weight_bytes: int) -> Estimate:
    """What is needed beside the interpreter to serve `limits` fully; ONNX Runtime's caches grow with use up to that."""
    batch, capacity = limits.max_batch, limits.max_context
    queries = batch * chunk_tokens(variant, limits.prefill_chunk, batch, capacity)
    return Estimate(
        weights=weight_bytes,
        caches=round(batch * capacity * variant.cache_bytes_per_token()),
        workspace=queries * variant.workspace_bytes_per_query(capacity),
    )


def check(backend: str, needed: Estimate) -> None:
    """Raises UserError if the engine cannot be built or held by this machine, as far as that can be read."""
    if backend == "tensorrt":
        free, needs, where = gpu_memory(), needed.total, "the GPU"
    else:
        factor = HOST_BYTES_PER_WEIGHT_BYTE if backend == "tensorrt-rtx" else 1
        free, needs, where = available_memory(), factor * needed.weights, "this machine"
    if free is not None and needs > free:
        raise UserError(
            f"{backend} needs about {needs / MIB:,.0f} MiB and {where} has {free / MIB:,.0f} MiB: {ADVICE[backend]}"
        )
    if backend == "ort" and free is not None and needed.total > free:  # its caches grow with use
        console.print(f"{where} has {free / MIB:,.0f} MiB: not enough for so many tokens of all rows at a time")


def gpu_memory() -> int | None:
    """Bytes of the first visible GPU; None where nvidia-smi does not say."""
    total = nvidia_smi("memory.total")
    return int(total) * MIB if total and total.isdecimal() else None
