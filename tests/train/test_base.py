"""The small default base: its tokenizer, its initialisation, and the folder it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from dsa_export.model import load_model
from train import base, warmup
from train.data import Windows
from train.documents import Malformed, documents
from train.trainer import Settings


def test_the_tokenizer_keeps_any_text(records: Path) -> None:
    tokenizer = base.train_tokenizer((d.answer for d in documents(str(records), Malformed())), 300)
    assert tokenizer.convert_tokens_to_ids(base.CHAT_TOKENS) == [0, 1, 2]
    for text in ("def f(x):\n    return x  # ok\r\n", "稀疏注意力 🙂\t\x00", "   leading and trailing   "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_fresh_model_already_looks_far_back() -> None:
    """On random tokens that repeat, layer 0 finds the token before and layer 1 what followed the last time."""
    torch.manual_seed(0)
    config = base.small_config()
    config._attn_implementation = "eager"
    model = Qwen2ForCausalLM(config).eval()
    base.start_with_induction(model)
    period = 100
    ids = torch.randint(3, base.VOCABULARY, (1, period)).repeat(1, 2)
    first, second = model(ids, output_attentions=True).attentions[:2]
    rows = torch.arange(period + 10, 2 * period)
    assert first[0, 0, rows, rows - 1].mean() > 0.9
    assert second[0, 0, rows, rows - period + 1].mean() > 0.25


def test_every_second_window_repeats() -> None:
    ids = torch.arange(4 * 64, dtype=torch.int32).view(4, 64)
    windows = base.with_repeats(Windows(ids, ids.clone(), torch.full((4,), 64)), seed=0)
    assert torch.equal(windows.input_ids[::2], ids[::2])
    for row in windows.input_ids[1::2]:
        assert any(torch.equal(row[period:], row[:-period]) for period in range(5, 33))
    assert torch.equal(windows.labels, windows.input_ids)


def test_the_seed_draws_the_repeats(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(base, "with_repeats", lambda windows, seed: seeds.append(seed) or windows)
    monkeypatch.setattr(base, "train", lambda *_: None)
    options = "--steps 1 --batch-size 1 --length 64 --held-out 0 --min-tokens 1 --device cpu --seed 3"
    base.main(["--data", str(records), "--out", str(tmp_path / "base"), *options.split()])
    assert seeds == [3]


def test_the_base_is_a_plain_qwen2_folder(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "--steps 3 --batch-size 2 --length 64 --held-out 2 --min-tokens 1 --device cpu".split()  # noqa: SIM905
    base.main(["--data", str(records), *arguments])
    assert base.ensure() == base.OUT
    stock = AutoModelForCausalLM.from_pretrained(base.OUT)
    assert type(stock) is Qwen2ForCausalLM
    assert len(AutoTokenizer.from_pretrained(base.OUT)) <= stock.config.vocab_size
    ids = torch.randint(3, 200, (1, 50))
    ours = load_model(base.OUT, attention="dense")
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    warmup.main(["--data", str(records), *arguments, "--topk", "8"])
    assert (tmp_path / "out" / "warmup" / "manifest.json").exists()


def test_the_rate_is_that_of_all_parameters() -> None:
    groups = base.parameter_groups(Qwen2ForCausalLM(base.small_config()))
    for factor in (1, 0.1):
        settings = Settings(1, (64,), 1, 1, lr=factor * base.SMALL.lr)
        rates = [group["lr"] for optimizer in base.muon_and_adamw(groups, settings) for group in optimizer.param_groups]
        assert rates[0] == pytest.approx(factor * base.MUON_LR) and rates[1] == pytest.approx(factor * base.SMALL.lr)
