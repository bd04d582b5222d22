"""dsa::IndexTopK: the lightning indexer's scores and the exact selection of the k best keys. See README.md."""

from plugins.index_topk.op import index_scores, index_topk, index_topk_reference

__all__ = ["index_scores", "index_topk", "index_topk_reference"]
