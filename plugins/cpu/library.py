"""Builds libdsa_cpu.so: the operators' CPU kernels, as custom operators for ONNX Runtime. `make plugins` runs it.

Needs a C++ compiler and nothing else. The kernels are compiled once for each instruction set, and the library takes
the best one that the processor has: it runs on every machine of the same architecture.
"""

from __future__ import annotations

import fcntl
import platform
import tempfile
from pathlib import Path

from plugins.cxx import LINK_FLAGS, BuildFailed, compiler, run, run_all

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/plugins"
LIBRARY = "libdsa_cpu.so"
DOMAIN = "dsa.cpu"
OPERATORS = ("IndexTopK", "SparseAttention", "DenseAttention", "RoundKeys", "RoundQueries")

CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
             "-Wno-maybe-uninitialized")  # fmt: skip  # (GCC 12 warns of its own AVX-512 headers)
# As library.cpp names them, and asks the processor for them.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() == "x86_64":
    avx2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
    INSTRUCTION_SETS["avx2"] = avx2
    INSTRUCTION_SETS["avx512"] = (*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")))


def fast_here() -> bool:
    """Whether this processor has vectors for which the kernels are written: elsewhere standard operators are faster."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " avx2 " in cpuinfo.read_text()


def build(folder: Path = BUILD) -> Path:
    """Builds the library in `folder`, unless a present one is newer than its sources. Raises BuildFailed."""
    library = folder / LIBRARY
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.h"), Path(__file__), Path(compiler.__code__.co_filename)]
    newest = max(source.stat().st_mtime for source in sources)

    def is_new() -> bool:
        return library.exists() and library.stat().st_mtime > newest

    if is_new():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{LIBRARY}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_new():
                _compile(folder, library)
    except OSError as error:
        raise BuildFailed(f"{error.filename or folder}: {error.strerror}") from error
    return library


def _compile(folder: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Linked in this order: of functions that all objects have (of the standard library), the first's is taken.
        objects = {name: f"{scratch}/{name}.o" for name in INSTRUCTION_SETS}
        start = [*compiler(), *CXX_FLAGS, "-c"]
        kernels = str(HERE / "kernels.cpp")
        run_all(
            [
                [*start, str(HERE / "library.cpp"), "-o", f"{scratch}/library.o"],
                *(
                    [*start, *flags, f"-DDSA_ISA={name}", kernels, "-o", objects[name]]
                    for name, flags in INSTRUCTION_SETS.items()
                ),
            ]
        )
        partial = Path(scratch) / LIBRARY
        run([*compiler(), *objects.values(), f"{scratch}/library.o", *LINK_FLAGS, "-s", "-o", str(partial)])
        partial.replace(library)
