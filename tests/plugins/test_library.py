"""The plugin library without a GPU: its kernels for every target, its exports, NVIDIA's registry, a C++ host, and the
launches it makes, recorded by a fake driver and compared with those of the torch launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.index_topk.op import check_options
from plugins.load import LibraryNotLoaded, load_library
from tests.plugins.cases import run_host, write_case
from tests.plugins.conftest import ROOT, compile_cpp

triton = pytest.importorskip("triton", reason="the kernels are compiled by triton")

from plugins import headers  # noqa: E402
from plugins.compile import ARCHITECTURES, PTX_FROM, Image, all_variants, compile_all, compile_kernel  # noqa: E402
from plugins.index_topk import kernel as topk_kernel  # noqa: E402
from plugins.index_topk import plan as topk_plan  # noqa: E402
from plugins.sparse_attention import kernel as attention_kernel  # noqa: E402

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KB that a block may use


@pytest.fixture(scope="module")
def images(library: Path) -> list[Image]:
    return compile_all(library.parent / "kernels")  # all up to date: the library was built from them


def test_every_kernel_is_compiled_for_every_target(images: list[Image]) -> None:
    names = {variant.name for variant in all_variants()}
    for arch in ARCHITECTURES:
        assert {i.name for i in images if i.arch == arch and not i.is_ptx} == names
    assert {i.name for i in images if i.is_ptx and i.arch == PTX_FROM} == names
    for image in images:
        content = image.path.read_bytes()
        assert image.shared <= SHARED_MEMORY[image.arch] * 1024, image
        if image.is_ptx:
            assert f".target sm_{image.arch}".encode() in content and content.endswith(b"\0")
        else:
            flags = int.from_bytes(content[48:52], "little")  # e_flags of the ELF header hold the architecture
            assert content[8] == 7, f"{image} wants a driver of CUDA 13 (its ABI is {content[8]})"
            assert content.startswith(b"\x7fELF") and image.arch in (flags & 0xFF, flags >> 8 & 0xFF), hex(flags)


def test_score_and_attention_use_tensor_cores_and_asynchronous_copies(images: list[Image]) -> None:
    ptx = {i.name: i.path.read_text() for i in images if i.is_ptx}
    for name in (n for n in ptx if "score" in n or "attend" in n):
        assert "mma.sync" in ptx[name] and "cp.async.cg.shared.global" in ptx[name], name


SPILLS = {
    "index_topk_finish_16384": 600,
    "index_topk_score_.*_64_4_prefill_fp8": 200,
    "sparse_attention_attend_.*_128": 8,
}
"""Bytes of stack that a thread may have: k above 2,048; fp8 keys before sm_89, decoded by integers; heads of 128, held
to 128 registers. No other kernel has any."""
if triton.__version__.startswith("3.7."):
    SPILLS |= {"index_topk_score_.*_64_4_prefill_fp8": 224, "index_topk_score_.*_64_16_prefill_fp8": 8}


def test_registers_suffice(images: list[Image]) -> None:
    """Spilling is the assembler's work: only the machine code shows it."""
    spilling = {}
    for image in (image for image in images if not image.is_ptx):
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", image.path]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack = int(re.search(r" STACK:(\d+) ", usage)[1])
        if stack > max((most for name, most in SPILLS.items() if re.fullmatch(name, image.name)), default=0):
            spilling[f"{image.name} for sm_{image.arch}"] = stack
    assert not spilling


def test_exports_are_the_two_entry_points(library: Path) -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in symbols.splitlines()} == {"getCreators", "setLoggerFinder"}
    needed = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    assert not [line for line in needed.splitlines() if "NEEDED" in line and ("cuda" in line or "nvinfer" in line)]


def test_missing_library_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LibraryNotLoaded, match=r"^no plugin library at .*: run `make plugins`$"):
        load_library(None, tmp_path / "libdsa_plugins.so")


