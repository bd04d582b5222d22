"""Two processes do what one does: the losses, the weights, the files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_export.cli import UserError
from tests.train.test_resume import interrupt_at
from train import distributed, joint, warmup

SETTINGS = ["--device", "cpu", "--min-tokens", "1", "--held-out", "2", "--batch-size", "1", "--accumulation", "4",
            "--packing", "cut", "--length", "100", "--kl-queries", "20",
            "--schedule", "constant", "--warmup-steps", "0", "--lr", "1e-2"]  # fmt: skip
INDEXER = ["--topk", "8", "--index-heads", "2", "--index-dim", "16"]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0"]  # fmt: skip
# --cpu would start a single process: accelerate spreads over CPUs by MPI only.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip


def launch(launcher: list[str], arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launcher, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment) as process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # each in a session of its own
                one.kill()
            raise AssertionError(f"not done after 300 s: {process.communicate()}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path, apart: float = 0.01 * 1e-2) -> None:
    """apart: of the weights, in the mean of a tensor."""
    assert len(metrics(a)) == len(metrics(b))
    for one, other in zip(metrics(a), metrics(b), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"evaluation", "seconds"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    weights = load_file(b / "model.safetensors")
    for name, tensor in load_file(a / "model.safetensors").items():
        # A step of Adam moves a weight by about the learning rate, whatever its gradient: where that is noise, apart.
        assert (weights[name] - tensor).abs().mean() < apart, name


@pytest.fixture(scope="module")
def warm(tiny: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "warmup"
    warmup.main(["--model", str(tiny), "--data", str(records), "--out", str(out), "--steps", "3", *SETTINGS, *INDEXER])
    return out


def test_the_experiment_on_two_processes(records: Path, tmp_path: Path) -> None:
    """What the first process writes, the other one reads next: the warm-up's checkpoint."""
    arguments = ["--quick", "--preset", "plain", "--attention", "dense", "--steps", "1", "--warm-up", "1"]
    arguments += ["--vocabulary", "300", "--held-out", "2", "--speed-lengths", "--device", "cpu"]
    folders = ["--data", str(records), "--cache", str(tmp_path / "tokens"), "--out", str(tmp_path / "out")]
    result = launch([*TORCHRUN, "-m", "train.experiment"], [*arguments, *folders])
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out" / "report" / "results.json").is_file()


