"""The training loop: order, schedule, lengths, accumulation, clipping, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dsa_export.model import load_model
from tests.train.conftest import SHORT, joint_of, trained, weights
from train import finetune, joint, trainer
from train.trainer import Settings, Trainer


@pytest.mark.parametrize(("k", "said"), [("8", "the selection costs +"), ("48", "nothing is known of the selection")])
def test_windows_that_select_everything_tell_nothing(
    tiny: Path, records: Path, tmp_path: Path, capsys, k: str, said: str
):
    trained(tiny, records, tmp_path / "w", "--steps", "1", "--topk", k)
    assert said.rstrip("+") in (shown := " ".join(capsys.readouterr().out.split()))
    assert ("the selection costs" in shown) == (k == "8")


@pytest.mark.parametrize(("sparse", "said"), [(2.2, "costs +10.00% of the dense loss"), (1.9, "costs -5.00% of")])
def test_what_the_selection_costs(sparse: float, said: str, capsys: pytest.CaptureFixture) -> None:
    figures = {"loss_sparse": sparse, "loss_dense": 2.0, "recall": 0.5}
    run = SimpleNamespace(stage=SimpleNamespace(name="joint"), step=4, seconds=3.0, before=figures)
    Trainer._show(run, figures)  # type: ignore[arg-type]
    assert said in " ".join(capsys.readouterr().out.split())


def test_every_window_is_taken_once_per_epoch() -> None:
    settings = Settings(steps=10, lengths=(8,), batch_size=3, accumulation=2)
    taken = torch.cat([settings.rows(step, micro, 9) for step in range(3) for micro in range(2)]).tolist()
    assert sorted(taken[:9]) == sorted(taken[9:]) == list(range(9))
    assert taken[:9] != taken[9:]


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the experiment's 51,200 windows, 16 in an update, it took 8 ms per update to draw it for each window."""
    settings = Settings(steps=10, lengths=(8,), batch_size=3, seed=4321)
    drawn = []
    monkeypatch.setattr(torch, "randperm", lambda n, **_: drawn.append(n) or torch.arange(n))
    taken = torch.cat([settings.rows(step, 0, 9) for step in range(6)]).tolist()
    assert drawn == [9, 9] and taken == [*range(9)] * 2
    trainer._order.cache_clear()


@pytest.mark.parametrize("schedule, last", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedules(schedule: str, last: float) -> None:
    settings = Settings(steps=1000, lengths=(8,), warmup_steps=10, schedule=schedule)
    factors = [settings.lr_factor(step) for step in range(1000)]
    assert 0 < factors[0] < 0.2 and factors[10] == 1.0 == max(factors)
    assert factors[-1] == pytest.approx(last, abs=0.01)
    assert np.diff(factors[:11]) == pytest.approx(factors[0]), "rises by the same in each step"


def test_a_weight_without_gradient_does_not_decay() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    trainer.adamw([weight], Settings(steps=1, lengths=(8,), lr=0.1)).step()
    assert weight.eq(1).all()


def test_neighbouring_seeds_share_none_of_theirs() -> None:
    first, second = ({trainer.nth_seed(seed, number) for number in range(1000)} for seed in (7, 8))
    assert len(first) == 1000 and first.isdisjoint(second)


def test_growing_windows_share_the_tokens() -> None:
    settings = Settings(steps=70, lengths=(16, 32, 64), batch_size=3)
    assert [(p.length, p.end - p.first) for p in settings.phases()] == [(16, 40), (32, 20), (64, 10)]
    assert [settings.tokens_before(step) for step in (0, 40, 60, 61, 70)] == [0, 1920, 3840, 4032, 5760]
    assert settings.lr_factor(60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 3)) / 2)


def test_the_time_that_is_left() -> None:
    """50 of 200 tokens took half a minute."""
    run = SimpleNamespace(settings=Settings(steps=4, lengths=(10,), batch_size=5), step=1, seconds=30.0)
    assert Trainer._eta(run) == "600.00 s per 1,000 tokens, 1.5 min left"  # type: ignore[arg-type]


def test_windows_grow_while_training(tiny: Path, records: Path, tmp_path: Path) -> None:
    arguments = ("--length", "16", "32", "64", "--steps", "7", "--kl-queries", "16")
    out = trained(tiny, records, tmp_path / "w", *arguments)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["tokens"] for m in steps if "tokens" in m] == [32] * 4 + [64] * 2 + [128]
    assert all(math.isfinite(m["kl"]) for m in steps if "tokens" in m)
    again = weights(trained(tiny, records, tmp_path / "again", *arguments))
    assert all(tensor.equal(again[name]) for name, tensor in weights(out).items())


def test_every_length_has_windows_for_its_updates(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Eight updates read 160 tokens in all, which three windows of 64 hold, but the phases are no equal parts."""
    out = trained(tiny, records, tmp_path / "w", "--length", "8", "16", "32", "64", "--steps", "8", "--batch-size", "1")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["windows"] == 4


def test_accumulation_equals_one_large_batch(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Rows of different lengths: each term is averaged over the whole update, not over micro-batches."""
    options = ["--packing", "cut", "--length", "100", "--indexer-optimizer", "adamw"]  # muon computes in bf16
    one = trained(tiny, records, tmp_path / "one", *options, "--batch-size", "4")
    four = trained(tiny, records, tmp_path / "four", *options, "--batch-size", "1", "--accumulation", "4")
    a, b = weights(one), weights(four)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])["kl"] for folder in (one, four)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_what_is_predicted_is_averaged_over_the_labels_of_an_update(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Of windows of equal length, in which prompts take more or less; the first token of a window is not predicted."""
    first = []
    for batch, accumulation in (("4", "1"), ("1", "4")):
        out = tmp_path / batch
        options = ["--attention", "dense", "--steps", "1", "--batch-size", batch, "--accumulation", accumulation]
        finetune.main(["--model", str(tiny), "--data", str(records), "--out", str(out), *SHORT, *options])
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["cross_entropy"])
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_what_is_distilled_is_averaged_over_the_labels_of_an_update(
    warm: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "plot_metrics", lambda *_: None)
    first = []
    for batch, accumulation in (("4", "1"), ("1", "4")):
        options = ["--steps", "1", "--held-out", "0", "--batch-size", batch, "--accumulation", accumulation]
        out = joint_of(warm, records, tmp_path / batch, *options)
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["distillation"])
    assert first[0] == pytest.approx(first[1], rel=1e-4) and first[0] > 1e-3


def test_each_group_is_clipped_by_itself(warm: Path, records: Path, tmp_path: Path, monkeypatch) -> None:
    clipped: list[tuple[int, float]] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda group, most: (clipped.append((len(group), most)), clip(group, most))[1]
    )
    joint_of(warm, records, tmp_path / "joint", "--steps", "1", "--clip", "0.5")
    groups = joint.parameter_groups(load_model(warm))
    assert clipped == [(len(groups["base"]), 0.5), (len(groups["indexer"]), 0.5)]
