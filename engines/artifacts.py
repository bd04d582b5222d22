"""The folders that engines are made from and live in: what their manifests say, checked before anything is loaded.

`Export` is what `python -m dsa_export.onnx` wrote, `Engine` what `python -m engines.build` wrote. The cache layout is
read from here by everything that needs it: sessions, profiles and byte accounting.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shlex
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_export.capacity import cache_rows, stride_of
from dsa_export.cli import UserError
from dsa_export.files import MANIFEST, read_manifest, sha256
from dsa_export.selection import INDEX_CACHES
from dsa_export.topk import topk_per_layer
from plugins import cpu

VARIANTS = ("dense", "sparse")
DTYPES = ("fp32", "fp16", "bf16")
BACKENDS = ("ort", "tensorrt-rtx", "tensorrt", "torch")
GQA, OWN_ATTENTION = "GroupQueryAttention", "DenseAttention"
"""What a dense graph may attend with but Attention: ONNX Runtime's other operator, and our kernel (plugins/cpu)."""
BUILD_OPTIONS = ("dense_slots", "kv_cache")
"""Of the selection in an engine's manifest: what the build chose; the rest are fields of DSAConfig."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}

# The distribution whose version an engine depends on, and how many parts of the version must agree: ONNX Runtime reads
# models of its other patch releases, plans are tied to the exact build (trtexec tells but three parts of it), torch
# reads every checkpoint.
RUNTIMES = {
    "ort": (("onnxruntime", "onnxruntime-gpu"), 2),
    "tensorrt-rtx": (("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"), 4),
    "tensorrt": (("tensorrt-cu13", "tensorrt-cu12", "tensorrt"), 4),
    "torch": (("torch",), 1),
}


@dataclass(frozen=True)
class CacheTensor:
    """One cache of a layer. `shape` holds integers, "batch" and a name of dsa_export.capacity.

    layers: those that have it; None is all. recent: the last rows before a call's own that it reads, where only those.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    layers: tuple[int, ...] | None = None
    recent: int | None = None

    def concrete(self, batch: int, capacity: int) -> tuple[int, ...]:
        """The shape for a batch whose rows have room for `capacity` tokens."""
        sizes = [batch if size == "batch" else size for size in self.shape]
        return tuple(
            int(cache_rows(capacity, stride_of(size) or 1)) if isinstance(size, str) else size for size in sizes
        )

    @property
    def stride(self) -> int:
        """Tokens per row."""
        return next(stride for size in self.shape if (stride := stride_of(size)))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in one layer."""
        return math.prod(size for size in self.shape if isinstance(size, int)) * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one row takes in one layer."""
        return self.row_bytes / self.stride


FEED_FORWARD_BYTES = 6 * 6 * 4
"""For each number of a hidden state: six states in fp32, up to six times as wide (of Qwen2.5), the layer's others
among them. Of Qwen2.5-0.5B's sizes 129 KB a query, where 108 and 150 were measured in calls of 1,024 and 4,096."""


@dataclass(frozen=True)
class Model:
    """The facts about the model that a deployment needs."""

    hidden_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    index_heads: int
    index_dim: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_id: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """What an engine was built for: rows, tokens per row (prompt and answer), tokens per prefill call."""

    max_batch: int
    max_context: int
    prefill_chunk: int


