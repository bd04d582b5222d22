"""dsa::SparseAttention: softmax attention over the selected K and V rows only. See README.md."""

from plugins.sparse_attention.op import sparse_attention, sparse_attention_reference

__all__ = ["sparse_attention", "sparse_attention_reference"]