def test_headers_come_from_the_folder_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(headers.HeadersNotFound, match=r"holds no NvInferRuntime\.h"):
        headers.tensorrt_headers(tmp_path)
    (tmp_path / "NvInferRuntime.h").touch()
    assert headers.tensorrt_headers(tmp_path) == tmp_path


# ------------------------------------------------------------------------------------------ TensorRT's own registry


@pytest.fixture(scope="module")
def lean(library: Path) -> Any:
    """tensorrt_lean with the library loaded (the registry belongs to the process)."""
    tensorrt = pytest.importorskip("tensorrt_lean", reason="the plugin registry is tensorrt-lean's")
    load_library(tensorrt.get_plugin_registry(), library)
    return tensorrt


def fields_of(tensorrt: Any, attributes: dict[str, Any]) -> Any:
    kinds = tensorrt.PluginFieldType

    def field(name: str, value: Any) -> Any:
        if isinstance(value, str):
            return tensorrt.PluginField(name, np.frombuffer(value.encode(), np.uint8), kinds.CHAR)
        is_float = isinstance(value, float)
        array = np.array([value], np.float32 if is_float else np.int64)
        return tensorrt.PluginField(name, array, kinds.FLOAT32 if is_float else kinds.INT64)

    return tensorrt.PluginFieldCollection([field(name, value) for name, value in attributes.items()])


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("IndexTopK", {"k": 64, "sinks": 4, "window": 8, "pool": 2, "plugin_version": "1", "plugin_namespace": "dsa"}),
        ("SparseAttention", {"scale": 0.125, "plugin_version": "1", "plugin_namespace": "dsa"}),
    ],
)
def test_registry_finds_the_creators_and_creates_plugins(
    lean: Any, library: Path, name: str, attributes: dict, tmp_path: Path
) -> None:
    registry = lean.get_plugin_registry()
    load_library(registry, library)  # again: harmless
    assert [c.name for c in registry.all_creators if c.plugin_namespace == "dsa"].count(name) == 1
    other = tmp_path / library.name
    other.write_bytes(library.read_bytes() + b"another")
    with pytest.raises(LibraryNotLoaded, match=f"this process runs the plugin library that was {library}, and {other}"):
        load_library(registry, other)
    creator = registry.get_creator(name, "1", "dsa")
    assert [field.name for field in creator.field_names] == list(attributes)
    plugin = creator.create_plugin("node_1", fields_of(lean, attributes), lean.TensorRTPhase.BUILD)
    assert plugin is not None
    core = plugin.get_capability_interface(lean.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (name, "1", "dsa")


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("IndexTopK", {"k": 0}, "dsa::IndexTopK: node node_1: attribute k must be 1 to 4096, got 0"),
        ("IndexTopK", {"k": 1.5}, "attribute k must be an integer"),
        ("IndexTopK", {"k": 64, "pool": 5}, "attribute pool must be at least 1 and divide k = 64, got 5"),
        (
            "IndexTopK",
            {"k": 8, "sinks": 4, "window": 5},
            "sinks = 4, window = 5 and pool = 1 always select 9 keys: k = 8",
        ),
        ("IndexTopK", {"top": 3}, "unknown attribute top"),
        ("SparseAttention", {}, "attribute scale is missing"),
        ("SparseAttention", {"scale": -1.0}, "attribute scale must be positive and finite, got -1"),
        ("SparseAttention", {"scale": 0.1, "plugin_version": "7"}, 'attribute plugin_version must be "1", got "7"'),
    ],
)
def test_registry_refuses_bad_attributes(
    lean: Any, name: str, attributes: dict, message: str, capfd: pytest.CaptureFixture
) -> None:
    creator = lean.get_plugin_registry().get_creator(name, "1", "dsa")
    assert creator.create_plugin("node_1", fields_of(lean, attributes), lean.TensorRTPhase.BUILD) is None
    captured = capfd.readouterr()
    assert message in captured.err + captured.out


