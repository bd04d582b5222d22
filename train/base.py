"""The default base: a small Qwen2 trained from scratch, in a minute or two: every command works without a model.

It goes through the same door as a real Qwen2.5: a plain Hugging Face folder with its own tokenizer (byte-level BPE
with Qwen's chat tokens and template).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dsa_export.cli import console, run
from dsa_export.files import MANIFEST
from dsa_export.model.checkpoint import load_config
from train.data import IGNORED, Batch, Windows
from train.documents import training_texts
from train.options import Recipe, argument_parser, identity, is_done, resolve, start, train, training_data
from train.trainer import Settings, Stage, adamw

OUT = "out/base"
SCRATCH = {"path": "from scratch", "sha256": None}
"""The source of a model that was not made of another one."""
INIT_STD = 0.05
VOCABULARY = 1024
MUON_LR = 0.01
"""At the recipe's --lr, in proportion to it otherwise."""
WINDOW = 64
"""The evaluation also masks attention to the last WINDOW keys: what a model without long attention would get."""

SMALL = Recipe(steps=450, batch_size=2, length=(512,), lr=4e-3, min_tokens=64, held_out=16)

# The pattern of Qwen2.5's own tokenizer: words, single digits, punctuation, line ends.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, nothing is unknown."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CHAT_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def small_config() -> Qwen2Config:
    """Qwen2.5-0.5B in small: seven query heads on each KV head."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        eos_token_id=CHAT_TOKENS.index("<|im_end|>"),
        pad_token_id=CHAT_TOKENS.index("<|endoftext|>"),
    )


@torch.no_grad()
def start_with_induction(model: Qwen2ForCausalLM) -> None:
    """Writes an induction circuit into the fresh weights: a head that looks for what followed the same token before.

    Language models find this circuit, the first long-range attention they have, only after many more tokens than two
    cores read in two minutes, and without one there is nothing far away for an indexer to find. Layer 0, head 0 attends
    to the previous token and writes its embedding into a subspace of its own; layer 1, head 0 compares that subspace of
    the keys with the current embedding and copies the embedding that it finds. Training changes all of it.
    """
    config = model.config
    D, E = config.head_dim, config.hidden_size
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(D // 2) / (D // 2))
    read, write = (torch.linalg.qr(torch.randn(E, D)).Q.T for _ in range(2))  # [D, E], orthonormal rows
    for layer in model.model.layers:  # nothing but the circuit speaks at first
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    previous = model.model.layers[0].self_attn
    fast = torch.where(torch.arange(D // 2) < 5, 8.0, 0.0)  # only fast rotations tell neighbours apart
    previous.q_proj.weight[:D] = 0
    previous.q_proj.bias[:D] = torch.cat([fast * torch.cos(frequencies), -fast * torch.sin(frequencies)])  # one back
    previous.k_proj.bias[:D] = torch.cat([fast, torch.zeros(D // 2)])
    previous.v_proj.weight[:D] = read
    previous.o_proj.weight[:, :D] = INIT_STD * write.T

    match = model.model.layers[1].self_attn
    slow = (torch.arange(D // 2) >= 7).float().repeat(2)[:, None]  # slow rotations do not mind the distance
    match.q_proj.weight[:D] = 5 * slow * read
    match.k_proj.weight[:D] = slow * write
    match.v_proj.weight[:D] = read
    match.o_proj.weight[:, :D] = 10 * INIT_STD * read.T


def with_repeats(windows: Windows, seed: int) -> Windows:
    """Every second window is replaced by random tokens that repeat: the loss there falls by long attention only."""
    g = torch.Generator().manual_seed(seed)
    N, T = windows.input_ids.shape
    ids, labels = windows.input_ids.clone(), windows.labels.clone()
    for row in range(1, N, 2):
        period = int(torch.randint(max(1, T // 12), T // 2 + 1, (), generator=g))
        tokens = torch.randint(len(CHAT_TOKENS), VOCABULARY, (period,), generator=g, dtype=ids.dtype)
        ids[row] = labels[row] = tokens.repeat(T // period + 1)[:T]
    return Windows(ids, labels, torch.full_like(windows.lengths, T))


def muon_and_adamw(groups: dict[str, list[nn.Parameter]], settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest: at this size it needs half of AdamW's tokens for the same loss."""
    muon = torch.optim.Muon(groups["matrices"], lr=MUON_LR * settings.lr / SMALL.lr, weight_decay=0.01)
    return [muon, adamw(groups["others"], settings)]


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    named = list(model.named_parameters())
    matrices = {name for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
    return {
        "matrices": [p for name, p in named if name in matrices],
        "others": [p for name, p in named if name not in matrices],
    }


def cross_entropy(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"cross_entropy": model(**batch).loss}


@torch.no_grad()
def evaluate(model: Any, windows: Windows) -> dict[str, float]:
    """loss, and loss_window: the same with attention to the last WINDOW keys only."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch = windows.batch(torch.arange(len(windows)), device)
    T = batch["input_ids"].shape[1]
    near = torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - WINDOW)
    losses = {}
    for name, mask in (("loss", None), ("loss_window", near.expand(len(windows), 1, T, T))):
        logits = model(batch["input_ids"], attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        losses[name] = loss.item()
    model.train(was_training)
    return losses


def parser() -> argparse.ArgumentParser:
    return argument_parser("base", __doc__ or "", SMALL, None, OUT)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    processes = start(args)
    resolve(args, SMALL, None, small_config())
    run_identity = identity("base", args)
    if is_done(args.out, None, run_identity, overwrite=args.overwrite):
        return

    tokenizer = train_tokenizer(training_texts(args.data, args.allow_malformed, args.cache, args.max_rows), VOCABULARY)
    data = training_data(args, tokenizer, processes, train_on_prompt=True)
    data = replace(data, train=with_repeats(data.train, args.seed))
    torch.manual_seed(args.seed)
    model = Qwen2ForCausalLM(small_config())
    start_with_induction(model)
    stage = Stage(
        name="base",
        groups=parameter_groups,
        terms=cross_entropy,
        losses=("cross_entropy",),
        evaluate=evaluate,
        optimizers=muon_and_adamw,
    )
    train(stage, model, tokenizer, data, SCRATCH, run_identity, args, processes)


def config_of(model: str | None) -> PreTrainedConfig:
    """The configuration of a checkpoint; None: of the default base, which ensure() may still have to train."""
    if model is None and not is_trained(OUT):
        return small_config()
    return load_config(model or OUT)


def is_trained(folder: str) -> bool:
    """Whether a stage has finished what it writes to a folder."""
    return (Path(folder) / MANIFEST).is_file()


def ensure() -> str:
    """The folder of the default base, trained first if it is missing."""
    if not is_trained(OUT):
        console.print(f"no {OUT} yet: training the small base first")
        main([])
    return OUT


if __name__ == "__main__":
    run(main)
