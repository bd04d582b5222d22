"""lm-eval takes the checkpoint as it is. An extra: `pip install -e '.[eval]'` to run this."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsa_export.model import load_model, load_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install -e '.[eval]')")


def test_lm_eval_scores_with_the_sparse_model(tiny: Path, tmp_path: Path) -> None:
    """Two requests of different lengths in one padded batch get the log-likelihoods of the model itself."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    load_model(tiny, index_heads=2, index_dim=16, index_topk=[4, 8]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tiny)
    tokenizer.save_pretrained(tmp_path)
    pairs = [("def add(a, b):\n    return", " a + b"), ("import", " os")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    scores = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2).loglikelihood(requests)
    model = load_model(tmp_path)
    for (context, continuation), (found, _) in zip(pairs, scores, strict=True):
        start, ids = len(tokenizer(context).input_ids), tokenizer(context + continuation, return_tensors="pt").input_ids
        with torch.no_grad():
            log_probabilities = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = log_probabilities.gather(1, ids[0, 1:, None])[start - 1 :].sum()
        assert found == pytest.approx(float(expected), abs=1e-3)