@given(k=st.integers(0, 40), sinks=st.integers(-1, 20), window=st.integers(-1, 20), pool=st.integers(0, 9))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_plugin_takes_the_options_that_the_operator_takes(
    lean: Any, k: int, sinks: int, window: int, pool: int
) -> None:
    try:
        check_options(k, sinks, window, pool)
        fits = True
    except ValueError:
        fits = False
    creator = lean.get_plugin_registry().get_creator("IndexTopK", "1", "dsa")
    fields = fields_of(lean, {"k": k, "sinks": sinks, "window": window, "pool": pool})
    assert (creator.create_plugin("node_1", fields, lean.TensorRTPhase.BUILD) is not None) == fits


# -------------------------------------------------------------------------------------------------------- C++ host


def test_every_method_through_the_host(host: Path, library: Path) -> None:
    assert "all checks hold" in run_host(host, "check", library)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def topk_case(
    folder: Path,
    B: int,
    S: int,
    C: int,
    Hi: int,
    Di: int,
    k: int,
    dtype: torch.dtype,
    fp8: bool = False,
    **options: int,
) -> Path:
    """C: rows of index_k."""
    key_dtype = torch.float8_e4m3fn if fp8 else dtype
    inputs = [meta(B, S, Hi, Di, dtype=dtype), meta(B, S, Hi, dtype=dtype), meta(B, C, Di, dtype=key_dtype)]
    inputs += [meta(B, dtype=torch.int64), *([meta(B, C, dtype=torch.float32)] if fp8 else [])]
    return write_case(folder, "IndexTopK", {"k": k, **options}, inputs, meta(B, S, k, dtype=torch.int32))


def attention_case(folder: Path, B: int, S: int, C: int, Hkv: int, group: int, D: int, K: int) -> Path:
    q, cache = meta(B, Hkv * group, S, D), meta(B, Hkv, C, D)
    inputs = [q, cache, cache, meta(B, S, K, dtype=torch.int32)]
    return write_case(folder, "SparseAttention", {"scale": 0.125}, inputs, torch.empty_like(q))


