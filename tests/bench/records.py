"""Made-up records in the form that bench.runs and bench.peers write."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def timing(variant: str, ms: float, **changes: object) -> Record:
    return {
        "kind": "timing", "variant": variant, "core": "Attention" if variant == "dense" else "SparseAttention",
        "strongest": True, "backend": "ort", "on_gpu": False, "precision": "fp32", "k": 512, "phase": "decode",
        "context": 8192, "batch": 1, "queries": 1, "caches": "prefill", "random_indexer": False, "ms_median": ms,
        "ms_p10": ms * 0.9, "ms_p90": ms * 1.2, "tokens_per_s": 1e3 / ms, "speedup": 3.0, "speedup_predicted": 4.5,
        "floor_fraction": 0.5, "peak_mib": 10.0, "ttft_s": None, "loss": 1.5,
        "agreement": {"loss_error": 0.01, "top1": 0.97, "kl": 0.01, "tokens": 32},
        "engine": f"out/engines/ort/{variant}", "source": {"sha256": "a" * 64, "weights_sha256": "b" * 64},
        "rates": {"bytes_per_s": 2e10, "flops_per_s": 1e11, "how": "copies"}, **changes,
    }  # fmt: skip


def pair(dense_ms: float, sparse_ms: float, **changes: object) -> list[Record]:
    speedup = {"speedup": dense_ms / sparse_ms, **changes}
    return [timing("dense", dense_ms, **{**changes, "speedup": 1.0}), timing("sparse", sparse_ms, **speedup)]


def peer(name: str, ms: float, **changes: object) -> Record:
    return {
        "kind": "peer", "peer": name, "precision": "fp32", "phase": "decode", "batch": 1, "context": 8192,
        "ms_median": ms, "ms_p10": ms, "ms_p90": ms, "tokens_per_s": 1e3 / ms, "ttft_s": 2.0, **changes,
    }  # fmt: skip


def everything() -> list[Record]:
    """Two precisions, two batches, both phases, three contexts, a peer, a profile and a skip."""
    found: list[Record] = []
    for precision, factor in (("fp32", 1.0), ("int4", 0.5)):
        for batch in (1, 4):
            for context, dense, sparse in ((512, 9.0, 10.0), (2048, 12.0, 11.0), (8192, 30.0, 12.0)):
                for phase, queries in (("decode", 1), ("prefill", 128)):
                    changes = {"precision": precision, "batch": batch, "context": context}
                    found += pair(dense * factor, sparse * factor, phase=phase, queries=queries, **changes)
    found.append(peer("transformers (sdpa)", 60.0))
    parts = {"projections, MLP": 3.0, "attention core": 5.0, "indexer, selection": 2.0, "head": 1.0, "other": 1.0}
    for core in ("Attention", "SparseAttention"):
        found.append({"kind": "profile", "core": core, "precision": "fp32", "k": 512, "context": 8192, "ms": parts})
    found.append({"kind": "skipped", "backend": "tensorrt", "context": 8192, "reason": "needs a <GPU> & more"})
    return found
