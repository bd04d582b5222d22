"""A tiny Qwen2 with a tokenizer and a chat template, and records to train it on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from train import options
from train.base import CHAT_TEMPLATE

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "CACHE", tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 0–2 are special, lengths are easy to count."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def write_qwen(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int) -> Path:
    """A plain Qwen2 folder: hidden 64, 4 query heads on 2 KV heads."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # sharp attention: selection matters
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_qwen(tmp_path_factory.mktemp("tiny"), tokenizer, layers=2)


@pytest.fixture(scope="session")
def tiny_of_four(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_qwen(tmp_path_factory.mktemp("tiny-of-four"), tokenizer, layers=4)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 deepctrl-sft-data records of about 150 bytes."""
    path = tmp_path_factory.mktemp("records") / "sft.jsonl"
    rng = random.Random(0)
    words = [
        "sparse",
        "attention",
        "selects",
        "the",
        "keys",
        "that",
        "matter",
        "and",
        "skips",
        "the",
        "rest",
        "of",
        "a",
        "long",
        "context",
    ]
    lines = []
    for number in range(80):
        output = " ".join(rng.choices(words, k=20))
        record = {"instruction": f"Write line {number}.", "input": "", "output": output, "history": []}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def record(output: str, **fields) -> dict:
    return {"instruction": "Say it.", "input": "", "output": output, "history": []} | fields
