"""Builds libdsa_cpu.so: the operators' CPU kernels, as custom operators for ONNX Runtime. `make plugins` runs it.

Needs a C++ compiler and nothing else. The kernels are compiled once for each instruction set, and the library takes
the best one that the processor has: it runs on every machine of the same architecture.
"""

from __future__ import annotations

import fcntl
import platform
import tempfile
from pathlib import Path

from plugins.compiler import LINK_FLAGS, compiler, run, run_all

HERE = Path(__file__).parent
BUILD = Path("build/plugins")
LIBRARY = "libdsa_cpu.so"
DOMAIN = "dsa.cpu"
OPERATORS = ("IndexTopK", "SparseAttention", "RoundKeys", "RoundQueries")

CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
             "-Wno-maybe-uninitialized")  # fmt: skip  # (GCC 12 warns of its own AVX-512 headers)
# As library.cpp names them, and asks the processor for them.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() == "x86_64":
    avx2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2")
    INSTRUCTION_SETS["avx2"] = avx2
    INSTRUCTION_SETS["avx512"] = (*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")))


def fast_here() -> bool:
    """Whether this processor has vectors for which the kernels are written: elsewhere standard operators are faster."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " avx2 " in cpuinfo.read_text()


def build(folder: Path = BUILD) -> Path:
    """Builds the library in `folder`, unless a present one is newer than its sources. Raises BuildFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    with (folder / f".{LIBRARY}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = [*HERE.glob("*.cpp"), *HERE.glob("*.h"), Path(__file__)]
        if library.exists() and library.stat().st_mtime > max(source.stat().st_mtime for source in sources):
            return library
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = {name: f"{scratch}/{name}.o" for name in INSTRUCTION_SETS}
            compile_one = [compiler(), *CXX_FLAGS, "-c"]
            run_all(
                [
                    [*compile_one, *flags, f"-DDSA_ISA={name}", str(HERE / "kernels.cpp"), "-o", objects[name]]
                    for name, flags in INSTRUCTION_SETS.items()
                ]
                + [[*compile_one, str(HERE / "library.cpp"), "-o", f"{scratch}/library.o"]]
            )
            partial = Path(scratch) / LIBRARY
            run([compiler(), *objects.values(), f"{scratch}/library.o", *LINK_FLAGS, "-s", "-o", str(partial)])
            return partial.replace(library)
