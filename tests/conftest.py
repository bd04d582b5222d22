"""Shared by all tests: small models of the real architecture, built here, with random weights and a real tokenizer."""

from __future__ import annotations

import os
import signal
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from dsa_export.model import load_model

logging.disable_progress_bar()
VOCABULARY = 512


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Two, or what the caller says: one where several workers share the cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, len(os.sched_getaffinity(0))))))


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """A shell's background job ignores SIGINT, and so would the commands that the tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Largest(TorchDispatchMode):
    """Within the context: the number of elements of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def build_qwen(folder: Path, *, tied: bool = False, layers: int = 2) -> Path:
    """A plain Qwen2 checkpoint: 7 query heads on 1 KV head of size 64, with biases and norms that matter."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        head_dim=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=7,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "proj" in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory) -> Path:
    return build_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory) -> Path:
    """For indexers of several layers: with two, the first layer leads all others."""
    return build_qwen(tmp_path_factory.mktemp("four-layers"), layers=4)


@pytest.fixture(scope="session")
def dsa_folder(qwen_folder, tmp_path_factory) -> Path:
    """A DSA checkpoint with a random indexer: 4 heads of size 32, k = 16."""
    folder = tmp_path_factory.mktemp("dsa")
    torch.manual_seed(1)
    model = load_model(qwen_folder, index_heads=4, index_dim=32, index_topk=16)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.self_attn.indexer.k_norm.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def dsa_model(dsa_folder):
    return load_model(dsa_folder)


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 60] token ids."""
    return torch.randint(3, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(2))
