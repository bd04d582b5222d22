"""dsa::BlockTopK: which blocks of tokens a query attends to, as token indices. See README.md."""

from plugins.block_topk.op import block_importance, block_topk, block_topk_reference

__all__ = ["block_importance", "block_topk", "block_topk_reference"]
