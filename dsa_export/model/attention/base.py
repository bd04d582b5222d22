"""What passes between the decoder and an attention layer.

Shapes: B batch, S query tokens of this call, C cache capacity, Hq/Hkv query/KV heads, D head size, Hi/Di indexer
heads/size, K = k.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsa_export.model.cache import LayerCache

NOTHING = torch.empty(0)


@dataclass
class AttentionTrace:
    """What observers and selectors see of one layer of a call. Tensors are not detached.

    C: the tokens of the call itself, or with a cache all that it holds, and free rows behind them.

    A layer without an indexer has q, k and value_norms of its own beside what its leader has of the indexer and the
    selection.
    """

    layer: int
    q: Tensor  # [B, Hq, S, D], rotated
    k: Tensor  # [B, Hkv, C, D], rotated
    value_norms: Callable[[], Tensor]  # [B, Hq, C] fp32, ‖W_O,h v‖: what a key of weight 1 adds to the layer's output
    index_q: Tensor  # [B, S, Hi, Di], rotated
    index_weights: Tensor  # [B, S, Hi], scale included
    index_k: Tensor  # [B, S, Di], rotated
    scored_k: Tensor  # [B, C, Di], by which the tokens are scored: with pooled keys the mean of the token's group
    indices: Tensor | None  # [B, S, K] int32; None where the core attended to everything, or nothing is selected yet
    lengths: Tensor  # [B] int64, valid tokens of this call per row (rows are padded on the right)
    kv_lengths: Tensor  # [B] int64: past tokens + S
    scale: float  # of the main attention's scores
    again: Callable[[slice], AttentionTrace] | None = None
    """Runs the layer's indexer anew on the same input, for these of its queries: the trace before a selection. None:
    the layer has no indexer, or nothing observes."""

    def for_followers(self, *, observed: bool) -> AttentionTrace:
        """What the layers that follow need of it: the selection, and for an observer what made it."""
        selection = replace(self, q=NOTHING, k=NOTHING, value_norms=lambda: NOTHING, again=None)
        return selection if observed else selection.without_indexer()

    def of_queries(self, queries: slice) -> AttentionTrace:
        """The same with these of the S queries alone."""
        return replace(
            self,
            q=self.q[:, :, queries],
            index_q=self.index_q[:, queries],
            index_weights=self.index_weights[:, queries],
            indices=None if self.indices is None else self.indices[:, queries],
        )

    def without_indexer(self) -> AttentionTrace:
        """The same without what the indexer made of its input, to be kept until it is run again."""
        return replace(self, index_q=NOTHING, index_weights=NOTHING, index_k=NOTHING, scored_k=NOTHING)

    def with_indexer_of(self, leader: AttentionTrace) -> AttentionTrace:
        """The same with what the leader's indexer made of its input."""
        names = ("index_q", "index_weights", "index_k", "scored_k")
        return replace(self, **{name: getattr(leader, name) for name in names})


Observer = Callable[[AttentionTrace], dict[str, Tensor]]
"""Called once per layer; returns named scalars, which the model averages over the layers (auxiliary losses)."""

Selector = Callable[[AttentionTrace], Tensor]
"""Selects in the indexer's place: returns indices [B, S, K] int32, -1 where a query has fewer than K keys."""


@dataclass
class Call:
    """One call of the model, the same for all layers."""

    rope: tuple[Tensor, Tensor]  # cos, sin [B, S, D/2]
    index_rope: tuple[Tensor, Tensor]  # cos, sin [B, S, Di/2]
    kv_lengths: Tensor  # [B] int64: past tokens + S; query t stands at position kv_lengths - S + t
    lengths: Tensor  # [B] int64: valid tokens of this call
    caches: list[LayerCache] | None  # None: no past, nothing is kept
    observer: Observer | None = None
    selector: Selector | None = None  # None: the layer's own indexer selects
    handed_on: MutableMapping[int, AttentionTrace] = field(default_factory=dict)
    """Of the layers whose selection others follow: what those need. In training no dict, but a UserDict: of a dict,
    FSDP2 gives each layer a copy, and of a UserDict, torch.compile knows nothing."""


def mean_over_layers(scalars: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar over the layers that have it; the first has all."""
    return {name: torch.stack([layer[name] for layer in scalars if name in layer]).mean() for name in scalars[0]}
