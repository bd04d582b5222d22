"""Compiles the kernels ahead of time: one cubin per variant and architecture, and PTX for GPUs that come later.

Needs triton, no GPU. What is up to date is kept, so a second run takes a second.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90)
PTX_FROM = 89  # the PTX of sm_90 uses instructions (wgmma) that later GPUs do not have


@dataclass(frozen=True)
class Image:
    """A kernel's machine code for one architecture (or its PTX, to be compiled by the driver)."""

    name: str
    entry: str
    arch: int
    is_ptx: bool
    path: Path
    warps: int
    shared: int  # bytes


def all_variants() -> list:
    from plugins.index_topk import kernel as index_topk
    from plugins.sparse_attention import kernel as sparse_attention

    return [*index_topk.variants(), *sparse_attention.variants()]


def compile_variant(name: str, arch: int, out: Path) -> list[Image]:
    """Compiles one variant for one architecture into `out`, unless it is there already."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = next(v for v in all_variants() if v.name == name)
    signature = variant.signature()
    recipe = (triton.__version__, variant.kernel.cache_key, signature, variant.constants, variant.options)
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    stem = f"{name}.sm_{arch}.{digest}"
    record = out / f"{stem}.txt"  # written last: "shared bytes"
    paths = {"cubin": out / f"{stem}.cubin"} | ({"ptx": out / f"{stem}.ptx"} if arch == PTX_FROM else {})
    if not record.exists():
        # Tensors are aligned to 16 bytes: checked by the callers, and what makes 16-byte loads possible.
        aligned = {
            (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
        }
        source = ASTSource(variant.kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
        if compiled.metadata.global_scratch_size:
            raise RuntimeError(f"{name} for sm_{arch} wants global scratch memory, which the plugin does not provide")
        for kind, path in paths.items():
            text = compiled.asm[kind]
            # The driver wants PTX as a C string.
            path.write_bytes(text if isinstance(text, bytes) else text.encode() + b"\0")
        record.write_text(str(compiled.metadata.shared))
    shared = int(record.read_text())
    warps = variant.options["num_warps"]
    entry = variant.kernel.fn.__name__
    return [Image(name, entry, arch, kind == "ptx", path, warps, shared) for kind, path in paths.items()]


def compile_all(out: Path, jobs: int | None = None) -> list[Image]:
    """Compiles every variant for every architecture into `out`, `jobs` at a time (default: one per processor)."""
    out.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), initializer=_leave_interpreter)
    with pool:
        tasks = [(v.name, arch) for v in all_variants() for arch in ARCHITECTURES]
        results = pool.map(compile_variant, *zip(*tasks, strict=True), [out] * len(tasks))
        return [image for images in results for image in images]


def _leave_interpreter() -> None:
    """Kernels decorated under TRITON_INTERPRET=1 cannot be compiled; a worker is not bound to its parent's choice."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # two thirds of a cubin
