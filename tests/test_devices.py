"""Whatever a call makes lies where its model does: training and decoding on a device that is not the CPU."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_export.model import dense_twin, load_model
from dsa_export.model.step import StepGraph
from tests import pretend
from tests.conftest import VOCABULARY, build_qwen, build_tokenizer
from tests.dsa_export.test_families import STOCK, build
from train import distributed, evaluate, joint, losses, options, timing, warmup
from train.base import CHAT_TEMPLATE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has one kind of accelerator, here a real one")

INDEXER = {"index_heads": 4, "index_dim": 32, "index_topk": 16}
OPTIONS: list[dict[str, Any]] = [
    {"index_keys": "int8"},
    {"index_keys": "fp8", "index_sinks": 2, "index_window": 3},
    {"index_pool": 4, "index_share": 2},
    {"attention": "nsa"},
]
INDEXER_ARGUMENTS = ["--topk", "16", "--index-heads", "4", "--index-dim", "32"]
WORDS = ["sparse", "attention", "selects", "the", "keys", "that", "matter", "and", "skips", "all", "others"]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_qwen(tmp_path_factory.mktemp("chatting"))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "texts").mkdir()
    words = random.Random(0)
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words.choices(WORDS, k=200)))
    return folder


def windows(model: str | Path) -> list[str]:
    return ["--data", f"{model}/texts", "--length", "96", "--min-tokens", "1", "--held-out", "2"]


def in_a_process(call: str) -> None:
    """Runs a function of this module in a process, as the device stays in torch."""
    command = [sys.executable, "-c", f"from tests.test_devices import *; {call}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_training_and_evaluation(chatting: Path, tmp_path: Path) -> None:
    """Both stages and the evaluation; the warm-up ends where one on the CPU does."""
    in_a_process(f"train_and_evaluate({str(chatting)!r}, {str(tmp_path)!r})")
    warmup.main([*warm_up(chatting, tmp_path), "--device", "cpu", "--out", str(tmp_path / "cpu")])
    here, there = (json.loads((tmp_path / name / "manifest.json").read_text())["after"] for name in ("cpu", "warm"))
    assert there.keys() == here.keys()
    for name, value in here.items():  # of two keys that score alike rounding chooses one
        assert there[name] == pytest.approx(value, rel=5e-3 if "recall" in name else 1e-4), name


def warm_up(model: str | Path, folder: str | Path) -> list[str]:
    return ["--model", str(model), "--steps", "2", *INDEXER_ARGUMENTS, *windows(model), "--cache", f"{folder}/tokens"]


def train_and_evaluate(model: str, folder: str) -> None:
    device = pretend.start()
    for user in (distributed, evaluate, options):
        user.pick_device = lambda name: device
    losses.TILE[pretend.NAME] = losses.TILE["cuda"]
    timing.fill_randomly = lambda tensors, seed: None  # the device has no random numbers
    warmup.main([*warm_up(model, folder), "--out", f"{folder}/warm"])
    more = ["--index-share", "2", "--kl-target", "output", "--position-span", "400", "--passes", "2"]
    warmup.main([*warm_up(model, folder), *more, "--out", f"{folder}/more"])
    data = [*windows(model), "--cache", f"{folder}/tokens"]
    joint.main(["--model", f"{folder}/more", "--steps", "2", *data, "--out", f"{folder}/joint"])
    text = ["--length", "96", "--k", "16", "auto", "--windows", "2", "--min-tokens", "1", "--data", f"{model}/texts"]
    task = ["--tasks", "passkey", "--task-lengths", "400", "--samples", "1"]
    evaluate.main(["--model", f"{folder}/joint", *text, *task, "--out", f"{folder}/evaluation"])


def test_steps(qwen_folder: Path, tmp_path: Path) -> None:
    """See steps()."""
    latent = build(STOCK["deepseek_v3"], tmp_path)
    in_a_process(f"steps({str(qwen_folder)!r}, {str(latent)!r})")


@torch.no_grad()
def steps(qwen: str, latent: str) -> None:
    """Prefill and decoding by the exported step, with every kind of cache: the CPU's logits.

    While a token is decoded nothing waits for the device, so that the step can be recorded as a CUDA graph.
    """
    device = pretend.start()
    models = [load_model(qwen, **({} if "attention" in options else INDEXER), **options) for options in [{}, *OPTIONS]]
    models += [load_model(latent, index_topk=16, index_heads=2, index_dim=16), dense_twin(load_model(qwen))]
    tokens = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    for model in models:
        caches = [
            entry.zeros(2, 64, torch.float32, where)
            for where in ("cpu", device)
            for layout in model.model.cache_layouts
            for entry in layout
        ]
        here, there = caches[: len(caches) // 2], caches[len(caches) // 2 :]
        calls = [(tokens[:, :36], torch.zeros(2, dtype=torch.int64)), (tokens[:, 36:37], torch.tensor([36, 30]))]
        expected = [StepGraph(model)(ids, past, torch.full_like(past, ids.shape[1]), here)[0] for ids, past in calls]
        step = StepGraph(model.to(device))
        for (ids, past), logits in zip(calls, expected, strict=True):
            inputs = [tensor.to(device) for tensor in (ids, past, torch.full_like(past, ids.shape[1]))]
            if ids.shape[1] == 1:
                with pretend.no_waiting():
                    found = step(*inputs, there)[0]
            else:
                found = step(*inputs, there)[0]
            torch.testing.assert_close(found.cpu(), logits, atol=1e-5, rtol=0)
