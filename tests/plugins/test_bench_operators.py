"""bench/operators.py without a GPU: it says so; and its floors are the bytes and operations of the README."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from bench.operators import Case, check_selection, floors
from plugins.index_topk import index_topk
from tests.plugins.conftest import ROOT

SCORED = ("index_q", "index_weights", "index_k", "lengths")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = subprocess.run([sys.executable, "-m", "bench.operators"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: bench.operators times GPU kernels: no CUDA GPU is visible to torch on this machine"
    ]


def test_floors() -> None:
    decode = floors(Case("decode", 32, 1, 128 * 1024, 2048))
    assert decode["index_topk"][0] == pytest.approx(32 * 131072 * 128, rel=0.01)
    assert decode["sparse_attention"][0] == pytest.approx(32 * 2048 * 512, rel=0.02)
    assert decode["dense"][0] == pytest.approx(32 * 131072 * 512, rel=0.01)
    assert decode["dense"][0] / decode["both"][0] == pytest.approx(3.8, abs=0.1)
    pooled = floors(Case("pooled fp8", 32, 1, 128 * 1024, 2048, sinks=4, window=128, pool=4, fp8=True))
    assert pooled["index_topk"][0] == pytest.approx(32 * 131072 / 4 * (64 + 4), rel=0.01)
    assert pooled["sparse_attention"] == decode["sparse_attention"] and pooled["dense"] == decode["dense"]
    prefill = floors(Case("prefill", 1, 1024, 128 * 1024, 2048))
    assert prefill["index_topk"][1] == pytest.approx(137e9, rel=0.01)
    assert prefill["dense"][1] == pytest.approx(4 * 1024 * 14 * 131072 * 64, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": 4, "window": 8}, {"pool": 4}, {"fp8": True}, {"sinks": 4, "window": 8, "pool": 4, "fp8": True}],
    ids=str,
)
def test_a_wrong_selection_is_found(options: dict) -> None:
    torch.manual_seed(0)
    case = Case("small", 1, 2, 203, 64, **options)
    case.fill("cpu")
    t = case.sets[0]
    assert check_selection(t, case, 0, 0) == check_selection(t, case, 0, 1) == ""

    def verdict(change: Callable[[torch.Tensor], None]) -> str:
        indices = t["indices"].clone()
        change(indices[0, 1])
        return check_selection({**t, "indices": indices}, case, 0, 1)

    def other_keys(row: torch.Tensor) -> None:
        """The always selected and the worst of the rest."""
        worse = dict(t, index_weights=-t["index_weights"])
        row.copy_(
            index_topk(*(worse[n] for n in SCORED), case.k, **case.options, index_scale=t.get("index_scale"))[0, 1]
        )

    assert "distinct groups" in verdict(lambda row: row[:1].copy_(row[1:2]))
    assert "distinct groups" in verdict(lambda row: row[:1].fill_(203))
    assert "far below" in verdict(other_keys)
    if options.get("sinks"):
        missing = next(g for g in range(20) if g * case.pool not in t["indices"][0, 1])
        tokens = torch.arange(missing * case.pool, (missing + 1) * case.pool)
        assert "always selected" in verdict(lambda row: swap(row, tokens))


def swap(row: torch.Tensor, tokens: torch.Tensor) -> None:
    """Puts `tokens` in the place of the first ones."""
    row[row.masked_fill(row < 0, 9999).argsort()[: len(tokens)]] = tokens.to(row.dtype)