@pytest.mark.parametrize(
    "B, S, C, k", [(1, 1, 100, 4096), (32, 1, 131072, 2048), (64, 1024, 2**20, 4096), (3, 7, 5000, 9)]
)
def test_workspace_is_the_documented_formula(
    host: Path, library: Path, tmp_path: Path, B: int, S: int, C: int, k: int
) -> None:
    case = topk_case(tmp_path, B, S, C, 8, 64, k, torch.float16)
    assert int(run_host(host, "workspace", library, case)) == topk_plan.largest_workspace(B, S, C, k)
    if k % 4 == 0:  # groups of tokens: a quarter of the rows and of what is selected
        case = topk_case(tmp_path, B, S, C // 4, 8, 64, k, torch.float16, fp8=True, pool=4)
        assert int(run_host(host, "workspace", library, case)) == topk_plan.largest_workspace(B, S, C // 4, k // 4)
    case = attention_case(tmp_path, B, S, C, 2, 7, 64, k)
    assert int(run_host(host, "workspace", library, case)) == attention_kernel.largest_workspace(B, S, 14, 2, 64)
    case = attention_case(tmp_path, B, S, C, 1, 40, 576, k)
    assert int(run_host(host, "workspace", library, case)) == attention_kernel.largest_workspace(B, S, 40, 1, 576)


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which libcuda.so.1 is the fake driver."""
    folder = tmp_path_factory.mktemp("driver")
    compile_cpp("fake_driver.cpp", folder / "libcuda.so.1", "-shared", "-fPIC")
    signatures = {
        v.kernel.fn.__name__: "".join("p" if t[0] == "*" else "i" for t in v.signature().values() if t != "constexpr")
        for v in all_variants()
    }
    (folder / "signatures").write_text("\n".join(f"{name} {letters}" for name, letters in signatures.items()))
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_DRIVER_SIGNATURES": str(folder / "signatures")}


class Recorder:
    """In place of a kernel: notes what the torch launcher launches, in the words of the fake driver."""

    def __init__(self, kernel: Any, launches: list[list[Any]]):
        self.fn, self.launches = kernel.fn, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, **options: Any) -> None:
            pointers = [a for a in arguments if a is None or isinstance(a, torch.Tensor)]
            numbers = [a for a in arguments if isinstance(a, int | float)]
            x, y = (*grid, 1)[:2]
            self.launches.append([self.fn.__name__, x, y, num_warps * 32, len(pointers), numbers])

        return launch


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, kernels: list[str]) -> list[list[Any]]:
    launches: list[list[Any]] = []
    for name in kernels:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    return launches


TOPK_KERNELS = ["score_kernel", "guess_kernel", "filter_kernel", "finish_kernel"]


def as_recorded(text: str) -> list[list[Any]]:
    launches = []
    for line in text.splitlines():
        name, x, y, threads, _shared, _attribute, *arguments = line.split()
        numbers = [int(a) for a in arguments if a[0] != "p"]
        launches.append([name, int(x), int(y), int(threads), len(arguments) - len(numbers), numbers])
    return launches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "B, S, C, Hi, Di, k",
    [
        (2, 1, 5000, 8, 64, 2048),
        (32, 1, 8192, 4, 128, 512),
        (2, 1, 9000, 64, 128, 2048),
        (1, 90, 9000, 33, 64, 512),
        (2, 1, 9000, 64, 64, 64),  # decoding takes more shared memory than prefill, which is prepared after it
        (1, 100, 40000, 16, 64, 64),  # several tiles
        (70, 8, 9000, 7, 64, 64),  # tiles of whole sequences
        (1, 90, 2**20, 7, 128, 64),  # tiles smaller than a scoring program's queries
        (3, 40, 200000, 7, 64, 64),
        (1, 3, 100, 4, 64, 128),  # capacity below k: nothing to score
    ],
)
def test_topk_launches_are_those_of_torch(
    host: Path, library: Path, fake_driver: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    B: int, S: int, C: int, Hi: int, Di: int, k: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    launches = recorded(monkeypatch, topk_kernel, TOPK_KERNELS)
    q, weights, keys = (torch.empty(s, dtype=dtype) for s in ((B, S, Hi, Di), (B, S, Hi), (B, C, Di)))
    topk_kernel.index_topk(q, weights, keys, torch.zeros(B, dtype=torch.int64), k)
    case = topk_case(tmp_path, B, S, C, Hi, Di, k, dtype)
    assert as_recorded(run_host(host, "run", library, case, 1, 1, 0, **fake_driver)) == launches


@pytest.mark.parametrize("arch", ["80", "120"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "B, S, C, k, sinks, window, pool",
    [
        (2, 1, 9000, 2048, 4, 100, 1),
        (1, 1, 17000, 4096, 0, 0, 1),
        (1, 100, 20000, 512, 5, 0, 4),  # several tiles
        (3, 9, 300, 1200, 0, 7, 4),  # as many groups as are selected: nothing to score
    ],
)
def test_topk_launches_with_options_are_those_of_torch(
    host: Path, library: Path, fake_driver: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    B: int, S: int, C: int, k: int, sinks: int, window: int, pool: int, fp8: bool, arch: str,
) -> None:  # fmt: skip
    launches = recorded(monkeypatch, topk_kernel, TOPK_KERNELS)
    q, weights = (torch.empty(s, dtype=torch.float16) for s in ((B, S, 8, 64), (B, S, 8)))
    keys = torch.empty(B, C, 64, dtype=torch.float8_e4m3fn if fp8 else torch.float16)
    scale = torch.empty(B, C) if fp8 else None
    topk_kernel.index_topk(q, weights, keys, torch.zeros(B, dtype=torch.int64), k, sinks, window, pool, scale)
    case = topk_case(tmp_path, B, S, C, 8, 64, k, torch.float16, fp8, sinks=sinks, window=window, pool=pool)
    output = run_host(host, "run", library, case, 1, 1, 0, **fake_driver, FAKE_DRIVER_ARCH=arch)
    assert as_recorded(output) == launches
    scales = {line.split()[10] for line in output.splitlines() if line.startswith("score_kernel")}
    assert not scales or (scales == {"p0"}) == (not fp8)


@pytest.mark.parametrize("arch", ["80", "86", "89", "90", "120"])
@pytest.mark.parametrize(
    "B, S, C, Hkv, group, D, K",
    [
        (1, 1, 5000, 2, 7, 64, 2048),
        (3, 5, 90, 4, 8, 128, 100),
        (200, 3, 90, 1, 1, 64, 9),
        (1, 1, 5000, 1, 128, 576, 2048),
        (3, 5, 90, 1, 20, 576, 100),
    ],
)
def test_attention_launches_are_those_of_torch(
    host: Path, library: Path, fake_driver: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    B: int, S: int, C: int, Hkv: int, group: int, D: int, K: int, arch: str,
) -> None:  # fmt: skip
    launches = recorded(monkeypatch, attention_kernel, ["attend_kernel", "combine_kernel"])
    q, cache = torch.empty(B, Hkv * group, S, D, dtype=torch.float16), torch.empty(B, Hkv, C, D, dtype=torch.float16)
    attention_kernel.sparse_attention(q, cache, cache, torch.zeros(B, S, K, dtype=torch.int32), 0.125)
    bits = int(np.float32(0.125).view(np.int32))
    expected = [[*launch[:-1], [bits if n == 0.125 else n for n in launch[-1]]] for launch in launches]
    case = attention_case(tmp_path, B, S, C, Hkv, group, D, K)
    output = run_host(host, "run", library, case, 1, 1, 0, **fake_driver, FAKE_DRIVER_ARCH=arch)
    assert as_recorded(output) == expected


def test_workspace_pointers_stay_inside_the_workspace(
    host: Path, library: Path, fake_driver: dict, tmp_path: Path
) -> None:
    """keys, listed, counts and threshold follow each other and end within what getWorkspaceSize asked for.

    All but threshold stand at addresses that kernels may take for multiples of 16.
    """
    B, S, C, k = 1, 1, 9000, 64
    case = topk_case(tmp_path, B, S, C, 8, 64, k, torch.float16)
    lines = run_host(host, "run", library, case, 1, 1, 0, **fake_driver).splitlines()
    keys, listed, counts, threshold = (int(a[1:]) for a in lines[2].split()[7:11])
    cut = topk_plan.plan(B, S, C, 8, 64, k)
    splits = B * cut.splits
    sizes = [4 * B * topk_plan.row_entries(C), 4 * splits * cut.listed, 4 * splits]
    assert [listed - keys, counts - listed, threshold - counts] == sizes
    assert threshold + 4 * B - keys <= topk_plan.largest_workspace(B, S, C, k)
    assert keys % 16 == listed % 16 == counts % 16 == 0 != threshold % 16
    unaligned = {
        (v.kernel.fn.__name__, p.name)
        for v in all_variants()
        for p in v.kernel.params
        if p.do_not_specialize_on_alignment
    }
    assert unaligned == {(kernel, "threshold") for kernel in ("guess_kernel", "filter_kernel", "finish_kernel")}


@pytest.mark.parametrize(("arch", "attribute"), [("89", "0"), ("90", "6"), ("120", "0")])
def test_launches_are_programmatic_where_the_kernels_wait(
    host: Path, library: Path, fake_driver: dict, tmp_path: Path, arch: str, attribute: str
) -> None:
    """CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6; the PTX for later GPUs is that of sm_89."""
    case = topk_case(tmp_path, 2, 1, 9000, 8, 64, 64, torch.float16)
    lines = run_host(host, "run", library, case, 1, 1, 0, **fake_driver, FAKE_DRIVER_ARCH=arch).splitlines()
    assert [line.split()[5] for line in lines] == [attribute] * len(TOPK_KERNELS)


def test_what_scoring_compiles_to_on_hopper() -> None:
    """Triton 3.6 loses the hint on its way to cp.async, and multiplies a single query without wgmma."""
    variants = {variant.name: variant for variant in all_variants()}
    is_new = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    decode, prefill = (
        compile_kernel(variants[f"index_topk_score_bf16_64_8_{phase}"], 90).asm["ptx"]
        for phase in ("decode", "prefill")
    )
    assert ("L2::cache_hint" in decode) == is_new and "L2::cache_hint" not in prefill
    assert ("wgmma" in decode) == is_new and "wgmma" in prefill


@pytest.mark.parametrize("arch", [89, 90])
def test_kernels_wait_from_hopper_on(arch: int) -> None:
    """The last kernel of an operator does not let the next one start early, whatever it is."""
    for variant in all_variants():
        if variant.name.startswith(("index_topk_guess", "index_topk_filter", "sparse_attention_combine")):
            ptx = compile_kernel(variant, arch).asm["ptx"]
            starts_next = "combine" not in variant.name
            assert ptx.count("griddepcontrol.wait") == (arch >= 90), variant.name
            assert ptx.count("griddepcontrol.launch_dependents") == (arch >= 90 and starts_next), variant.name


def test_old_gpu_is_refused(host: Path, library: Path, fake_driver: dict, tmp_path: Path) -> None:
    case = attention_case(tmp_path, 1, 1, 90, 2, 7, 64, 9)
    with pytest.raises(AssertionError, match=r"no kernel .* for compute capability 7.5 \(8.0 or newer is needed\)"):
        run_host(host, "run", library, case, 1, 1, 0, **fake_driver, FAKE_DRIVER_ARCH="75")


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_the_newest_machine_code_that_runs_is_loaded(
    host: Path, library: Path, fake_driver: dict, tmp_path: Path, arch: int
) -> None:
    """PTX only for what is newer than all."""
    case, loaded = attention_case(tmp_path, 1, 1, 5000, 2, 7, 64, 2048), tmp_path / "images"
    environment = fake_driver | {"FAKE_DRIVER_ARCH": str(arch), "FAKE_DRIVER_IMAGES": str(loaded)}
    run_host(host, "run", library, case, 1, 1, 0, **environment)
    expected = arch if arch in ARCHITECTURES else 0
    assert all(expected in map(int, line.split()) for line in loaded.read_text().splitlines())


def test_shared_memory_is_allowed_on_every_device(host: Path, library: Path, fake_driver: dict, tmp_path: Path) -> None:
    case = topk_case(tmp_path, 2, 1, 9000, 8, 64, 64, torch.float16)
    run_host(host, "run", library, case, 2, 1, 0, **fake_driver, FAKE_DRIVER_DEVICES="2")


def test_contexts_on_several_threads(host: Path, library: Path, fake_driver: dict, tmp_path: Path) -> None:
    case = topk_case(tmp_path, 2, 1, 9000, 8, 64, 64, torch.float16)
    launches = as_recorded(run_host(host, "run", library, case, 4, 5, 0, **fake_driver))
    assert len(launches) == 4 * 5 * 4


def test_module_says_what_is_missing(tmp_path: Path) -> None:
    """`python -m plugins.embed` without headers: one line, exit 1."""
    command = [sys.executable, "-m", "plugins.embed", "--out", str(tmp_path / "plugins"), "--jobs", "1"]
    environment = {**os.environ, "TENSORRT_INCLUDE_DIR": str(tmp_path / "nothing")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith("error: TENSORRT_INCLUDE_DIR=") and result.stderr.count("\n") == 1