def test_the_warm_up_under_accelerate_launch(tiny: Path, records: Path, warm: Path, tmp_path: Path) -> None:
    """Rows of different lengths: a mean of the processes' means would be another loss."""
    arguments = ["--model", str(tiny), "--data", str(records), "--out", str(tmp_path / "two"), "--steps", "3"]
    result = launch([*ACCELERATE, "-m", "train.warmup"], [*arguments, *SETTINGS, *INDEXER])
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    assert_same_run(warm, tmp_path / "two")
    assert result.stdout.count("written:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_gradients_are_exchanged_once_per_update() -> None:
    """DDP decides in the forward pass whether the backward pass will exchange them."""
    exchanges = []

    def exchange(_, bucket):  # torch reads annotations, and does not know them as strings
        exchanges.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        spread = distributed.Spread(torch.nn.Linear(2, 1), distributed.Processes(torch.device("cpu"), 0, 2))
        spread.module.register_comm_hook(None, exchange)
        for micro_step in range(3):
            with spread.exchange(last=micro_step == 2):
                spread.backward(spread.run(lambda model: model(torch.ones(1, 2)).sum()))
        assert exchanges == [0] and spread.model.weight.grad.tolist() == [[6, 6]]
        del spread
    finally:
        torch.distributed.destroy_process_group()


LEAVING_ALONE = """
import gc
from torch.nn.parallel import DistributedDataParallel
import torch.distributed as dist
from dsa_export.cli import run
from train import warmup

destroy = dist.destroy_process_group

def destroy_alone():
    wrappers = [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
    assert not wrappers, gc.get_referrers(*wrappers)
    destroy()

dist.destroy_process_group = destroy_alone
run(warmup.main)
"""
"""A warm-up that checks what Processes.leave() is about."""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_layers_that_follow_another_ones_indexer(
    tiny_of_four: Path, records: Path, tmp_path: Path, parallel: str
) -> None:
    """The follower's loss reaches its leader's indexer, whose shards another layer gathered, and the second pair of
    layers does not see the first one's. DDP: with two passes."""
    script = tmp_path / "warmup.py"
    script.write_text(LEAVING_ALONE)
    settings = ["--model", str(tiny_of_four), "--data", str(records), "--steps", "3", "--index-share", "2"]
    settings += [*SETTINGS, *INDEXER, "--position-span", "300"]
    if parallel == "ddp":
        settings += ["--passes", "2"]
        settings += ["--indexer-optimizer", "adamw"]  # muon's bf16 makes rounding visible
    warmup.main([*settings, "--out", str(tmp_path / "one")])
    options = ["--out", str(tmp_path / "two"), "--parallel", parallel, "--device", "auto"]
    result = launch([*TORCHRUN, str(script)], [*settings, *options])
    assert result.returncode == 0, result.stderr
    # Muon computes in bf16: where shards are summed in another order, its steps differ by some percent.
    assert_same_run(tmp_path / "one", tmp_path / "two", apart=0.03 * 1e-2)


def test_shards_of_a_base_that_is_held_in_bf16(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Beside an indexer in fp32."""
    folder = tmp_path / "low"
    shutil.copytree(tiny, folder)
    low = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(low, folder / "model.safetensors", metadata={"format": "pt"})
    settings = ["--model", str(folder), "--data", str(records), "--steps", "3", "--dtype", "bf16", *SETTINGS, *INDEXER]
    settings += ["--indexer-optimizer", "adamw"]
    warmup.main([*settings, "--out", str(tmp_path / "one")])
    settings += ["--out", str(tmp_path / "two"), "--parallel", "fsdp"]
    result = launch([*TORCHRUN, "-m", "train.warmup"], settings)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two", apart=0.03 * 1e-2)


def stop_during(step: int) -> str:
    """Python that lets every process be interrupted in the middle of a step."""
    return f"""
import os, signal, sys
from dsa_export.cli import run
from train import joint, trainer

original = trainer.Trainer._step

def step_and_interrupt(self):
    if self.step + 1 == {step}:
        os.kill(os.getpid(), signal.SIGINT)
    return original(self)

trainer.Trainer._step = step_and_interrupt
"""


def test_one_process_starts_two_with_shards_go_on_one_ends(records: Path, warm: Path, tmp_path: Path) -> None:
    """FSDP2, gradient checkpointing: the same losses and weights, and a state that any number of processes takes."""
    settings = ["--model", str(warm), "--data", str(records), "--steps", "4", *SETTINGS]
    settings += ["--indexer-lr", "1e-2", "--indexer-optimizer", "adamw"]  # muon's bf16 makes rounding visible
    joint.main([*settings, "--out", str(tmp_path / "whole")])
    settings += ["--out", str(tmp_path / "parts")]
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 4"), pytest.MonkeyPatch.context() as patch:
        interrupt_at(1, patch)
        joint.main(settings)
    script = tmp_path / "joint.py"
    script.write_text(stop_during(3) + "run(joint.main)\n")
    stopped = launch([*TORCHRUN, str(script)], [*settings, "--parallel", "fsdp", "--gradient-checkpointing"])
    assert stopped.returncode == 1 and "stopped after step 3 of 4" in stopped.stderr, stopped.stderr
    joint.main(settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parallel", "fsdp"], "--parallel fsdp needs several processes"),
        (["--accumulation", "3"], "--accumulation 3 cannot be dealt out to 2 processes"),
        (["--parallel", "fsdp", "--passes", "2"], "--passes 2 needs --parallel ddp"),
        ([], "several processes need a --model"),
    ],
)
def test_arguments_that_do_not_fit_the_processes(
    arguments: list[str], message: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", str(tiny)] if arguments else []
    if message.startswith("--parallel fsdp"):
        with pytest.raises(UserError, match=message):
            warmup.main([*model, *arguments])
        return
    monkeypatch.setattr(
        distributed, "start", lambda _, p: distributed.Processes(torch.device("cpu"), 0, 2, p == "fsdp")
    )
    with pytest.raises(UserError, match=message):
        warmup.main([*model, *arguments])
