"""The attention slot. A variant is one file: a module class (see DenseAttention) and a line in VARIANTS."""

from dsa_export.model.attention.base import AttentionTrace, Call, Selector
from dsa_export.model.attention.dense import DenseAttention
from dsa_export.model.attention.dsa import SparseAttention
from dsa_export.model.attention.mla import LatentAttention, SparseLatentAttention
from dsa_export.model.attention.nsa import NativeSparseAttention

VARIANTS: dict[str, type[DenseAttention]] = {
    "dense": DenseAttention,
    "dsa": SparseAttention,
    "mla": LatentAttention,
    "mla-dsa": SparseLatentAttention,
    "nsa": NativeSparseAttention,
}

__all__ = ["VARIANTS", "AttentionTrace", "Call", "Selector", "DenseAttention", "SparseAttention"]
