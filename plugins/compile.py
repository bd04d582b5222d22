"""Compiles the kernels ahead of time: one cubin per variant and architecture, and PTX for GPUs that come later.

Needs triton, no GPU. What is up to date is kept, so a second run takes a second.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from plugins.variant import Variant

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


def all_variants() -> list[Variant]:
    """Every kernel of every operator. Raises RuntimeError under TRITON_INTERPRET=1: such kernels cannot be compiled."""
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it")
    from plugins.index_topk import kernel as index_topk
    from plugins.sparse_attention import kernel as sparse_attention

    return [*index_topk.variants(), *sparse_attention.variants()]


@cache
def sources(function: Callable[..., object]) -> str:
    """What decides a kernel's code: all kernel files of its operator, what they share, and how they are compiled here.

    Not triton's own key of it: version 3.6 gives another one in every process.
    """
    from plugins.dependent import begin

    folder = Path(inspect.getfile(function)).parent
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "op.py"]
    return "".join(path.read_text() for path in [*files, Path(inspect.getfile(begin.fn)), Path(__file__)])


def images_of(variant: Variant, arch: int, out: Path) -> tuple[list[Image], Path]:
    """A variant's images in `out`, and the record that exists if they are up to date."""
    import triton

    constants = variant.constants_on(arch)
    tools = (triton.__version__, triton.knobs.nvidia.ptxas.version)
    recipe = (*tools, sources(variant.kernel.fn), variant.signature(), constants, variant.options)
    stem = f"{variant.name}.sm_{arch}.{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}"
    record = out / f"{stem}.txt"  # written last: "shared bytes"
    shared = int(record.read_text()) if record.exists() else 0
    kinds = ("cubin", "ptx") if arch == PTX_FROM else ("cubin",)
    entry, warps = variant.kernel.fn.__name__, variant.options["num_warps"]
    return [Image(variant.name, entry, arch, k == "ptx", out / f"{stem}.{k}", warps, shared) for k in kinds], record


def compile_kernel(variant: Variant, arch: int) -> Any:
    """One variant for one architecture, as triton.compile returns it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = variant.signature()
    # Tensors are aligned to 16 bytes: checked by the callers, and what makes 16-byte loads possible.
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in variant.kernel.params
        if signature[parameter.name].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    source = ASTSource(variant.kernel, signature=signature, constexprs=variant.constants_on(arch), attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)


def compile_variant(name: str, arch: int, out: Path) -> list[Image]:
    """Compiles one variant for one architecture into `out`, unless it is there already."""
    variant = next(v for v in all_variants() if v.name == name)
    images, record = images_of(variant, arch, out)
    if record.exists():
        return images
    compiled = compile_kernel(variant, arch)
    if compiled.metadata.global_scratch_size:
        raise RuntimeError(f"{name} for sm_{arch} wants global scratch memory, which the plugin does not provide")
    for image in images:
        # The driver wants PTX as a C string.
        image.path.write_bytes(compiled.asm["ptx"].encode() + b"\0" if image.is_ptx else compiled.asm["cubin"])
    record.write_text(str(compiled.metadata.shared))
    return images_of(variant, arch, out)[0]


def compile_all(out: Path, jobs: int | None = None) -> list[Image]:
    """Compiles every variant for every architecture into `out`, `jobs` at a time (default: one per processor).

    What `out` holds of earlier versions is removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(variant, arch) for variant in all_variants() for arch in ARCHITECTURES]
    pending = [(variant.name, arch, out) for variant, arch in tasks if not images_of(variant, arch, out)[1].exists()]
    if pending:
        context = get_context("spawn")
        with ProcessPoolExecutor(jobs or os.cpu_count(), context, initializer=_environment) as pool:
            list(pool.map(compile_variant, *zip(*pending, strict=True)))
    images, current = [], set()
    for variant, arch in tasks:
        of_task, record = images_of(variant, arch, out)
        images += of_task
        current |= {record, *(image.path for image in of_task)}
    for path in set(out.iterdir()) - current:
        path.unlink()
    return images


def _environment() -> None:
    """Of a process that compiles."""
    import triton

    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # two thirds of a cubin
    # For sm_90 newer versions of triton take their ptxas for Blackwell, whose cubins need drivers of CUDA 13.
    os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", triton.knobs.nvidia.ptxas.path)
