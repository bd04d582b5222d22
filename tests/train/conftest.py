"""A tiny Qwen2 with a tokenizer and a chat template, and records to train it on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from train import joint, options, warmup
from train.base import CHAT_TEMPLATE
from train.data import IGNORED

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
INDEXER = {"index_heads": 2, "index_dim": 16, "index_topk": 8}
WINDOWS = ["--length", "48", "--batch-size", "2", "--held-out", "2", "--min-tokens", "1", "--device", "cpu"]
SHORT = ["--steps", "3", *WINDOWS]
SMALL_INDEXER = ["--topk", "8", "--index-heads", "2", "--index-dim", "16"]


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


def batch(lengths: tuple[int, ...] = (40, 25), seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (len(lengths), max(lengths)), generator=g)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, IGNORED)}


def trained(tiny: Path, records: Path, out: Path, *arguments: str) -> Path:
    warmup.main(["--model", str(tiny), "--data", str(records), "--out", str(out), *SHORT, *SMALL_INDEXER, *arguments])
    return out


@pytest.fixture(scope="session")
def warm(tiny: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny, records, tmp_path_factory.mktemp("warm") / "warmup")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def joint_of(warm: Path, records: Path, out: Path, *arguments: str) -> Path:
    joint.main(["--model", str(warm), "--data", str(records), "--out", str(out), *SHORT, *arguments])
    return out
