"""The comparison of the warm-up's step with the original's, small; the memory of the indexer's loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import training
from bench.measure import in_child
from dsa_export.cli import UserError
from train.losses import peak_bytes


@pytest.fixture
def every_tensor_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc returns tensors to the system as they are freed: resident memory is what they hold."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("every_tensor_on_its_own")
@pytest.mark.skipif(not training.PeakMemory.STATUS.is_file(), reason="needs /proc")
def test_the_loss_takes_the_memory_of_its_formula() -> None:
    """And so ≤ 400 MB at 8,192 and ≤ 1.6 GB at 32,768 tokens, where the naive target takes 3.8 and 60 GB."""
    shape = {"Hq": 14, "Hkv": 2, "Hi": 8, "Di": 64}
    peak = in_child(training.kl_peak, 2048, method="spawn")
    formula = peak_bytes(2048, **shape) / 2**20
    assert 0.7 * formula < peak < 1.3 * formula + 8
    assert peak_bytes(8192, **shape) <= 400e6 and peak_bytes(32768, **shape) <= 1.6e9


def test_both_ways_run_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "t.jsonl"
    training.main(["--length", "256", "--layers", "1", "--runs", "1", "--passes", "2", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["way"] for line in lines] == ["original", "ours", "ours, 2 passes"]
    for line in lines:
        assert line["seconds"] > 0 and line["time_ratio"] == pytest.approx(lines[0]["seconds"] / line["seconds"])
    assert "original / this" in capsys.readouterr().out


def test_steps_that_share_a_forward_run_the_base_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = training.build("ours", None, 1)
    forward, calls = model.model.forward, []
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    updates = []
    monkeypatch.setattr(model, "zero_grad", lambda **_: updates.append(1))
    training.steps("ours", 3, model, training.batch_of(model, 40))
    assert (len(calls), len(updates)) == (1, 3)
    assert all(p.grad is not None for name, p in model.named_parameters() if training.INDEXER in name)


def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        training.main(["--out", str(tmp_path)])


def test_the_two_ways_differ_in_attention_and_loss_only() -> None:
    ours, original = (training.build(way, None, 1) for way in ("ours", "original"))
    weights = dict(ours.named_parameters())
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.requires_grad == weights[name].requires_grad
    batch = training.batch_of(ours, 40)
    hidden = []
    for model in (ours, original):
        model.sparse = False
        hidden.append(model.model(**batch).last_hidden_state)
    torch.testing.assert_close(*hidden)
    probabilities = original.model.layers[0].self_attn.probabilities
    assert probabilities.shape == (1, 14, 40, 40)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 14, 40))
