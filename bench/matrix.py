"""What is compared: which engines belong together, which cases they are measured in, and what cannot run here.

A case's context n counts the tokens that the last query attends to, itself included. Decoding times one call with one
token per row after n - 1 others; prefill times one call with the last S tokens of n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsa_export.cli import UserError
from dsa_export.files import MANIFEST, PARTIAL, REPLACED, manifest_kind, read_manifest
from dsa_export.memory import available_memory
from dsa_export.selection import describe_selection
from dsa_export.topk import compact_topk
from engines.artifacts import Engine, open_engine
from engines.memory import WORKSPACE_BYTES, chunk_tokens

CONTEXTS = (512, 2048, 8192, 32768)
FLOPS = 1.0e12
"""Bound of the floating-point operations of one pre-filled context among the defaults: seconds on two cores."""
MARGIN_BYTES = 2**30
"""Memory that is left to the rest of the system when a case is planned."""

NVIDIA_CORE = "fused attention"
PLAN_CORES = {"torch": "SDPA", "tensorrt": NVIDIA_CORE, "tensorrt-rtx": NVIDIA_CORE}

Skip = dict[str, Any]


@dataclass(frozen=True)
class Case:
    phase: str  # prefill | decode
    batch: int
    context: int
    capacity: int
    queries: int  # S, tokens per row of one call


@dataclass(frozen=True)
class Group:
    """Engines that are timed in turn: one sparse engine, and every dense one of the same backend and weights.

    The dense ones differ in their attention operator; the fastest of them, case by case, is what sparse is held
    against.
    """

    backend: str
    precision: str
    dense: tuple[Engine, ...]
    sparse: Engine

    @property
    def k(self) -> int | list[int]:
        """k of every layer, as one number where they are equal."""
        return compact_topk(self.sparse.topk)

    @property
    def sides(self) -> dict[str, Engine]:
        """Every engine under the name of its attention operator; the sparse one comes last."""
        named = {core_of(engine): engine for engine in self.dense}
        return {**named, core_of(self.sparse): self.sparse}

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.precision}, k = {describe_selection(self.k, self.sparse.selection)}"

    def facts(self) -> dict[str, Any]:
        return {"backend": self.backend, "precision": self.precision, "k": self.k, "selection": self.sparse.selection}


def core_of(engine: Engine) -> str:
    """The operator that attends, by its name in the graph or, of a plan, what its runtime uses."""
    if engine.variant == "sparse":
        return "SparseAttention"
    return engine.attention_operator or PLAN_CORES.get(engine.backend, "Attention")


def discover(folders: Sequence[Path]) -> tuple[list[Engine], list[Skip]]:
    """Every engine below the folders that can be opened here, and why the others cannot."""
    engines, skips = [], []
    for folder in engine_folders(folders):
        try:
            engines.append(open_engine(folder))
        except UserError as error:
            skips.append({**_named(folder), "engine": str(folder), "reason": str(error)})
    return engines, skips


def _named(folder: Path) -> dict[str, Any]:
    """What a manifest says an engine is, if it says anything."""
    try:
        manifest = read_manifest(folder, "engine", "python -m engines.build")
    except UserError:
        return {}
    return {name: manifest.get(name) for name in ("backend", "variant")}


def engine_folders(folders: Sequence[Path]) -> list[Path]:
    """Every engine folder below the given ones; unfinished (`.partial`) ones are passed over."""
    found = [path.parent for folder in folders for path in sorted(folder.rglob(MANIFEST))]
    whole = [folder for folder in found if PARTIAL not in str(folder) and REPLACED not in str(folder)]
    return [folder for folder in dict.fromkeys(whole) if manifest_kind(folder) == "engine"]


def groups(engines: Iterable[Engine]) -> tuple[list[Group], list[Skip]]:
    """Engines of one backend, precision and weight file, one group per sparse engine; those without a partner."""
    by_weights: dict[tuple[str, str, str], list[Engine]] = {}
    for engine in engines:
        key = (engine.backend, engine.precision, engine.manifest["source"].get("weights_sha256", ""))
        by_weights.setdefault(key, []).append(engine)
    found, skips = [], []
    for (backend, precision, _), members in by_weights.items():
        dense = {
            (core_of(engine), engine.kv_cache): engine for engine in reversed(members) if engine.variant != "sparse"
        }
        sparse = {(e.topk, str(e.selection)): e for e in reversed(members) if e.variant == "sparse"}
        for engine in members:
            chosen = sparse[engine.topk, str(engine.selection)] if engine.variant == "sparse" else engine
            if not (dense and sparse):
                reason = f"no {'dense' if engine.variant == 'sparse' else 'sparse'} engine of the same weights"
            elif chosen is not engine:
                reason = f"selects as {chosen.folder} does, of the same weights: compare it in a run of its own"
            else:
                continue
            skips.append({"backend": backend, "precision": precision, "engine": str(engine.folder), "reason": reason})
        for engine in (sparse[selected] for selected in sorted(sparse) if dense):
            found.append(Group(backend, precision, tuple(_partners(dense, engine)), engine))
    return found, skips


def _partners(dense: Mapping[tuple[str, str | None], Engine], sparse: Engine) -> Iterator[Engine]:
    """For every dense operator the engine that caches keys and values as the sparse one does, or as exported."""
    for core in sorted({core for core, _ in dense}):
        partner = dense.get((core, sparse.kv_cache)) or dense.get((core, None))
        if partner is not None:
            yield partner


def check_comparable(groups: Sequence[Group]) -> None:
    """Raises UserError for engines of models that do not read the same tokens, and for two groups that no table could
    tell apart."""
    seen: dict[str, Group] = {}
    for group in groups:
        first = groups[0]
        if (group.sparse.model, _tokenizer(group)) != (first.sparse.model, _tokenizer(first)):
            raise UserError(
                f"{first.sparse.folder} and {group.sparse.folder} are engines of different models, or have different "
                "tokenizers: compare each model in a run of its own"
            )
        other = seen.setdefault(group.name, group)
        if other is not group:
            raise UserError(
                f"{other.sparse.folder} and {group.sparse.folder} are engines of different weights, and both "
                f"{group.name}: compare each model in a run of its own"
            )


def _tokenizer(group: Group) -> dict[str, str]:
    """Hashes of the files that say how a text becomes tokens."""
    files = group.sparse.manifest["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name == "tokenizer.json"}


@dataclass(frozen=True)
class Wish:
    """What the user asks for. contexts: None for the defaults."""

    contexts: Sequence[int] | None
    batches: Sequence[int]
    phases: Sequence[str]
    caches: str  # prefill | random
    prefill_up_to: int | None = None


def host_bytes() -> int:
    """Bytes of this machine's memory that a measurement may use now."""
    return available_memory() - MARGIN_BYTES