@dataclass(frozen=True)
class Variant:
    """What dense and sparse graphs have in common for those who run them."""

    variant: str
    dtype: str  # fp32 | fp16 | bf16: activations, caches, and weights that are not quantised
    precision: str  # of the weights: fp32 | fp16 | bf16 | int8 | int4
    topk: tuple[int, ...]  # k of every layer
    selection: dict[str, Any]  # options that are not as by default: fields of DSAConfig, --dense-slots, --kv-cache
    random_indexer: bool
    model: Model
    cache: tuple[CacheTensor, ...]

    @property
    def max_topk(self) -> int:
        """The largest k of any layer: the capacity that the sparse graph needs at least."""
        return max(self.topk)

    @property
    def reduces_to_dense(self) -> bool:
        """Whether up to k tokens the variant computes what its dense twin does: where an indexer selects, as in DSA."""
        return any(tensor.name in INDEX_CACHES for tensor in self.cache)

    @property
    def dense_slots(self) -> int:
        """A sparse engine attends to everything while its caches have at most so many slots (0: by its layers' k)."""
        return 0

    @property
    def can_attend_densely(self) -> bool:
        """Whether a sparse engine may attend to everything while its caches are short: DSA on keys and values.

        Over latent rows dense attention in torch and ONNX Runtime is no faster.
        """
        names = {tensor.name for tensor in self.cache}
        return self.variant == "sparse" and self.reduces_to_dense and {"key", "value"} <= names

    @property
    def kv_cache(self) -> str | None:
        """The type in which keys and values are cached, if it is not the activations'."""
        return self.selection.get("kv_cache")

    @property
    def model_options(self) -> dict[str, Any]:
        """The options of the selection that are fields of DSAConfig: what the model itself is loaded with."""
        return {name: value for name, value in self.selection.items() if name not in BUILD_OPTIONS}

    @property
    def has_kernels(self) -> bool:
        """Whether our CPU kernels (plugins/cpu) select and attend."""
        return False

    def cache_names(self) -> list[tuple[str, CacheTensor]]:
        """("{layer}.{name}", tensor) for every cache, in the order of the graph's inputs."""
        return [(f"{layer}.{tensor.name}", tensor) for layer, tensor in self._cached()]

    def _cached(self) -> list[tuple[int, CacheTensor]]:
        layers = range(self.model.layers)
        return [(i, tensor) for i in layers for tensor in self.cache if tensor.layers is None or i in tensor.layers]

    def cache_bytes_per_token(self) -> float:
        """Bytes that one more token of one row takes, over all layers."""
        return sum(tensor.bytes_per_token for _, tensor in self._cached())

    def cache_bytes_read(self, context: int, queries: int = 1, capacity: int | None = None) -> int:
        """Bytes of one row's caches that a call must read at least once: `queries` new tokens, `context` in all.

        Dense attention reads every cached row; sparse attention K and V (or the latent row, which is both) of the
        selected rows and, beyond k tokens, every index key (of pooled ones the means, and of the single keys those of
        the groups that the call changes). Native sparse attention reads every compressed row, and of its window and of
        what it compresses the most recent rows. With `capacity` slots (None: many) a sparse engine may attend densely.
        """
        if capacity is not None and capacity <= self.dense_slots:
            return sum(context * tensor.row_bytes for _, tensor in self._cached() if tensor.name not in INDEX_CACHES)
        gathered = {"key", "value", "latent"} if self.variant == "sparse" else set()
        pooled = next((tensor.stride for tensor in self.cache if tensor.name == "pooled"), None)
        read = 0
        for layer, tensor in self._cached():
            if tensor.name in INDEX_CACHES and context <= self.topk[layer]:
                continue
            rows = -(-context // tensor.stride)
            if tensor.name in gathered:
                rows = min(context, queries * min(context, self.topk[layer]))
            elif tensor.recent is not None:
                rows = min(context, queries + tensor.recent)
            elif tensor.name == "index" and pooled:
                rows = min(context, queries + 2 * pooled - 2)
            read += rows * tensor.row_bytes
        return read

    def workspace_bytes_per_query(self, capacity: int) -> int:
        """Bytes that one layer of the ONNX form needs for one query token of one row: it bounds the prefill chunk.

        Of attention and of the feed-forward, which take turns, the larger. Together with the weights and the caches
        this is a session's peak: `engines.memory.estimate`.
        """
        return max(self._attention_bytes_per_query(capacity), FEED_FORWARD_BYTES * self.model.hidden_size)

    def _attention_bytes_per_query(self, capacity: int) -> int:
        """Dense: scores and probabilities of every head, fp32; none by our CPU kernels, but for latent rows.

        Sparse: index scores of every indexer head before and after ReLU, their weighted sum, the same masked, and its
        mask; then K and V of the selected rows, gathered and reshaped; with our CPU kernels candidates and indices
        alone. Native sparse attention: scores, masked scores and probabilities of its compressed rows instead of index
        scores.
        """
        if self.variant == "dense" or capacity <= self.dense_slots:
            in_tiles = self.has_kernels and all(tensor.name != "latent" for tensor in self.cache)
            return 0 if in_tiles else 2 * capacity * self.model.query_heads * 4
        selected = 2 * self.max_topk * self.model.kv_heads * self.model.head_dim * 4 * 2
        if self.has_kernels:
            selected = self.max_topk * (8 + 4)
        compressed = [tensor.concrete(1, capacity)[2] for tensor in self.cache if tensor.name == "compressed"]
        if compressed:
            return 3 * compressed[0] * self.model.query_heads * 4 + selected
        if self.has_kernels:
            return selected
        rows = {tensor.name: tensor.concrete(1, capacity)[2] for tensor in self.cache}
        scored = rows.get("pooled", rows["index"])
        return scored * (2 * self.model.index_heads + 3) * 4 + selected


@dataclass(frozen=True)
class Graph(Variant):
    """One exported graph: `path` of the .onnx file (its weights lie beside it under `weights`) and their hashes."""

    path: Path
    sha256: str
    weights: str
    weights_sha256: str
    for_kernels: bool = False  # what is being built of it

    @property
    def has_kernels(self) -> bool:
        return self.for_kernels


@dataclass(frozen=True)
class Export:
    folder: Path
    graphs: dict[str, Graph]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Engine(Variant):
    """One built engine. `manifest` holds everything else that the build wrote down."""

    folder: Path
    backend: str
    limits: Limits
    manifest: dict[str, Any]

    @property
    def dense_slots(self) -> int:
        return self.manifest.get("dense_slots") or 0

    @property
    def dense_while_short(self) -> bool:
        """Whether a layer attends to everything up to k slots, or `dense_slots` if that is more."""
        return self.manifest.get("dense_slots") is not None

    @property
    def selecting_slots(self) -> int:
        """The least slots with which a sparse engine selects in every layer."""
        return max(self.max_topk, self.dense_slots) + self.dense_while_short

    @property
    def has_kernels(self) -> bool:
        return self.cpu_library is not None

    @property
    def cpu_library(self) -> Path | None:
        """The library of our CPU kernels that its graph needs; None: it has standard operators only."""
        return self.folder / cpu.LIBRARY if cpu.LIBRARY in self.manifest["files"] else None

    @property
    def narrowest_dtype(self) -> str:
        """Of the activations, and of the caches of keys and values: fp32 | fp16 | bf16."""
        return self.kv_cache or self.dtype

    @property
    def attention_operator(self) -> str | None:
        """The operator that a dense graph was rewritten to attend with; None: as exported."""
        return self.manifest.get("attention_operator")


def open_export(folder: Path) -> Export:
    """Opens an export folder. Raises UserError if it is missing, or if a graph or the weights are not what it wrote."""
    made_by = "python -m dsa_export.onnx"
    again = f"run `{made_by}` again"
    manifest = read_manifest(folder, "onnx", made_by)
    try:
        weights = manifest["weights"]
        graphs = {
            variant: Graph(
                **_variant_facts(variant, manifest, graph["cache"]),
                path=folder / graph["path"],
                sha256=graph["sha256"],
                weights=weights["file"],
                weights_sha256=weights["sha256"],
            )
            for variant, graph in manifest["graphs"].items()
        }
        expected: dict[Path, tuple[int | None, str]] = {graph.path: (None, graph.sha256) for graph in graphs.values()}
        for graph in graphs.values():
            expected[graph.path.parent / graph.weights] = (_whole(weights, "bytes"), weights["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} lacks or misstates {error}: {again}") from None
    check_files(expected, again)
    return Export(folder, graphs, manifest)


def read_engine(folder: Path) -> Engine:
    """What an engine folder says of itself. Raises UserError if it is not one; checks nothing else."""
    manifest = read_manifest(folder, "engine", "python -m engines.build")
    try:
        engine = Engine(
            **_variant_facts(manifest["variant"], manifest, manifest["cache"]),
            folder=folder,
            backend=manifest["backend"],
            limits=Limits(**{name: _whole(manifest["limits"], name, 1) for name in Limits.__dataclass_fields__}),
            manifest=manifest,
        )
        _one_of(BACKENDS, manifest, "backend")
        # What open_engine() checks and what runners and the comparison read.
        for facts in (*manifest["files"].values(), manifest["source"], *filter(None, [manifest["plugin"]])):
            str(facts["sha256"])
        for facts in manifest["files"].values():
            _whole(facts, "bytes")
        for name in ("step_weight_bytes", "step_weights", *({"dense_slots"} & manifest.keys())):
            _whole(manifest, name)
        str(manifest["versions"]["runtime"]), list(manifest["compute_capability"]), list(manifest["profiles"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        again = rebuild_command(folder, manifest)
        raise UserError(f"{folder / MANIFEST} lacks or misstates {error}: run `{again}`") from None
    return engine


def open_engine(folder: Path, *, verify: bool = True) -> Engine:
    """Opens an engine folder after checking that what it holds can be run here.

    verify: compare the hashes of the files too, not only their sizes (reads the weights once).
    Raises UserError, saying what to rebuild, if the folder is not an engine's, if the installed runtime, the GPU or
    the plugin library is another, if its export was made again, or if a file was changed since the build.
    """
    engine = read_engine(folder)
    manifest = engine.manifest
    again = f"run `{rebuild_command(folder, manifest)}`"
    built_with, installed = str(manifest["versions"]["runtime"]), runtime_version(engine.backend)
    parts = min(RUNTIMES[engine.backend][1], built_with.count(".") + 1)
    if installed.split(".")[:parts] != built_with.split(".")[:parts]:
        raise UserError(f"{folder} was built with {engine.backend} {built_with}, installed is {installed}: {again}")
    check_machine(engine, again)
    check_source(engine, again)
    files = {
        folder / name: (facts["bytes"], facts["sha256"] if verify else None)
        for name, facts in manifest["files"].items()
    }
    check_files(files, again)
    return engine


def check_files(expected: Mapping[Path, tuple[int | None, str | None]], again: str) -> None:
    """Raises UserError unless every path has its size and SHA-256 (None: not checked)."""
    for path, (size, digest) in expected.items():
        if not path.is_file():
            raise UserError(f"{path} is missing: {again}")
        stat = path.stat()
        if size is not None and stat.st_size != size:
            raise UserError(f"{path} has {stat.st_size} bytes instead of {size} (truncated or replaced): {again}")
        if digest and content_hash(path) != digest:
            raise UserError(f"{path} is not the file that was written (its SHA-256 differs from the manifest): {again}")


def runtime_version(backend: str) -> str:
    """Version of the installed runtime of a backend. Raises UserError, naming what to install, if there is none."""
    distributions = RUNTIMES[backend][0]
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(f"backend {backend} needs {distributions[0]}: pip install {distributions[0]}")


def check_machine(engine: Engine, again: str) -> None:
    """Raises UserError if the GPU or the plugin library is not what the engine was built for."""
    built_for, plugin = engine.manifest["compute_capability"], engine.manifest["plugin"]
    gpu = installed_gpu() if built_for else None
    if gpu is not None and gpu not in built_for:
        built = " and ".join(built_for)
        raise UserError(f"{engine.folder} was built for compute capability {built}, this GPU has {gpu}: {again}")
    if not plugin:
        return
    library = Path(plugin["path"])
    if not library.is_file():
        if engine.manifest.get("plugins_serialized"):
            return
        raise UserError(f"the plugin library {library} of {engine.folder} is missing: {again} after `make plugins`")
    if content_hash(library) != plugin["sha256"]:
        raise UserError(f"{engine.folder} was built with another {library} than the present one: {again}")


def check_source(engine: Engine, again: str) -> None:
    """Raises UserError if the export that the engine came from is still there and holds other content by now."""
    source = engine.manifest["source"]
    try:
        if not (path := Path(source["path"])).is_absolute():
            return  # of an older manifest: what lies there now, seen from here, may be another export
        export = json.loads((path / MANIFEST).read_text())
        present = export["graphs"][engine.variant]["sha256"], export["weights"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # moved away: an engine does not need its export
    if present != (source["sha256"], source.get("weights_sha256")):
        raise UserError(f"{source['path']} was exported again since {engine.folder} was built: {again}")


def installed_gpu() -> str | None:
    """Compute capability of the first GPU that programs see here, e.g. "9.0"; None where there is none."""
    return nvidia_smi("compute_cap")


def nvidia_smi(field: str) -> str | None:
    """What nvidia-smi says of the first GPU that CUDA_VISIBLE_DEVICES leaves visible; None where it names none."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        query += ["-i", visible.split(",")[0]]  # an index or a UUID; of an empty one it names none
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def rebuild_command(folder: Path, manifest: dict[str, Any]) -> str:
    """The command that builds an engine again as it was, as far as its manifest, which may be damaged, tells.

    It names no GPU to build for: the one here may be another.
    """

    def told(name: str) -> dict[str, Any]:
        entry = manifest.get(name)
        return entry if isinstance(entry, dict) else {}

    place = folder.resolve()
    options = {
        "--onnx": told("source").get("path") or "out/onnx",
        "--out": str(place.parent.parent) if manifest.get("backend") in (None, place.parent.name) else None,
        "--backend": manifest.get("backend"),
        "--variant": manifest.get("variant"),
        **{f"--{name.replace('_', '-')}": told("limits").get(name) for name in Limits.__dataclass_fields__},
        "--dense-slots": told("selection").get("dense_slots"),
        "--kv-cache": told("selection").get("kv_cache"),
        "--plans": "two" if "decode.plan" in told("files") else None,
        "--plugin-library": told("plugin").get("path"),
    }
    flags = {
        "--beyond-positions": "beyond_positions",
        "--compile": "compiled",
        "--standard-operators": "standard_operators",
        "--serialize-plugins": "plugins_serialized",
    }
    words = ["python", "-m", "engines.build"]
    words += [word for option, value in options.items() if value for word in (option, str(value))]
    return shlex.join([*words, *(flag for flag, name in flags.items() if manifest.get(name))])


_hashes: dict[tuple[int, int, int, int], str] = {}


def content_hash(path: Path) -> str:
    """SHA-256 of a file; hard links to one unchanged file are read once."""
    stat = path.stat()
    inode = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if inode not in _hashes:
        _hashes[inode] = sha256(path)
    return _hashes[inode]


def _variant_facts(variant: str, manifest: dict[str, Any], cache: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a Variant. Raises KeyError, TypeError or ValueError, naming what a manifest lacks or misstates."""
    facts = manifest["model"]
    counts = {name: _whole(facts, name) for name in Model.__dataclass_fields__ if name != "eos_token_id"}
    model = Model(**counts, eos_token_id=tuple(facts["eos_token_id"]))
    selection = manifest.get("selection", {})
    if not isinstance(selection, dict):
        raise ValueError(f"selection, {selection!r}")
    return {
        "variant": variant,
        "dtype": _one_of(DTYPES, manifest, "dtype"),
        "precision": manifest["precision"],
        "topk": topk_per_layer(manifest["topk"], model.layers),
        "selection": selection,
        "random_indexer": manifest["random_indexer"],
        "model": model,
        "cache": tuple(_cache_tensor(entry, model.layers) for entry in cache),
    }


def _cache_tensor(facts: dict[str, Any], layers: int) -> CacheTensor:
    name, shape, among = facts["name"], facts["shape"], facts.get("layers")
    match shape:
        case ["batch", int(), str(rows), int()] if stride_of(rows):
            pass
        case _:
            raise ValueError(f"the shape of cache {name}, {shape!r}")
    if among and not set(among) <= set(range(layers)):
        raise ValueError(f"the layers of cache {name}, {among!r}")
    recent = None if facts.get("recent") is None else _whole(facts, "recent")
    return CacheTensor(
        name, tuple(shape), _one_of(DTYPE_BYTES, facts, "dtype"), tuple(among) if among else None, recent
    )


def _whole(facts: Mapping[str, Any], name: str, least: int = 0) -> int:
    """An entry that is a whole number of at least `least`. Raises ValueError if it is not."""
    value = facts[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name}, {value!r}")
    return value


def _one_of(known: Collection[str], facts: Mapping[str, Any], name: str) -> str:
    """An entry that is one of the known names. Raises ValueError if it is not."""
    value: str = facts[name]
    if value not in known:
        raise ValueError(f"{name}, {value!r}")
    return value
