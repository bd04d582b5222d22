"""k, the keys selected per query token: one number for all layers, or one per layer.

Configurations and manifests hold either form; what computes with k asks for one number per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

TopK = int | Sequence[int]


def topk_per_layer(topk: TopK, layers: int) -> tuple[int, ...]:
    """k of every layer. Raises ValueError unless there is one k, at least 1, for each of the `layers`."""
    values = tuple(topk) if isinstance(topk, Sequence) else (topk,) * layers
    for layer, k in enumerate(values):
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"index_topk must be a whole number of at least 1, got {k!r} for layer {layer}")
    if len(values) != layers:
        raise ValueError(f"index_topk lists {len(values)} values, the model has {layers} layers")
    return values


def compact_topk(values: Sequence[int]) -> int | list[int]:
    """One number where all layers have the same k, else the list: the form that is stored."""
    return values[0] if len(set(values)) == 1 else list(values)


def describe_topk(topk: TopK) -> str:
    """For people: "512", or "64–1024 by layer, mean 512"."""
    if isinstance(topk, int):
        return str(topk)
    if len(set(topk)) == 1:
        return str(topk[0])
    return f"{min(topk)}–{max(topk)} by layer, mean {sum(topk) / len(topk):.0f}"