def plan(group: Group, wish: Wish, available: int) -> tuple[list[Case], list[Skip]]:
    """The cases of a group in the order of measurement, and those that cannot run, with the reason.

    available: bytes of memory that may be used.
    """
    cases, skips = [], []
    engines = list(group.sides.values())
    rows = min(engine.limits.max_batch for engine in engines)
    limit = min(engine.limits.max_context for engine in engines)
    contexts = sorted(set(wish.contexts)) if wish.contexts else default_contexts(group, limit, wish.caches)
    for batch in sorted(set(wish.batches)):
        for context in contexts:
            capacity = max(context, group.sparse.max_topk)
            chunk = min(chunk_tokens(e, e.limits.prefill_chunk, batch, capacity) for e in engines)
            base = Case("decode", batch, context, capacity, 1)
            reason = too_large(group, base, rows, limit, available, wish.caches)
            for phase in wish.phases:
                case = base if phase == "decode" else replace(base, phase="prefill", queries=min(chunk, context))
                late = phase == "prefill" and wish.prefill_up_to is not None and context > wish.prefill_up_to
                why = reason or (f"--quick prefills up to {wish.prefill_up_to:,} tokens only" if late else None)
                if why:
                    skips.append({**group.facts(), "phase": phase, "batch": batch, "context": context, "reason": why})
                else:
                    cases.append(case)
    return cases, skips


def too_large(group: Group, case: Case, rows: int, limit: int, available: int, caches: str) -> str | None:
    if case.batch > rows:
        return f"the engines were built for {rows} rows: build with --max-batch {case.batch}"
    if case.context > limit:
        positions = group.sparse.model.max_position_embeddings
        beyond = " --beyond-positions" if case.context > positions else ""
        return (
            f"beyond the engines' capacity of {limit:,} tokens: build with --max-context{beyond} (the model has "
            f"{positions:,} positions)"
        )
    needed = memory_bytes(group.sides.values(), case, caches)
    if needed > available:
        return f"needs {needed / 2**30:.1f} GiB for all engines of the case, {available / 2**30:.1f} GiB are free"
    return None


def memory_bytes(engines: Iterable[Engine], case: Case, caches: str) -> int:
    """What a case needs with all its engines loaded: weights, caches, one workspace; caches that grow are copied."""
    sizes = [case.batch * case.capacity * engine.cache_bytes_per_token() for engine in engines]
    weights = [sum(facts["bytes"] for facts in engine.manifest["files"].values()) for engine in engines]
    return sum(weights) + sum(sizes) + (max(sizes) if caches == "prefill" else 0) + WORKSPACE_BYTES


def default_contexts(group: Group, limit: int, caches: str) -> list[int]:
    """Contexts that show the trend and that can be pre-filled within seconds; the shortest one always."""
    engine = group.dense[0]
    affordable = [n for n in CONTEXTS if n <= limit and (caches == "random" or prefill_flops(engine, n) <= FLOPS)]
    return affordable or [min(CONTEXTS[0], limit)]


def prefill_flops(engine: Engine, context: int) -> float:
    """Floating-point operations of a dense prefill: two per weight and token, and the attention's."""
    model = engine.model
    attention = 2 * context * context * model.query_heads * model.head_dim * model.layers  # half is masked
    return 2 * engine.manifest["step_weights"] * context + attention
